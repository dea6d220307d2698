//! How amounts of functions are fitted to their use: `stoker function set-resizing`, `stoker function resize-history` and
//! `stoker notifications`.

use clap::{Args, ValueEnum};
use stoker_proto::v1;
use stoker_proto::v1::functions_client::FunctionsClient;
use stoker_proto::v1::notifications_client::NotificationsClient;

use super::amounts;
use super::names::{Account, Function};
use super::{Connection, Failure, PAGE_SIZE, all_pages, json, print_json};
use crate::render::{Table, age, notification, say, some_amount};

/// A name before that of any notification.
const FIRST: &str = "accounts/-/notifications/00000000000000000000000000";

/// What is done about an amount that does not fit.
#[derive(Clone, Copy, Debug, ValueEnum)]
pub(super) enum Mode {
    /// Nothing: executions are not looked at
    Off,
    /// The account is told
    Advise,
    /// The account is told, and later executions are given what is right
    Auto,
}

#[derive(Debug, Args)]
pub(super) struct SetResizing {
    #[command(flatten)]
    function: Function,
    /// What is done about an amount that does not fit
    #[arg(long, required_unless_present_any = ["least", "most", "thresholds", "as_account"])]
    mode: Option<Mode>,
    /// The least that is determined, as `100m,64MiB`
    #[arg(long, value_parser = amounts::parse)]
    least: Option<v1::Amount>,
    /// The most that is determined, as `6,10GiB`
    #[arg(long, value_parser = amounts::parse)]
    most: Option<v1::Amount>,
    /// When an amount does not fit, as `executions_down=50` or `cooldown_up=10s`; may be given again
    #[arg(long = "threshold", value_name = "NAME=VALUE", value_parser = parse_threshold)]
    thresholds: Vec<Threshold>,
    /// Go by what its account has, and forget what was set before
    #[arg(long, conflicts_with_all = ["mode", "least", "most", "thresholds"])]
    as_account: bool,
}

/// Shows what accounts were told of the amounts that their functions are given, the last of it at the end.
#[derive(Debug, Args)]
pub(super) struct Notifications {
    /// Those of one function: its id, or accounts/ACCOUNT/functions/FUNCTION
    #[arg(long)]
    function: Option<String>,
    #[command(flatten)]
    account: Account,
    /// Those of all accounts; so it is where no account is set
    #[arg(long, conflicts_with = "function")]
    all: bool,
    /// Go on with those that come
    #[arg(long, short)]
    follow: bool,
}

/// One threshold and its value.
#[derive(Clone, Copy, Debug)]
enum Threshold {
    Number(fn(&mut v1::ResizingThresholds) -> &mut Option<u32>, u32),
    Time(
        fn(&mut v1::ResizingThresholds) -> &mut Option<prost_types::Duration>,
        prost_types::Duration,
    ),
}

// === impl Mode ===

impl From<Mode> for v1::resizing::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Off => Self::Off,
            Mode::Advise => Self::Advise,
            Mode::Auto => Self::Auto,
        }
    }
}

impl Mode {
    /// What a function is created with.
    pub(super) fn resizing(self) -> v1::Resizing {
        v1::Resizing {
            mode: v1::resizing::Mode::from(self).into(),
            ..Default::default()
        }
    }
}

// === impl Threshold ===

impl Threshold {
    fn set(self, thresholds: &mut v1::ResizingThresholds) {
        match self {
            Self::Number(of, value) => *of(thresholds) = Some(value),
            Self::Time(of, value) => *of(thresholds) = Some(value),
        }
    }
}

fn parse_threshold(text: &str) -> Result<Threshold, String> {
    let (name, value) = text.split_once('=').ok_or("must be NAME=VALUE")?;
    let number = |of| match value.parse() {
        Ok(value) => Ok(Threshold::Number(of, value)),
        Err(_) => Err(format!("{value:?} is not a whole number")),
    };
    let time = |of| -> Result<Threshold, String> {
        let time = humantime::parse_duration(value).map_err(|error| error.to_string())?;
        let time: prost_types::Duration = time.try_into().map_err(|_| format!("{value:?} is too long"))?;
        Ok(Threshold::Time(of, time))
    };
    match name {
        "quantile_permille" => number(|t| &mut t.quantile_permille),
        "head_room_percent" => number(|t| &mut t.head_room_percent),
        "tight_percent" => number(|t| &mut t.tight_percent),
        "saves_percent" => number(|t| &mut t.saves_percent),
        "cheaper_percent" => number(|t| &mut t.cheaper_percent),
        "faster_percent" => number(|t| &mut t.faster_percent),
        "executions_up" => number(|t| &mut t.executions_up),
        "executions_down" => number(|t| &mut t.executions_down),
        "cooldown_up" => time(|t| &mut t.cooldown_up),
        "cooldown_down" => time(|t| &mut t.cooldown_down),
        _ => Err(format!(
            "{name:?} is no threshold; there are quantile_permille, head_room_percent, tight_percent, saves_percent, \
             cheaper_percent, faster_percent, executions_up, executions_down, cooldown_up and cooldown_down"
        )),
    }
}

