//! `stoker machine launch`

use clap::Args;
use stoker_proto::v1;

use super::{client, show, threshold};
use crate::cli::credits::GivenMode;
use crate::cli::names::Image;
use crate::cli::retry::retried;
use crate::cli::{Connection, Failure, amounts, json, parse_env, print_json};

#[derive(Debug, Args)]
pub(in crate::cli) struct Launch {
    #[command(flatten)]
    image: Image,
    /// How many vCPUs it has at first; 1 where not given
    #[arg(long, default_value_t = 0, hide_default_value = true)]
    vcpus: u32,
    /// What all its vCPUs may use together at first, as `500m` or `1.5`; all of them where not given
    #[arg(long, value_parser = amounts::parse_cpu, default_value = "0", hide_default_value = true)]
    cpu: u32,
    /// Its memory at first, as `512MiB` or `2GiB`; 512MiB where not given
    #[arg(long, value_parser = amounts::parse_memory, default_value = "0", hide_default_value = true)]
    memory: u32,
    /// The most vCPUs that it may ever have; four times as many as at first where not given, as far as the host has them
    #[arg(long, value_name = "VCPUS")]
    max_vcpus: Option<u32>,
    /// The most CPU that it may ever have; all of its vCPUs where not given
    #[arg(long, value_name = "CPU", value_parser = amounts::parse_cpu)]
    max_cpu: Option<u32>,
    /// The most memory that it may ever have; four times as much as at first where not given, as far as the host has it
    #[arg(long, value_name = "MEMORY", value_parser = amounts::parse_memory)]
    max_memory: Option<u32>,
    /// When it grows or shrinks, as 'cpu_use > 80% for 10s: vcpus +1, at most 4, every 60s'; may be given again
    #[arg(long = "threshold", value_name = "SPEC", value_parser = threshold::parse)]
    thresholds: Vec<v1::Threshold>,
    /// An environment variable beside the image's, NAME=VALUE; may be given again
    #[arg(long = "env", value_name = "NAME=VALUE", value_parser = parse_env)]
    environment: Vec<(String, String)>,
    /// The program in place of the image's entrypoint; the image's command does not count then
    #[arg(long, value_name = "PROGRAM")]
    entrypoint: Option<String>,
    /// What it may write, as `512MiB` or `2GiB`
    #[arg(long, value_name = "SIZE", value_parser = amounts::parse_memory, default_value = "0", hide_default_value = true)]
    scratch: u32,
    /// What becomes of it without credits (administrators only); as the agent is configured where not given
    #[arg(long)]
    mode: Option<GivenMode>,
    /// Makes trying again safe: the same id is answered with the same machine
    #[arg(long)]
    request_id: Option<String>,
    /// The command in place of the image's: what its entrypoint is given
    #[arg(last = true)]
    command: Vec<String>,
}

pub(super) async fn run(connection: &Connection, launch: Launch) -> Result<(), Failure> {
    let request = launch.request()?;
    let client = client(connection).await?;
    let attempt = async || {
        let launched = client.clone().launch_machine(request.clone()).await;
        Ok::<_, Failure>(launched?.into_inner())
    };
    let machine = retried(attempt).await?;
    if connection.json {
        print_json(&json("Machine", &machine)?);
    } else {
        show::show(&machine, &[]);
    }
    Ok(())
}

// === impl Launch ===

impl Launch {
    fn request(self) -> Result<v1::LaunchMachineRequest, Failure> {
        let image = self.image.name()?;
        // Of an image that is not named as it should be the agent says so.
        let parent = image
            .split_once("/images/")
            .map_or("", |(account, _)| account)
            .to_owned();
        let has_most = self.max_vcpus.is_some() || self.max_cpu.is_some() || self.max_memory.is_some();
        Ok(v1::LaunchMachineRequest {
            parent,
            image,
            size: Some(v1::MachineSize {
                vcpus: self.vcpus,
                cpu_millis: self.cpu,
                memory_mib: self.memory,
            }),
            ceiling: has_most.then(|| v1::MachineSize {
                vcpus: self.max_vcpus.unwrap_or_default(),
                cpu_millis: self.max_cpu.unwrap_or_default(),
                memory_mib: self.max_memory.unwrap_or_default(),
            }),
            thresholds: self.thresholds,
            entrypoint: self.entrypoint.into_iter().collect(),
            command: self.command,
            environment: self.environment.into_iter().collect(),
            scratch_mib: self.scratch,
            request_id: self.request_id.unwrap_or_else(|| ulid::Ulid::generate().to_string()),
            mode: self.mode.map_or(0, |mode| v1::machine_credits::Mode::from(mode).into()),
        })
    }
}
