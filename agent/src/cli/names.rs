//! Names as people give them: in full, or short within an account.

use clap::Args;

use super::Failure;
use super::settings::Settings;
use crate::names::{AccountName, NameError};

/// The variable that names the account in place of the user's settings.
pub(super) const VARIABLE: &str = "STOKER_ACCOUNT";

/// A function's name.
#[derive(Debug, Args)]
pub(super) struct Function {
    /// The function: its id, or accounts/ACCOUNT/functions/FUNCTION
    #[arg(value_name = "FUNCTION")]
    given: String,
    #[command(flatten)]
    account: Account,
}

/// An image's name.
#[derive(Debug, Args)]
pub(super) struct Image {
    /// The image: its id, or accounts/ACCOUNT/images/IMAGE
    #[arg(value_name = "IMAGE")]
    given: String,
    #[command(flatten)]
    account: Account,
}

/// The account that names are short in.
#[derive(Debug, Args)]
pub(super) struct Account {
    /// The account, by its id or as accounts/ACCOUNT; without it the one of `stoker account set-default`
    #[arg(long, env = VARIABLE, value_parser = parse)]
    account: Option<AccountName>,
}

// === impl Function ===

impl Function {
    /// The name in full. What is one already is the agent's to check.
    pub(super) fn name(&self) -> Result<String, Failure> {
        self.account.full("functions", "function", &self.given)
    }
}

// === impl Image ===

impl Image {
    /// The name in full. What is one already is the agent's to check.
    pub(super) fn name(&self) -> Result<String, Failure> {
        self.account.full("images", "image", &self.given)
    }
}

// === impl Account ===

impl Account {
    /// The account's id: as given, or as the user has set it.
    pub(super) fn id(&self) -> Result<Option<String>, Failure> {
        match &self.account {
            Some(account) => Ok(Some(account.account().to_owned())),
            None => Ok(Settings::read()?.account),
        }
    }

    /// The name in full of what an account owns. What is one already is the agent's to check.
    fn full(&self, collection: &str, kind: &str, given: &str) -> Result<String, Failure> {
        if given.contains('/') {
            return Ok(given.to_owned());
        }
        match self.id()? {
            Some(account) => Ok(format!("accounts/{account}/{collection}/{given}")),
            None => Err(Failure::local(format!(
                "it is not known whose {kind} {given:?} is: set your account by `stoker account set-default ACCOUNT`, \
                 name it by --account or {VARIABLE}, or give accounts/ACCOUNT/{collection}/{given}"
            ))),
        }
    }
}

/// An account by its id or its name.
pub(super) fn parse(given: &str) -> Result<AccountName, NameError> {
    match given.contains('/') {
        true => given.parse(),
        false => AccountName::new(given),
    }
}
