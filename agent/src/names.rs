//! Resource names, parsed once where they come in.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
pub use stoker_proto::runtimes::ALL as RUNTIMES;

/// Why a name was refused; says what a good one looks like.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not of the form the resource has.
    #[error("{given:?} is not of the form `{form}`")]
    Form {
        /// What came in, shortened.
        given: String,
        /// The form it should have.
        form: &'static str,
    },
    /// An id in it has characters or a length that ids don't have.
    #[error("the {what} id {given:?} must be 1 to 63 of a-z, 0-9 and `-`, beginning with a letter")]
    Id {
        /// `account`, `function` or `image`.
        what: &'static str,
        /// The id that came in, shortened.
        given: String,
    },
}

/// `accounts/{account}`: who owns functions, images and machines.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct AccountName(String);

/// `accounts/{account}/functions/{function}`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FunctionName {
    account: String,
    function: String,
}

/// `accounts/{account}/images/{image}`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageName {
    account: String,
    image: String,
}

// === impl AccountName ===

impl AccountName {
    /// The form of the name.
    pub const FORM: &'static str = "accounts/{account}";

    /// From an account id.
    ///
    /// # Errors
    ///
    /// [`NameError::Id`] for an id that breaks the rules.
    pub fn new(account: &str) -> Result<Self, NameError> {
        Ok(Self(id("account", account)?))
    }

    /// The account's id.
    pub fn account(&self) -> &str {
        &self.0
    }
}

impl FromStr for AccountName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        match name.strip_prefix("accounts/") {
            Some(account) if !account.contains('/') => Self::new(account),
            _ => Err(form(name, Self::FORM)),
        }
    }
}

impl fmt::Display for AccountName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "accounts/{}", self.0)
    }
}

// === impl FunctionName ===

impl FunctionName {
    /// The form of the name.
    pub const FORM: &'static str = "accounts/{account}/functions/{function}";

    /// From an account's and a function's id.
    ///
    /// # Errors
    ///
    /// [`NameError::Id`] for an id that breaks the rules.
    pub fn new(account: &str, function: &str) -> Result<Self, NameError> {
        Ok(Self {
            account: id("account", account)?,
            function: id("function", function)?,
        })
    }

    /// Comes before the name of every function of an account and after those of the accounts before it. No function has
    /// it: it bounds ranges.
    pub(crate) fn lower_bound(account: &AccountName) -> Self {
        Self {
            account: account.0.clone(),
            function: String::new(),
        }
    }

    /// The account's id.
    pub fn account(&self) -> &str {
        &self.account
    }

    /// The account's name.
    pub fn parent(&self) -> AccountName {
        AccountName(self.account.clone())
    }

    /// The function's id within its account.
    pub fn function(&self) -> &str {
        &self.function
    }
}

impl FromStr for FunctionName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        let (account, function) = in_account(name, "functions").ok_or_else(|| form(name, Self::FORM))?;
        Self::new(account, function)
    }
}

impl TryFrom<String> for FunctionName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        name.parse()
    }
}

impl From<FunctionName> for String {
    fn from(name: FunctionName) -> Self {
        name.to_string()
    }
}

impl fmt::Display for FunctionName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "accounts/{}/functions/{}", self.account, self.function)
    }
}

// === impl ImageName ===

impl ImageName {
    /// The form of the name.
    pub const FORM: &'static str = "accounts/{account}/images/{image}";

    /// From an account's and an image's id.
    ///
    /// # Errors
    ///
    /// [`NameError::Id`] for an id that breaks the rules.
    pub fn new(account: &str, image: &str) -> Result<Self, NameError> {
        Ok(Self {
            account: id("account", account)?,
            image: id("image", image)?,
        })
    }

    /// The account's id.
    pub fn account(&self) -> &str {
        &self.account
    }

    /// The image's id within its account.
    pub fn image(&self) -> &str {
        &self.image
    }
}

