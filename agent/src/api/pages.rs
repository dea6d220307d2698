//! Lists page by page.

use tonic::Status;

use super::errors::invalid;

/// Entries of a page where the caller does not say.
const PAGE: usize = 100;

/// The most entries of a page.
const MAX_PAGE: usize = 1000;

/// The most entries that a page is to have.
pub(super) fn page_size(given: i32) -> Result<usize, Status> {
    match usize::try_from(given) {
        Ok(0) => Ok(PAGE),
        Ok(size) => Ok(size.min(MAX_PAGE)),
        Err(_) => Err(invalid("page_size", "must not be negative")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn page_sizes_have_a_range() {
        assert_eq!(page_size(0).unwrap(), PAGE);
        assert_eq!(page_size(i32::MAX).unwrap(), MAX_PAGE);
        assert!(page_size(-1).is_err());
    }
}
