//! `stoker machine` beside an agent whose machines are made up.

mod exec;
mod forward;

use serde_json::Value;
use stoker_proto::v1;

use crate::fake::{Fake, MACHINE, size, threshold};
use crate::programs::stoker;

#[tokio::test]
async fn a_machine_is_launched_as_the_command_line_says() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, serving) = Fake::serve(dir.path());
    let args = [
        "machine",
        "launch",
        "web",
        "--account",
        "acme",
        "--vcpus",
        "2",
        "--cpu",
        "1.5",
        "--memory",
        "1GiB",
        "--max-vcpus",
        "4",
        "--threshold",
        "cpu_use > 80% for 10s: vcpus +1, at most 4, every 60s",
        "--threshold",
        "cpu_use < 20%: vcpus -1",
        "--env",
        "A=b=c",
        "--entrypoint",
        "/bin/serve",
        "--scratch",
        "512MiB",
        "--mode",
        "unlimited",
        "--",
        "-v",
        "--port=80",
    ];
    let launched = stoker(dir.path(), &args).await;
    assert_eq!(launched.code, 0, "{}", launched.err);
    for says in [
        MACHINE,
        "accounts/acme/images/web",
        "2 vCPUs, 1024 MiB",
        "1  cpu_use > 80% for 10s: vcpus +1, at most 4, every 1m",
        "2  cpu_use < 20%: vcpus -1",
    ] {
        assert!(launched.out.contains(says), "{says}: {}", launched.out);
    }
    {
        // It was asked for again, as the same.
        let heard = fake.heard();
        assert_eq!(heard.launches.len(), 2);
        assert_eq!(heard.launches[0], heard.launches[1]);
        let asked = &heard.launches[0];
        assert_eq!(
            (asked.parent.as_str(), asked.image.as_str()),
            ("accounts/acme", "accounts/acme/images/web")
        );
        let given = v1::MachineSize {
            cpu_millis: 1500,
            ..size(2, 1024).unwrap()
        };
        assert_eq!(asked.size, Some(given));
        let most = v1::MachineSize {
            vcpus: 4,
            ..Default::default()
        };
        assert_eq!(asked.ceiling, Some(most));
        assert_eq!(asked.entrypoint, ["/bin/serve"]);
        assert_eq!(asked.command, ["-v", "--port=80"]);
        assert_eq!(asked.environment["A"], "b=c");
        assert_eq!(
            (asked.scratch_mib, asked.mode()),
            (512, v1::machine_credits::Mode::Unlimited)
        );
        assert_eq!(asked.request_id.len(), 26);
    }
    let plain = stoker(dir.path(), &["--json", "machine", "launch", "accounts/acme/images/web"]).await;
    let machine: Value = serde_json::from_str(&plain.out).unwrap();
    assert_eq!(machine["name"], MACHINE);
    {
        let heard = fake.heard();
        let asked = heard.launches.last().unwrap();
        assert_eq!((asked.parent.as_str(), asked.ceiling), ("accounts/acme", None));
        assert_eq!(asked.size, Some(v1::MachineSize::default()));
        assert!(asked.command.is_empty() && asked.entrypoint.is_empty());
    }
    serving.abort();
}

#[tokio::test]
async fn a_threshold_that_is_written_wrongly_is_pointed_at() {
    let dir = tempfile::tempdir().unwrap();
    let args = ["machine", "launch", "web", "--threshold", "cpu_use > 80: vcpus +1"];
    let refused = stoker(dir.path(), &args).await;
    assert_eq!(refused.code, 2, "{}", refused.err);
    let says = "\"80\" is not a percentage, as `80%`\n  cpu_use > 80: vcpus +1\n            ^^\n";
    assert!(refused.err.contains(says), "{}", refused.err);
}

#[tokio::test]
async fn a_machine_is_shown_with_what_became_of_its_size() {
    let dir = tempfile::tempdir().unwrap();
    let (_fake, serving) = Fake::serve(dir.path());
    let shown = stoker(dir.path(), &["machine", "show", MACHINE]).await;
    assert_eq!(shown.code, 0, "{}", shown.err);
    for says in [
        "image    accounts/acme/images/web (sha256:77)",
        "at most  4 vCPUs, 2048 MiB",
        "measured cpu_use 25.0%",
        "history  of 10m ",
        "    CPU     asked  ▄",
        "TAKEN IN",
        "cpu_use was above 80% for 10.0 s",
    ] {
        assert!(shown.out.contains(says), "{says}: {}", shown.out);
    }
    // It was at half of what it is, and then twice that.
    let asked = shown.out.lines().find(|line| line.contains("CPU     asked")).unwrap();
    assert!(asked.contains("▄█") && asked.ends_with("  2.00"), "{asked}");
    let listed = stoker(dir.path(), &["machine", "list"]).await;
    assert!(
        listed.out.contains("active") && listed.out.contains("web"),
        "{}",
        listed.out
    );
    let unknown = stoker(dir.path(), &["machine", "get", "x"]).await;
    assert_eq!(unknown.code, 1);
    assert!(
        unknown.err.contains("there is no machine machines/x"),
        "{}",
        unknown.err
    );
    serving.abort();
}

