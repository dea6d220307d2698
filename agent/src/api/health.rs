//! What the agent can do at the moment, and which services that lets serve (gRPC health).

use stoker_proto::v1;

/// What the agent can do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Health {
    /// The event loop and the database's thread answer.
    pub answers: bool,
    /// The database can be written.
    pub writable: bool,
    /// Machines boot: not time and again the last ones of a runtime have failed to.
    pub boots: bool,
}

// === impl Health ===

impl Health {
    /// All that there is.
    pub const GOOD: Self = Self {
        answers: true,
        writable: true,
        boots: true,
    };

    /// Nothing.
    pub const NONE: Self = Self {
        answers: false,
        writable: false,
        boots: false,
    };

    /// Whether a service serves by that; the empty name stands for the agent as a whole.
    #[must_use]
    pub fn serves(self, service: &str) -> bool {
        let Self {
            answers,
            writable,
            boots,
        } = self;
        match service {
            "" => answers && writable && boots,
            v1::functions_server::SERVICE_NAME => answers && writable,
            v1::invocations_server::SERVICE_NAME => answers && boots,
            _ => answers,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_service_depends_on_what_it_needs() {
        let names = ["", "stoker.v1.Functions", "stoker.v1.Invocations", "stoker.v1.Machines"];
        let serve = |health: Health| names.map(|name| health.serves(name));
        assert_eq!(serve(Health::GOOD), [true; 4]);
        assert_eq!(serve(Health::NONE), [false; 4]);
        let unwritable = Health {
            writable: false,
            ..Health::GOOD
        };
        assert_eq!(serve(unwritable), [false, false, true, true]);
        let unbootable = Health {
            boots: false,
            ..Health::GOOD
        };
        assert_eq!(serve(unbootable), [false, true, false, true]);
        let silent = Health {
            answers: false,
            ..Health::GOOD
        };
        assert_eq!(serve(silent), [false; 4]);
    }
}