/// What is not given stays as it is.
pub(super) async fn set(connection: &Connection, set: SetResizing) -> Result<v1::Function, Failure> {
    let name = set.function.name()?;
    let mut client = FunctionsClient::new(connection.channel().await?);
    let resizing = if set.as_account {
        None
    } else {
        let request = v1::GetFunctionRequest {
            name: name.clone(),
            ..Default::default()
        };
        let mut resizing = client
            .get_function(request)
            .await?
            .into_inner()
            .resizing
            .unwrap_or_default();
        if let Some(mode) = set.mode {
            resizing.set_mode(mode.into());
        }
        resizing.least = set.least.or(resizing.least);
        resizing.most = set.most.or(resizing.most);
        for threshold in set.thresholds {
            threshold.set(resizing.thresholds.get_or_insert_default());
        }
        Some(resizing)
    };
    let request = v1::SetResizingRequest { name, resizing };
    Ok(client.set_resizing(request).await?.into_inner())
}

/// What a function goes by, in a line.
pub(super) fn shown(resizing: Option<&v1::Resizing>) -> String {
    let Some(resizing) = resizing else {
        return "as its account has it".to_owned();
    };
    format!(
        "{}, from {} to {}",
        resizing.mode().as_str_name().to_lowercase(),
        some_amount(resizing.least.as_ref()),
        some_amount(resizing.most.as_ref())
    )
}

pub(super) async fn history(connection: &Connection, function: Function) -> Result<(), Failure> {
    let name = function.name()?;
    let mut client = FunctionsClient::new(connection.channel().await?);
    let mut resizes = all_pages(async |page_token| {
        let request = v1::ListFunctionResizesRequest {
            parent: name.clone(),
            page_size: PAGE_SIZE,
            page_token,
        };
        let page = client.list_function_resizes(request).await?.into_inner();
        Ok((page.resizes, page.next_page_token))
    })
    .await?;
    if connection.json {
        let all = v1::ListFunctionResizesResponse {
            resizes,
            next_page_token: String::new(),
        };
        print_json(&json("ListFunctionResizesResponse", &all)?);
        return Ok(());
    }
    if resizes.is_empty() {
        say!("{name} has what it was deployed with");
        return Ok(());
    }
    // As one reads: what came last is at the end.
    resizes.reverse();
    let mut table = Table::new(&[">AGO", ">VERSION", ">FROM", ">TO", "WHY"]);
    for resize in resizes {
        table.row([
            age(resize.time),
            resize.version.to_string(),
            some_amount(resize.before.as_ref()),
            some_amount(resize.after.as_ref()),
            resize.detail,
        ]);
    }
    table.print();
    Ok(())
}

pub(super) async fn notifications(connection: &Connection, args: Notifications) -> Result<(), Failure> {
    let parent = args.parent()?;
    let mut client = NotificationsClient::new(connection.channel().await?);
    let mut told = all_pages(async |page_token| {
        let request = v1::ListNotificationsRequest {
            parent: parent.clone(),
            page_size: PAGE_SIZE,
            page_token,
        };
        let page = client.list_notifications(request).await?.into_inner();
        Ok((page.notifications, page.next_page_token))
    })
    .await?;
    told.reverse();
    if connection.json && !args.follow {
        let all = v1::ListNotificationsResponse {
            notifications: told,
            next_page_token: String::new(),
        };
        print_json(&json("ListNotificationsResponse", &all)?);
        return Ok(());
    }
    if told.is_empty() && !args.follow {
        say!("no notifications of {parent}");
        return Ok(());
    }
    let say = |notification: &v1::Notification| -> Result<(), Failure> {
        match connection.json {
            // One line a message, for programs that read on.
            true => say!("{}", json("Notification", notification)?),
            false => say!("{}", line(notification)),
        }
        Ok(())
    };
    told.iter().try_for_each(say)?;
    if !args.follow {
        return Ok(());
    }
    let request = v1::WatchNotificationsRequest {
        parent,
        // Also what came since there was none.
        after: told.last().map_or_else(|| FIRST.to_owned(), |last| last.name.clone()),
    };
    let mut stream = client.watch_notifications(request).await?.into_inner();
    while let Some(notification) = stream.message().await? {
        say(&notification)?;
    }
    Ok(())
}

// === impl Notifications ===

impl Notifications {
    fn parent(&self) -> Result<String, Failure> {
        let account = || self.account.id();
        match &self.function {
            Some(name) if name.contains('/') => Ok(name.clone()),
            Some(name) => match account()? {
                Some(account) => Ok(format!("accounts/{account}/functions/{name}")),
                None => Err(Failure::local(format!(
                    "it is not known whose function {name:?} is: name its account by --account, or give \
                     accounts/ACCOUNT/functions/{name}"
                ))),
            },
            None if self.all => Ok("accounts/-".to_owned()),
            None => Ok(format!("accounts/{}", account()?.as_deref().unwrap_or("-"))),
        }
    }
}

/// When, about what, what to do, and why.
fn line(told: &v1::Notification) -> String {
    let time = told.create_time.map_or_else(|| "-".to_owned(), |time| time.to_string());
    let time = time.get(..19).unwrap_or(&time).replace('T', " ");
    format!("{time}  {}  {}: {}", told.function, notification(told), told.detail)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn thresholds_are_read_by_their_names() {
        let mut thresholds = v1::ResizingThresholds::default();
        for text in ["executions_down=50", "cooldown_up=1h", "tight_percent=80"] {
            parse_threshold(text).unwrap().set(&mut thresholds);
        }
        assert_eq!(
            (thresholds.executions_down, thresholds.tight_percent),
            (Some(50), Some(80))
        );
        assert_eq!(
            thresholds.cooldown_up,
            std::time::Duration::from_secs(3600).try_into().ok()
        );
        for wrong in [
            "executions_down",
            "executions_down=x",
            "executions_down=-1",
            "cooldown_up=1",
            "what=1",
        ] {
            assert!(parse_threshold(wrong).is_err(), "{wrong}");
        }
    }
}
