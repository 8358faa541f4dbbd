//! The sentences for what goes wrong at a hub, with what to do.

use std::io::{self, ErrorKind};

use anyhow::anyhow;

use super::http_error::HttpError;
use super::{Hub, RepoKind};

impl Hub<'_> {
    /// The error of a failed request. Where the same request may work later, its cause is an [`io::Error`] of a kind that passes.
    pub(super) fn explain(
        &self,
        kind: RepoKind,
        repo: &str,
        revision: &str,
        file: Option<&str>,
        failure: &HttpError,
    ) -> anyhow::Error {
        let error = self.sentence(kind, repo, revision, file, failure);
        if failure.is_transient() {
            io::Error::new(ErrorKind::TimedOut, error.to_string()).into()
        } else {
            error
        }
    }

    /// The sentence for a failed request.
    fn sentence(
        &self,
        kind: RepoKind,
        repo: &str,
        revision: &str,
        file: Option<&str>,
        failure: &HttpError,
    ) -> anyhow::Error {
        let endpoint = &self.endpoint.address;
        let noun = kind.noun();
        let page = format!("{endpoint}/{}", kind.page(repo));
        let what = match file {
            Some(file) => format!("`{file}` of the {noun} `{repo}`"),
            None => format!("the {noun} `{repo}`"),
        };
        let login = if self.settings.token_withheld {
            "unset `HF_HUB_DISABLE_IMPLICIT_TOKEN`, which keeps your token back"
        } else {
            "set `HF_TOKEN` or log in with `pipeline login`"
        };
        let (status, code, says, wait) = match failure {
            HttpError::Connection(reason) => {
                return anyhow!(
                    "could not fetch {what} from {endpoint}: {reason}; check the network and `HF_ENDPOINT`, or use `--offline`"
                );
            }
            HttpError::Certificate(reason) => {
                return anyhow!("could not fetch {what} from {endpoint}: {reason}");
            }
            HttpError::Malformed(reason) => {
                return anyhow!(
                    "could not fetch {what} from {endpoint}: {reason}; is `HF_ENDPOINT` the address of a hub?"
                );
            }
            HttpError::Status {
                status,
                code,
                says,
                wait,
            } => (
                *status,
                code.as_deref().unwrap_or_default(),
                says.as_deref().map(|says| self.http.quotable(says)),
                *wait,
            ),
        };
        let token = self.http.has_token();
        match (status, code) {
            (401, _) if self.endpoint.login.is_some() && code.is_empty() => anyhow!(
                "{endpoint} refuses the name and password of `HF_ENDPOINT` for {what} ({status})"
            ),
            (401 | 403, "GatedRepo") if !token => anyhow!(
                "{what} is gated ({status}): accept its licence at {page}, then {login} with the same account"
            ),
            (401, _) if !token => anyhow!(
                "{endpoint} shows {what} to nobody without a token ({status}): it is private or gated, or there is no `{repo}`; {login}"
            ),
            (401, "RepoNotFound") => anyhow!(
                "{endpoint} has no {noun} `{repo}` that this token may see ({status}): check its spelling, or use a token of an \
                 account that may read it"
            ),
            (401, "") => anyhow!(
                "{endpoint} refuses the token for {what} ({status}): it is wrong or has expired; {login}"
            ),
            (401 | 403, "GatedRepo") => anyhow!(
                "this account may not read {what} ({status}): accept its licence at {page} with the account that the token belongs \
                 to, and let the token read gated repositories"
            ),
            (401 | 403, _) => match says {
                Some(says) => anyhow!("{endpoint} refuses {what} ({status}): \"{says}\""),
                None => anyhow!(
                    "{endpoint} refuses {what} ({status}); if it is gated or private, accept its licence at {page} and {login}"
                ),
            },
            (404, "RevisionNotFound") => {
                anyhow!("the {noun} `{repo}` at {endpoint} has no revision `{revision}` (404)")
            }
            (404, _) => anyhow!(
                "{endpoint} has no {what} at revision `{revision}` (404): check both names; a private repository answers the same \
                 without a token"
            ),
            (429, _) => {
                let while_ = wait.map_or_else(
                    || "a while".to_owned(),
                    |wait| format!("{} seconds, as it asks for", wait.as_secs()),
                );
                let more = if token {
                    String::new()
                } else {
                    format!("; with an account one may ask more often: {login}")
                };
                anyhow!(
                    "{endpoint} lets nobody ask so often (429) for {what}; wait {while_}, then run again{more}"
                )
            }
            _ => match says {
                Some(says) => {
                    anyhow!("{endpoint} failed with status {status} for {what}: \"{says}\"")
                }
                None => anyhow!("{endpoint} failed with status {status} for {what}"),
            },
        }
    }
}
