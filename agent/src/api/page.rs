//! Lists come in pages: of so many entries, and of so many bytes that every client takes them.

use std::str::FromStr;

use prost::Message;
use tonic::Status;

use super::errors::{Violations, invalid};
use crate::names::{AccountName, FunctionName, ImageName};

/// Entries of a page where the caller does not say.
const PAGE: usize = 100;

/// The most entries of a page.
const MAX_PAGE: usize = 1000;

/// The most bytes of a page's entries: a gRPC client takes messages of 4 MiB unless it is told otherwise.
const MAX_BYTES: usize = 3 << 20;

/// Bytes of a message around each entry: its tag and length.
const AROUND: usize = 6;

/// What of a list is asked for, whose entries are accounts' own.
pub(super) struct Page<N> {
    /// None for those of all.
    pub(super) account: Option<AccountName>,
    /// The last entry of the page before, which is what a page token names.
    pub(super) after: Option<N>,
    pub(super) size: usize,
}

/// What an account owns.
pub(super) trait Owned: FromStr {
    /// The account's id.
    fn account(&self) -> &str;
}

impl Owned for FunctionName {
    fn account(&self) -> &str {
        self.account()
    }
}

impl Owned for ImageName {
    fn account(&self) -> &str {
        self.account()
    }
}

impl<N: Owned> Page<N> {
    /// Of a parent, `accounts/{account}` or `accounts/-`, a page size and a token, as list calls have them.
    ///
    /// # Errors
    /// INVALID_ARGUMENT for what is wrong with them.
    pub(super) fn of(parent: &str, page_size: i32, page_token: &str) -> Result<Self, Status> {
        let mut violations = Violations::default();
        let account = match parent {
            "accounts/-" => None,
            parent => match parent.parse::<AccountName>() {
                Ok(name) => Some(name),
                Err(error) => {
                    violations.add("parent", format!("{error}; `accounts/-` lists those of all"));
                    None
                }
            },
        };
        let size = size(page_size)?;
        let after = match page_token {
            "" => None,
            token => {
                let name = token.parse::<N>().ok();
                let fits = name
                    .as_ref()
                    .is_some_and(|name| account.as_ref().is_none_or(|a| a.account() == name.account()));
                if !fits {
                    violations.add("page_token", "is not one that the list of this parent gave");
                }
                name
            }
        };
        violations.check()?;
        Ok(Self { account, after, size })
    }
}

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
pub(super) fn of<T: Message>(
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
    let next = cut(&mut all, size).then(|| all.last().map(|last| name(last).clone()));
    Ok((all, next.flatten().unwrap_or_default()))
}

/// The number that a token names: entries before it are on the page, and all where it is empty.
///
/// # Errors
/// INVALID_ARGUMENT for a token that is not one of these.
pub(super) fn number(token: &str) -> Result<Option<u64>, Status> {
    match token {
        "" => Ok(None),
        token => match token.parse() {
            Ok(number) => Ok(Some(number)),
            Err(_) => Err(invalid("page_token", "is not one that this list gave")),
        },
    }
}

/// A page of at most `size` of these entries, each with its number, and the token of the next.
pub(super) fn numbered<T: Message>(all: Vec<(u64, T)>, size: usize) -> (Vec<T>, String) {
    let (numbers, mut entries): (Vec<_>, Vec<_>) = all.into_iter().unzip();
    let more = cut(&mut entries, size);
    let last = entries.len().checked_sub(1).and_then(|last| numbers.get(last));
    let token = last.filter(|_| more).map(u64::to_string).unwrap_or_default();
    (entries, token)
}

/// Cuts a list to what fits on a page of at most `size` entries; says whether there is more.
pub(super) fn cut<T: Message>(all: &mut Vec<T>, size: usize) -> bool {
    let fits = fitting(all.get(..size).unwrap_or(all));
    let more = fits < all.len();
    all.truncate(fits);
    more
}

/// All entries, in as many pages as it takes; an empty one where there are none.
pub(super) fn pages<T: Message>(mut all: Vec<T>) -> Vec<Vec<T>> {
    let mut pages = Vec::new();
    loop {
        let rest = all.split_off(fitting(&all));
        pages.push(all);
        if rest.is_empty() {
            return pages;
        }
        all = rest;
    }
}

/// How many of these entries fit on a page: one at least, where there is one.
fn fitting<T: Message>(entries: &[T]) -> usize {
    let mut bytes = 0;
    let fit = entries.iter().take_while(|entry| {
        bytes += entry.encoded_len() + AROUND;
        bytes <= MAX_BYTES
    });
    fit.count().max(1).min(entries.len())
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
    fn pages_have_so_many_bytes_that_every_client_takes_them() {
        let large = |n: usize| format!("{n:04}{}", "x".repeat(4092));
        let all: Vec<String> = (0..1000).map(large).collect();
        let (first, token) = of(all.clone(), 1000, "", "", |name| name).unwrap();
        let bytes: usize = first.iter().map(|entry| entry.len() + AROUND).sum();
        assert!(bytes <= MAX_BYTES && bytes + 4200 > MAX_BYTES, "{bytes}");
        let (second, end) = of(all.clone(), 1000, &token, "", |name| name).unwrap();
        assert_eq!((first.len() + second.len(), end), (1000, String::new()));
        let in_pages = pages(all.clone());
        assert_eq!(in_pages.len(), 2);
        assert_eq!(in_pages.concat(), all);
        assert_eq!(pages(Vec::<String>::new()), [Vec::<String>::new()]);
        // What fits on no page has one of its own.
        let huge = vec!["x".repeat(MAX_BYTES + 1), "y".to_owned()];
        assert_eq!(pages(huge.clone()).concat(), huge);
        let (page, token) = of(huge.clone(), 1000, "", "", |name| name).unwrap();
        assert_eq!((page, token), (vec![huge[0].clone()], huge[0].clone()));
    }

    #[test]
    fn numbered_pages_go_on_where_the_one_before_ended() {
        let all: Vec<(u64, String)> = [9, 7, 3].map(|number| (number, number.to_string())).into();
        let (page, token) = numbered(all.clone(), 2);
        assert_eq!(
            (page, number(&token).unwrap()),
            (vec!["9".to_owned(), "7".to_owned()], Some(7))
        );
        assert_eq!(numbered(all, 3).1, "");
        assert_eq!(numbered(Vec::<(u64, String)>::new(), 3), (Vec::new(), String::new()));
        assert_eq!(number("").unwrap(), None);
        assert!(number("x").is_err());
    }

    #[test]
    fn page_sizes_have_a_range() {
        assert_eq!(size(0).unwrap(), PAGE);
        assert_eq!(size(i32::MAX).unwrap(), MAX_PAGE);
        assert!(size(-1).is_err());
    }
}
