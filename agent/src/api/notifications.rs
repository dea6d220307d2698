//! The `Notifications` service.

use stoker_proto::v1;
use stoker_proto::v1::notifications_server;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tokio_util::sync::CancellationToken;
use tonic::{Request, Response, Status};

use super::errors::{database, invalid};
use super::page;
use crate::host::{HostHandle, sequence_of};
use crate::names::{AccountName, FunctionName};
use crate::store::{NotificationFilter, Store, StoredNotification};

/// Tells accounts of the amounts of their functions.
#[derive(Debug)]
pub struct Notifications {
    store: Store,
    host: HostHandle,
    stop: CancellationToken,
}

type Sender = mpsc::Sender<Result<v1::Notification, Status>>;

// === impl Notifications ===

impl Notifications {
    /// A service over what is kept and what this host tells; its streams end when `stop` is cancelled.
    pub fn new(store: Store, host: HostHandle, stop: CancellationToken) -> Self {
        Self { store, host, stop }
    }
}

#[tonic::async_trait]
impl notifications_server::Notifications for Notifications {
    async fn list_notifications(
        &self,
        request: Request<v1::ListNotificationsRequest>,
    ) -> Result<Response<v1::ListNotificationsResponse>, Status> {
        let request = request.into_inner();
        let (size, filter) = (page::size(request.page_size)?, filter(&request.parent)?);
        let before = page::number(&request.page_token)?;
        let listed = self.store.notifications(filter, 0, before, size + 1).await;
        let (notifications, next_page_token) = page::numbered(listed.map_err(|error| database(&error))?, size);
        Ok(Response::new(v1::ListNotificationsResponse {
            notifications,
            next_page_token,
        }))
    }

    type WatchNotificationsStream = ReceiverStream<Result<v1::Notification, Status>>;

    async fn watch_notifications(
        &self,
        request: Request<v1::WatchNotificationsRequest>,
    ) -> Result<Response<Self::WatchNotificationsStream>, Status> {
        let request = request.into_inner();
        let filter = filter(&request.parent)?;
        let after = match request.after.as_str() {
            "" => None,
            name => Some(sequence_of(name).ok_or_else(|| {
                invalid(
                    "after",
                    "must be of the form `accounts/{account}/notifications/{notification}`",
                )
            })?),
        };
        // Before it is looked what there was: so none is missed between the two.
        let mut comes = self.host.watch_notifications();
        let earlier = match after {
            Some(after) => self.store.notifications(filter.clone(), after, None, usize::MAX).await,
            None => Ok(Vec::new()),
        };
        let earlier = earlier.map_err(|error| database(&error))?;
        let (to, stream) = mpsc::channel(1);
        let stop = self.stop.clone();
        tokio::spawn(async move {
            let watching = async {
                let mut last = after.unwrap_or(0);
                for (sequence, notification) in earlier.into_iter().rev() {
                    last = sequence;
                    if to.send(Ok(notification)).await.is_err() {
                        return;
                    }
                }
                loop {
                    match comes.recv().await {
                        Ok(told) if told.sequence > last && is_for(&filter, &told) => {
                            last = told.sequence;
                            if to.send(Ok(told.notification)).await.is_err() {
                                return;
                            }
                        }
                        Ok(_) => {}
                        Err(RecvError::Lagged(_)) => return too_slow(&to).await,
                        Err(RecvError::Closed) => return,
                    }
                }
            };
            tokio::select! {
                () = watching => {}
                () = to.closed() => {}
                () = stop.cancelled() => {}
            }
        });
        Ok(Response::new(ReceiverStream::new(stream)))
    }
}

async fn too_slow(to: &Sender) {
    let message = "notifications are not read as fast as they come; go on `after` the last one";
    // A caller that has left hears nothing.
    let _ = to.send(Err(Status::aborted(message))).await;
}

fn is_for(filter: &NotificationFilter, told: &StoredNotification) -> bool {
    let is = |wanted: &Option<String>, has: &str| wanted.as_deref().is_none_or(|wanted| wanted == has);
    is(&filter.account, told.function.account()) && is(&filter.function, told.function.function())
}

/// Whom a parent names.
fn filter(parent: &str) -> Result<NotificationFilter, Status> {
    if parent == "accounts/-" {
        return Ok(NotificationFilter::default());
    }
    if let Ok(account) = parent.parse::<AccountName>() {
        return Ok(NotificationFilter {
            account: Some(account.account().to_owned()),
            function: None,
        });
    }
    match parent.parse::<FunctionName>() {
        Ok(name) => Ok(NotificationFilter {
            account: Some(name.account().to_owned()),
            function: Some(name.function().to_owned()),
        }),
        Err(_) => Err(invalid(
            "parent",
            "must be `accounts/{account}`, `accounts/-` or `accounts/{account}/functions/{function}`",
        )),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_parent_is_an_account_all_or_a_function() {
        let of = |parent: &str| filter(parent).map(|filter| (filter.account, filter.function));
        let text = |text: &str| Some(text.to_owned());
        assert_eq!(of("accounts/-").unwrap(), (None, None));
        assert_eq!(of("accounts/acme").unwrap(), (text("acme"), None));
        assert_eq!(of("accounts/acme/functions/f").unwrap(), (text("acme"), text("f")));
        for wrong in ["", "acme", "accounts/", "accounts/-/functions/f", "machines/x"] {
            assert!(filter(wrong).is_err(), "{wrong}");
        }
    }

    #[test]
    fn who_watches_one_function_hears_of_no_other() {
        let told = |name: &str| StoredNotification {
            uid: ulid::Ulid(1),
            function: name.parse().unwrap(),
            sequence: 1,
            notification: v1::Notification::default(),
        };
        let hears = |parent: &str, name: &str| is_for(&filter(parent).unwrap(), &told(name));
        let (a, other) = ("accounts/acme/functions/a", "accounts/other/functions/a");
        assert!(hears("accounts/-", a) && hears("accounts/acme", a) && hears(a, a));
        assert!(!hears("accounts/other", a) && !hears(other, a) && !hears("accounts/acme/functions/b", a));
    }
}
