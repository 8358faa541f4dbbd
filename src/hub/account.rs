//! Who asks: the account that a token belongs to.

use anyhow::{Context as _, anyhow, bail, ensure};
use serde::{Deserialize, Serialize};
use ureq::http::Uri;

use super::Hub;
use super::http_error::HttpError;

/// The longest description of an account that is read, in bytes.
const MAX_ACCOUNT: u64 = 4 << 20;

/// An account of the hub, as `whoami-v2` tells it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Account {
    /// The name, as in `https://huggingface.co/NAME`.
    pub name: String,
    /// The organisations that it is a member of.
    pub organisations: Vec<String>,
    /// What the token is called there.
    pub token_name: Option<String>,
    /// What the token may do: `read`, `write` or `fineGrained`.
    pub role: Option<String>,
}

/// What asking for the account brought.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answered {
    /// The account of the token.
    Account(Account),
    /// The hub is there and does not know who asks: there is no token, or not one that it takes.
    Refused,
    /// Something is there that is no hub, or a mirror without accounts.
    NoAccounts,
}

#[derive(Deserialize)]
struct Whoami {
    name: String,
    #[serde(default)]
    orgs: Vec<Organisation>,
    #[serde(default)]
    auth: Option<Auth>,
}

#[derive(Deserialize)]
struct Organisation {
    name: String,
}

#[derive(Deserialize)]
struct Auth {
    #[serde(default, rename = "accessToken")]
    access_token: Option<AccessToken>,
}

#[derive(Deserialize)]
struct AccessToken {
    #[serde(default, rename = "displayName")]
    display_name: Option<String>,
    #[serde(default)]
    role: Option<String>,
}

impl Hub<'_> {
    /// Asks once who the token belongs to. An error where the hub can't be reached.
    pub fn ask_account(&self) -> anyhow::Result<Answered> {
        let endpoint = &self.endpoint.address;
        ensure!(
            !self.settings.offline,
            "`--offline` or `HF_HUB_OFFLINE` forbids to ask the hub"
        );
        let address = format!("{endpoint}/api/whoami-v2");
        let uri: Uri = address
            .parse()
            .with_context(|| format!("`{address}` is no address"))?;
        match self.http.read::<Whoami>(&uri, &mut MAX_ACCOUNT.clone()) {
            Ok((whoami, _)) => {
                let token = whoami.auth.and_then(|auth| auth.access_token);
                let (token_name, role) =
                    token.map_or((None, None), |token| (token.display_name, token.role));
                Ok(Answered::Account(Account {
                    name: whoami.name,
                    organisations: whoami.orgs.into_iter().map(|org| org.name).collect(),
                    token_name: token_name.filter(|name| !name.is_empty()),
                    role,
                }))
            }
            Err(HttpError::Status { status: 401, .. }) => Ok(Answered::Refused),
            Err(HttpError::Status { status: 404, .. } | HttpError::Malformed(_)) => {
                Ok(Answered::NoAccounts)
            }
            Err(HttpError::Status { status, .. }) => {
                bail!("{endpoint} answers with status {status}")
            }
            Err(HttpError::Connection(why) | HttpError::Certificate(why)) => Err(anyhow!(
                "could not reach {endpoint}: {why}; check the network, the proxy and `HF_ENDPOINT`"
            )),
        }
    }

    /// The account that the token belongs to.
    pub fn account(&self) -> anyhow::Result<Account> {
        let endpoint = &self.endpoint.address;
        match self.ask_account()? {
            Answered::Account(account) => Ok(account),
            Answered::Refused => {
                bail!("{endpoint} does not know this token; make one at {endpoint}/settings/tokens")
            }
            Answered::NoAccounts => bail!(
                "{endpoint} has no accounts; is `HF_ENDPOINT` the address of a mirror? A token for it goes into `HF_TOKEN`"
            ),
        }
    }

    /// The address of the hub, without a name and a password.
    pub fn endpoint_address(&self) -> &str {
        &self.endpoint.address
    }
}
