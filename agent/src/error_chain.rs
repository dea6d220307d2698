//! What an error came from.

use std::error::Error;
use std::iter::successors;

/// The error and all that caused it, in one line.
pub fn whole(error: &(dyn Error + 'static)) -> String {
    let chain = successors(Some(error), |&error| error.source()).map(ToString::to_string);
    chain.collect::<Vec<_>>().join(": ")
}

/// What caused it in the first place, as what the transport hides behind "transport error".
pub fn innermost(error: &(dyn Error + 'static)) -> String {
    successors(Some(error), |&error| error.source())
        .last()
        .map_or_else(String::new, ToString::to_string)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("can't read it")]
    struct Outer(#[source] std::io::Error);

    #[test]
    fn causes_are_told() {
        let error = Outer(std::io::Error::other("the disk is gone"));
        assert_eq!(whole(&error), "can't read it: the disk is gone");
        assert_eq!(innermost(&error), "the disk is gone");
        assert_eq!(innermost(&std::io::Error::other("alone")), "alone");
    }
}