#[tokio::test]
async fn a_machine_is_resized_goes_by_other_thresholds_and_is_stopped() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, serving) = Fake::serve(dir.path());
    let id = MACHINE.strip_prefix("machines/").unwrap();
    let args = [
        "machine",
        "resize",
        id,
        "--cpu",
        "500m",
        "--memory",
        "2GiB",
        "--timeout",
        "3s",
    ];
    let resized = stoker(dir.path(), &args).await;
    assert_eq!(
        resized.out, "from 1 vCPU, 1024 MiB to 2 vCPUs, 1024 MiB: taken in 1.00 s\n",
        "{}",
        resized.err
    );
    let asked = v1::ResizeMachineRequest {
        name: MACHINE.into(),
        size: Some(v1::MachineSize {
            vcpus: 0,
            cpu_millis: 500,
            memory_mib: 2048,
        }),
        timeout: Some(prost_types::Duration { seconds: 3, nanos: 0 }),
    };
    assert_eq!(fake.heard().resizes, [asked]);
    assert_eq!(stoker(dir.path(), &["machine", "resize", id]).await.code, 2);

    let thresholds = async |args: &[&str]| {
        let ran = stoker(dir.path(), &[&["machine", "thresholds"], args].concat()).await;
        (ran.code, ran.out + &ran.err)
    };
    let (up, down) = ("cpu_use > 80%: vcpus +1", "cpu_use < 20%: vcpus -1");
    assert_eq!(thresholds(&["set", id, up]).await, (0, format!(" 1  {up}\n")));
    let both = format!(" 1  {up}\n 2  {down}\n");
    assert_eq!(thresholds(&["set", id, "--add", down]).await, (0, both));
    let (code, refused) = thresholds(&["remove", id, "3"]).await;
    assert!(code == 2 && refused.contains("no threshold 3"), "{refused}");
    assert_eq!(thresholds(&["remove", id, "1"]).await, (0, format!(" 1  {down}\n")));
    assert_eq!(
        thresholds(&["remove", id, "--all"]).await,
        (0, "it goes by no thresholds\n".to_owned())
    );
    assert_eq!(thresholds(&["remove", id]).await.0, 2);

    // What others add meanwhile is not lost.
    let other = "memory_use > 90%: memory +256MiB";
    let meanwhile = || fake.heard().added = Some(threshold());
    meanwhile();
    let both = format!(" 1  {other}\n 2  {up}\n");
    assert_eq!(thresholds(&["set", id, "--add", up]).await, (0, both));
    meanwhile();
    let others = format!(" 1  {other}\n 2  {other}\n");
    assert_eq!(thresholds(&["remove", id, "2"]).await, (0, others));
    // Who replaces all of them has not read any.
    meanwhile();
    assert_eq!(thresholds(&["set", id, up]).await, (0, format!(" 1  {up}\n")));
    assert_eq!(thresholds(&["set", id]).await.0, 2);

    let stopped = stoker(dir.path(), &["machine", "stop", id, "--grace", "2s"]).await;
    assert_eq!(
        stopped.out,
        format!("{MACHINE}: stopped: user 0 asked\n"),
        "{}",
        stopped.err
    );
    let grace = Some(prost_types::Duration { seconds: 2, nanos: 0 });
    assert_eq!(fake.heard().stops[0].grace, grace);
    serving.abort();
}

#[tokio::test]
async fn what_its_program_wrote_is_shown() {
    let dir = tempfile::tempdir().unwrap();
    let (fake, serving) = Fake::serve(dir.path());
    let shown = stoker(dir.path(), &["machine", "logs", MACHINE, "-f", "-n", "10"]).await;
    assert_eq!(shown.out, "- - it serves\n", "{}", shown.err);
    let asked = v1::ReadLogsRequest {
        name: MACHINE.into(),
        last_lines: 10,
        follow: true,
        ..Default::default()
    };
    assert_eq!(fake.heard().logs, [asked]);
    serving.abort();
}
