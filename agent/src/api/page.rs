//! Lists come in pages.

use tonic::Status;

use super::errors::invalid;

/// Entries of a page where the caller does not say.
const PAGE: usize = 100;

/// The most entries of a page.
const MAX_PAGE: usize = 1000;

/// How many entries are asked for on a page: 100 where the caller does not say, and 1000 at most.
///
/// # Errors
/// INVALID_ARGUMENT for a negative number.
pub(super) fn size(given: i32) -> Result<usize, Status> {
    match usize::try_from(given) {
        Ok(0) => Ok(PAGE),
        Ok(size) => Ok(size.min(MAX_PAGE)),
        Err(_) => Err(invalid("page_size", "must not be negative")),
    }
}

/// The entries after the one that a token names, and the token of the next page; names begin with `within`. Entries are
/// in the order of their names, so nothing is shown twice or left out for what came or went between two calls.
///
/// # Errors
/// INVALID_ARGUMENT for a token that is not one of these.
pub(super) fn of<T>(
    mut all: Vec<T>,
    size: usize,
    token: &str,
    within: &str,
    name: impl Fn(&T) -> &String,
) -> Result<(Vec<T>, String), Status> {
    if !token.is_empty() {
        if !token.starts_with(within) {
            return Err(invalid("page_token", "is not one that the list of this parent gave"));
        }
        all.retain(|entry| name(entry).as_str() > token);
    }
    let more = all.len() > size;
    all.truncate(size);
    let next = all
        .last()
        .filter(|_| more)
        .map(|last| name(last).clone())
        .unwrap_or_default();
    Ok((all, next))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_follow_one_another() {
        let all: Vec<String> = (0..5).map(|n| format!("machines/{n}")).collect();
        let (mut seen, mut token) = (Vec::new(), String::new());
        loop {
            let (entries, next) = of(all.clone(), 2, &token, "machines/", |name| name).unwrap();
            assert!(entries.len() <= 2);
            seen.extend(entries);
            if next.is_empty() {
                break;
            }
            token = next;
        }
        assert_eq!(seen, all);
        assert!(of(all.clone(), 2, "rubbish", "machines/", |name| name).is_err());
        assert!(of(all, 2, "machines/1/containers/2", "machines/2/", |name| name).is_err());
    }

    #[test]
    fn page_sizes_have_a_range() {
        assert_eq!(size(0).unwrap(), PAGE);
        assert_eq!(size(i32::MAX).unwrap(), MAX_PAGE);
        assert!(size(-1).is_err());
    }
}
