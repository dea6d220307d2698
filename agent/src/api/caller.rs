//! Who calls, as far as the kernel vouches for it.

use std::sync::Arc;

use tonic::{Request, Status};

use super::errors::denied;
use crate::pacing::Pace;

/// Who wants something, as decisions name them.
pub(super) fn who<T>(request: &Request<T>) -> Arc<str> {
    match user(request) {
        Some(user) => format!("user {user}").into(),
        None => "a caller over TCP".into(),
    }
}

/// Who may say what a machine's credits are, and what becomes of it without any: an administrator.
///
/// # Errors
/// PERMISSION_DENIED for all others.
pub(super) fn may_change_credits<T>(request: &Request<T>) -> Result<Arc<str>, Status> {
    administrator(request, "change machines' credits")
}

/// Who an administrator is: root, or whoever the agent runs as, over the Unix socket. `what` nobody else may do, as `change
/// machines' credits`.
///
/// # Errors
/// PERMISSION_DENIED for all others.
pub(super) fn administrator<T>(request: &Request<T>, what: &str) -> Result<Arc<str>, Status> {
    may(user(request), nix::unistd::geteuid().as_raw(), what)
}

fn user<T>(request: &Request<T>) -> Option<u32> {
    request.extensions().get::<Pace>().and_then(Pace::user)
}

fn may(user: Option<u32>, own: u32, what: &str) -> Result<Arc<str>, Status> {
    match user {
        Some(user) if user == 0 || user == own => Ok(format!("user {user}").into()),
        Some(user) => Err(denied(format!(
            "user {user} may not {what}: call as root, or as the agent's own user ({own})"
        ))),
        None => Err(denied(format!(
            "who calls over TCP may not {what}: call over the agent's Unix socket, as root or as the agent's own user"
        ))),
    }
}

#[cfg(test)]
mod tests {
    use tonic::Code;

    use super::*;

    #[test]
    fn root_and_the_agents_user_are_administrators() {
        let may = |user, own| may(user, own, "change machines' credits");
        assert_eq!(&*may(Some(0), 7).unwrap(), "user 0");
        assert_eq!(&*may(Some(7), 7).unwrap(), "user 7");
        for user in [Some(8), None] {
            let refused = may(user, 7).unwrap_err();
            assert_eq!(refused.code(), Code::PermissionDenied);
            assert!(refused.message().contains("change machines' credits"), "{refused}");
        }
    }
}
