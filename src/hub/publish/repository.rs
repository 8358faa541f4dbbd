//! The repository around the files: making it and its branches, what is in it, its card, and the sentences for refusals.

use anyhow::{Context as _, anyhow, ensure};
use serde::Deserialize;
use serde_json::{Value, json};
use ureq::http::Uri;

use super::{LONGEST_CARD, MAIN, NewFile};
use crate::hub::client::MAX_DESCRIPTION;
use crate::hub::http_error::HttpError;
use crate::hub::names::{check_repo, check_revision, escape, escape_revision};
use crate::hub::{Hub, RepoKind};

impl Hub<'_> {
    /// The licence that a model's card names, by the hub's own word for it; `None` where it names none or can't be asked for.
    pub fn license(&self, kind: RepoKind, repo: &str, revision: &str) -> Option<String> {
        if self.settings.offline {
            return None;
        }
        let card = self.describe(kind, repo, revision, "").ok()?.card?;
        let license = card.get("license")?.as_str()?;
        let plain = |c: char| c.is_ascii_alphanumeric() || "-._+".contains(c);
        (license.len() < 64 && license.chars().all(plain)).then(|| license.to_owned())
    }

    /// A file of a repository as it is now; `None` where there is none, or no such repository or revision.
    ///
    /// # Errors
    /// A hub that can't be asked.
    pub fn read_file(
        &self,
        kind: RepoKind,
        repo: &str,
        revision: &str,
        path: &str,
    ) -> anyhow::Result<Option<Vec<u8>>> {
        check_repo(repo)?;
        check_revision(revision)?;
        let address = format!(
            "{}/{}/resolve/{}/{}",
            self.endpoint.address,
            kind.page(repo),
            escape_revision(revision),
            escape(path)
        );
        let uri: Uri = address.parse()?;
        match self.persist(|| self.http.get(&uri, 0))? {
            Ok(mut reply) => {
                let body = reply.response.body_mut().with_config().limit(LONGEST_CARD);
                Ok(Some(body.read_to_vec()?))
            }
            Err(HttpError::Status { status: 404, .. }) => Ok(None),
            Err(HttpError::Status { status: 401, .. }) if self.http.has_token() => Ok(None),
            Err(failure) => Err(self.explain(kind, repo, revision, Some(path), &failure)),
        }
    }

    /// Whether something may be sent at all.
    ///
    /// # Errors
    /// The sentence of what forbids it.
    pub fn check_may_publish(&self) -> anyhow::Result<()> {
        let endpoint = &self.endpoint;
        ensure!(
            !self.settings.offline,
            "publishing needs the network, which `--offline` or `HF_HUB_OFFLINE` forbids"
        );
        ensure!(
            endpoint.origin.scheme == "https" || endpoint.origin.is_loopback(),
            "`HF_ENDPOINT` is {}, and nothing is published without encryption: your token would be everybody's; use an `https` address",
            endpoint.address
        );
        ensure!(
            self.http.has_token(),
            "publishing needs a token that may write: {}",
            if self.settings.token_withheld {
                "unset `HF_HUB_DISABLE_IMPLICIT_TOKEN`, which keeps yours back"
            } else {
                "set `HF_TOKEN`, or log in with `pipeline login`"
            }
        );
        Ok(())
    }

    pub(super) fn ask<T: serde::de::DeserializeOwned>(
        &self,
        address: &str,
        body: &Value,
    ) -> anyhow::Result<Result<T, HttpError>> {
        let uri: Uri = address
            .parse()
            .with_context(|| format!("`{address}` is no address"))?;
        let body = serde_json::to_vec(body)?;
        self.persist(|| self.http.post(&uri, "application/json", &body))
    }

    pub(super) fn make_repository(
        &self,
        kind: RepoKind,
        repo: &str,
        private: bool,
    ) -> anyhow::Result<()> {
        let noun = kind.noun();
        let (owner, name) = repo.split_once('/').context("there is no owner")?;
        let address = format!("{}/api/repos/create", self.endpoint.address);
        let mut wanted = json!({ "name": name, "organization": owner, "type": noun });
        if private {
            wanted["visibility"] = "private".into();
        }
        let made = self.ask::<Value>(&address, &wanted)?;
        match &made {
            Ok(_) | Err(HttpError::Status { status: 409, .. }) => {}
            // It may be there all the same, for a token that may write but not make repositories.
            Err(HttpError::Status {
                status: 401..=403, ..
            }) => {
                let there = self.persist(|| {
                    let uri = self.api(kind, repo, "revision", MAIN, "");
                    let uri = uri.map_err(|error| HttpError::Malformed(format!("{error:#}")))?;
                    self.http.read::<Value>(&uri, &mut MAX_DESCRIPTION.clone())
                })?;
                if there.is_err()
                    && let Err(failure) = &made
                {
                    return Err(self.explain_write(kind, repo, "making it", failure));
                }
            }
            Err(failure) => return Err(self.explain_write(kind, repo, "making it", failure)),
        }
        if private {
            // Nothing is sent before that is sure.
            let described = self.describe(kind, repo, MAIN, "")?;
            ensure!(
                described.private == Some(true),
                "the {noun} `{repo}` is open to everybody, and `private` is wanted; make it private in its settings at {}/{}/settings, \
                 or publish under another name",
                self.endpoint.address,
                kind.page(repo)
            );
        }
        Ok(())
    }

    pub(super) fn make_branch(
        &self,
        kind: RepoKind,
        repo: &str,
        branch: &str,
    ) -> anyhow::Result<()> {
        let address = format!(
            "{}/api/{}/{repo}/branch/{}",
            self.endpoint.address,
            kind.plural(),
            escape_revision(branch)
        );
        match self.ask::<Value>(&address, &json!({}))? {
            // Who may not make it need not: whether it is there is seen when files are announced.
            Ok(_)
            | Err(HttpError::Status {
                status: 403 | 409, ..
            }) => Ok(()),
            Err(failure) => {
                let doing = format!("making the branch `{branch}`");
                Err(self.explain_write(kind, repo, &doing, &failure))
            }
        }
    }

    /// Lets the hub look at the head of a card, before anything is sent.
    pub(super) fn check_card(&self, kind: RepoKind, card: &NewFile) -> anyhow::Result<()> {
        #[derive(Deserialize)]
        struct Found {
            #[serde(default)]
            errors: Vec<Mistake>,
        }
        #[derive(Deserialize)]
        struct Mistake {
            message: String,
        }
        let mut bytes = Vec::new();
        card.contents
            .part(0, LONGEST_CARD)?
            .read_to_end(&mut bytes)?;
        let content = String::from_utf8(bytes).context("`README.md` is not UTF-8")?;
        let address = format!("{}/api/validate-yaml", self.endpoint.address);
        let asked = json!({ "repoType": kind.noun(), "content": content });
        // Mirrors don't have it, and the commit is looked at anyway.
        let found = self
            .ask::<Found>(&address, &asked)?
            .map(|found| found.errors);
        let mistakes: Vec<String> = found
            .unwrap_or_default()
            .iter()
            .map(|mistake| self.http.quotable(&mistake.message))
            .collect();
        ensure!(
            mistakes.is_empty(),
            "the hub refuses the head of the card `README.md`: {}",
            mistakes.join("; ")
        );
        Ok(())
    }

    /// The sentence for something that a hub did not let us do.
    pub(super) fn explain_write(
        &self,
        kind: RepoKind,
        repo: &str,
        doing: &str,
        failure: &HttpError,
    ) -> anyhow::Error {
        let endpoint = &self.endpoint.address;
        let what = format!(
            "the {} `{repo}` at {endpoint} could not be published ({doing})",
            kind.noun()
        );
        let says = |says: &Option<String>| {
            let says = says.as_deref().map(|says| self.http.quotable(says));
            says.map_or_else(String::new, |says| format!(": \"{says}\""))
        };
        match failure {
            HttpError::Status {
                status: 401,
                says: said,
                ..
            } => anyhow!(
                "{what}: the token is wrong or has expired, or may not see it (401){}; set `HF_TOKEN` anew or log in with `pipeline login`",
                says(said)
            ),
            HttpError::Status {
                status: 403,
                says: said,
                ..
            } => anyhow!(
                "{what}: the token may not write there (403){}; use one with write access, of an account that belongs to `{}`",
                says(said),
                repo.split('/').next().unwrap_or_default()
            ),
            HttpError::Status {
                status: 404,
                code,
                says: said,
                ..
            } if code.as_deref() == Some("RevisionNotFound") => {
                anyhow!("{what}: it has no such branch (404){}", says(said))
            }
            HttpError::Status { status: 404, .. } => {
                anyhow!("{what}: there is no such repository that this token may see (404)")
            }
            HttpError::Status {
                status: 413,
                says: said,
                ..
            } => {
                anyhow!("{what}: it is too much (413){}", says(said))
            }
            HttpError::Status {
                status, says: said, ..
            } => {
                anyhow!("{what}: it answers with status {status}{}", says(said))
            }
            HttpError::Connection(reason) => {
                anyhow!("{what}: {reason}; what was sent stays there, and the same command goes on")
            }
            HttpError::Certificate(reason) | HttpError::Malformed(reason) => {
                anyhow!("{what}: {reason}")
            }
        }
    }
}