impl FromStr for ImageName {
    type Err = NameError;

    fn from_str(name: &str) -> Result<Self, NameError> {
        let (account, image) = in_account(name, "images").ok_or_else(|| form(name, Self::FORM))?;
        Self::new(account, image)
    }
}

impl TryFrom<String> for ImageName {
    type Error = NameError;

    fn try_from(name: String) -> Result<Self, NameError> {
        name.parse()
    }
}

impl From<ImageName> for String {
    fn from(name: ImageName) -> Self {
        name.to_string()
    }
}

impl fmt::Display for ImageName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "accounts/{}/images/{}", self.account, self.image)
    }
}

/// The account's id, and that of what it owns, of `accounts/{account}/{collection}/{id}`.
fn in_account<'a>(name: &'a str, collection: &str) -> Option<(&'a str, &'a str)> {
    let mut parts = name.split('/');
    match (parts.next(), parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some("accounts"), Some(account), Some(given), Some(id), None) if given == collection => Some((account, id)),
        _ => None,
    }
}

fn id(what: &'static str, given: &str) -> Result<String, NameError> {
    let good = (1..=63).contains(&given.len())
        && given.starts_with(|c: char| c.is_ascii_lowercase())
        && given
            .bytes()
            .all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if good {
        Ok(given.to_owned())
    } else {
        Err(NameError::Id {
            what,
            given: shorten(given),
        })
    }
}

fn form(given: &str, form: &'static str) -> NameError {
    NameError::Form {
        given: shorten(given),
        form,
    }
}

/// Keeps a caller's long rubbish out of messages and logs.
fn shorten(text: &str) -> String {
    const KEEP: usize = 80;
    match text.char_indices().nth(KEEP) {
        Some((end, _)) => format!("{}...", text.get(..end).unwrap_or_default()),
        None => text.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn good_names_come_back_as_they_were() {
        for name in ["accounts/a/functions/b", "accounts/acme-1/functions/thumb-nail-2"] {
            assert_eq!(name.parse::<FunctionName>().unwrap().to_string(), name);
        }
        let name: FunctionName = "accounts/acme/functions/resize".parse().unwrap();
        assert_eq!((name.account(), name.function()), ("acme", "resize"));
        let name: ImageName = "accounts/acme/images/web".parse().unwrap();
        assert_eq!((name.account(), name.image()), ("acme", "web"));
        assert_eq!(name.to_string(), "accounts/acme/images/web");
    }

    #[test]
    fn bad_names_are_refused() {
        let long = "a".repeat(64);
        for name in [
            "",
            "acme/resize",
            "accounts/acme",
            "accounts//functions/x",
            "accounts/acme/functions/",
            "accounts/Acme/functions/x",
            "accounts/acme/functions/1x",
            "accounts/acme/functions/x/versions/1",
            "accounts/acme/functions/../x",
            "accounts/acme/functions/ä",
            &format!("accounts/acme/functions/{long}"),
        ] {
            assert!(name.parse::<FunctionName>().is_err(), "{name}");
            let image = name.replace("/functions/", "/images/");
            assert!(image.parse::<ImageName>().is_err(), "{image}");
        }
        assert!("accounts/acme/functions/x".parse::<ImageName>().is_err());
    }

    proptest! {
        #[test]
        fn whatever_is_accepted_is_printed_the_same(name in "\\PC{0,100}") {
            if let Ok(parsed) = name.parse::<FunctionName>() {
                prop_assert_eq!(parsed.to_string(), name);
            }
        }

        #[test]
        fn every_valid_pair_is_accepted(account in "[a-z][a-z0-9-]{0,62}", function in "[a-z][a-z0-9-]{0,62}") {
            let name = format!("accounts/{account}/functions/{function}");
            prop_assert_eq!(name.parse::<FunctionName>().unwrap(), FunctionName::new(&account, &function).unwrap());
        }
    }
}
