//! The tokens that `hf auth login` keeps: the active one in a file of its own, all by name in `stored_tokens` beside it.
//!
//! `stored_tokens` is what Python's `configparser` writes: a section a token, `hf_token = ..` in it. What else stands there
//! (`refresh_token`, `expires_at` of logins by the browser) is kept.

use std::fmt::Write as _;
use std::fs;
use std::io::{ErrorKind, Write as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};

use super::settings::token_file;

/// The key of the token itself.
const TOKEN: &str = "hf_token";
/// The largest file of tokens that is read, in bytes.
const LARGEST: u64 = 1 << 20;

/// The files with tokens.
#[derive(Debug)]
pub struct TokenStore {
    active: PathBuf,
    stored: PathBuf,
}

/// A token by its name, with what else is kept of it.
type Section = (String, Vec<(String, String)>);

impl TokenStore {
    /// The files that the variables of `huggingface_hub` name.
    pub fn from_variables(
        variable: &dyn Fn(&str) -> Option<String>,
        home: Option<&Path>,
    ) -> anyhow::Result<Self> {
        let active = token_file(variable, home)?;
        let active = active.context("there is no home folder for tokens; set `HF_HOME`")?;
        Ok(Self {
            stored: active.with_file_name("stored_tokens"),
            active,
        })
    }

    /// The file with the active token.
    pub fn path(&self) -> &Path {
        &self.active
    }

    /// Keeps a token under a name and makes it the active one.
    pub fn save(&self, name: &str, token: &str) -> anyhow::Result<()> {
        let name: String = name.chars().filter(|c| !c.is_control()).collect();
        let name = name.trim();
        // A section of this name would be everybody's defaults.
        ensure!(
            !name.is_empty() && name != "DEFAULT",
            "the token is called {name:?}, which can't be kept; rename it on the hub"
        );
        let mut sections = self.read();
        sections.retain(|(other, _)| other != name);
        sections.push((name.to_owned(), vec![(TOKEN.to_owned(), token.to_owned())]));
        self.write(sections)?;
        write_secret(&self.active, token)
    }

    /// Forgets all tokens, or the one of a name. Whether there was one.
    pub fn remove(&self, name: Option<&str>) -> anyhow::Result<bool> {
        let Some(name) = name else {
            let active = remove(&self.active)?;
            return Ok(remove(&self.stored)? || active);
        };
        let mut sections = self.read();
        let Some(at) = sections.iter().position(|(other, _)| other == name) else {
            return Ok(false);
        };
        let (_, fields) = sections.remove(at);
        self.write(sections)?;
        let active = fs::read_to_string(&self.active).unwrap_or_default();
        if fields
            .iter()
            .any(|(key, token)| key == TOKEN && token == active.trim())
        {
            remove(&self.active)?;
        }
        Ok(true)
    }

    /// The names of the tokens.
    pub fn names(&self) -> Vec<String> {
        self.read().into_iter().map(|(name, _)| name).collect()
    }

    /// The sections of the file. One that makes no sense counts as empty, as in `huggingface_hub`: a login writes it anew.
    fn read(&self) -> Vec<Section> {
        let small = fs::metadata(&self.stored).is_ok_and(|about| about.len() <= LARGEST);
        let text = fs::read_to_string(&self.stored).ok().filter(|_| small);
        text.and_then(|text| parse(&text)).unwrap_or_default()
    }

    fn write(&self, mut sections: Vec<Section>) -> anyhow::Result<()> {
        sections.sort();
        let mut text = String::new();
        for (name, fields) in sections {
            _ = writeln!(text, "[{name}]");
            for (key, value) in fields {
                _ = writeln!(text, "{key} = {value}");
            }
            text.push('\n');
        }
        write_secret(&self.stored, &text)
    }
}

/// The sections of an INI file.
fn parse(text: &str) -> Option<Vec<Section>> {
    let mut sections: Vec<Section> = Vec::new();
    for line in text.lines() {
        let line = line.trim_end();
        if line.trim_start().is_empty() || line.trim_start().starts_with(['#', ';']) {
            continue;
        }
        if let Some(header) = line.strip_prefix('[') {
            let (name, _) = header.rsplit_once(']')?;
            if sections.iter().any(|(other, _)| other == name) {
                return None;
            }
            sections.push((name.to_owned(), Vec::new()));
            continue;
        }
        let (key, value) = line.split_once(['=', ':'])?;
        let (_, fields) = sections.last_mut()?;
        fields.push((key.trim().to_lowercase(), value.trim().to_owned()));
    }
    Some(sections)
}

fn remove(path: &Path) -> anyhow::Result<bool> {
    match fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => {
            Err(anyhow::Error::new(error).context(format!("could not remove `{}`", path.display())))
        }
    }
}

/// Writes a file that nobody else may read, whole or not at all. A folder made for it is nobody else's either.
fn write_secret(path: &Path, text: &str) -> anyhow::Result<()> {
    let write = || -> std::io::Result<()> {
        let folder = path.parent().unwrap_or(Path::new("."));
        fs::DirBuilder::new()
            .recursive(true)
            .mode(0o700)
            .create(folder)?;
        // Such files are their owner's alone from the beginning.
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(text.as_bytes())?;
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        Ok(())
    };
    write().with_context(|| format!("could not write `{}`", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn store(folder: &Path) -> TokenStore {
        let home = folder.display().to_string();
        let variable = move |name: &str| (name == "HF_HOME").then(|| home.clone());
        TokenStore::from_variables(&variable, None).unwrap()
    }

    #[test]
    fn tokens_are_kept_by_name_and_for_their_owner_alone() {
        let folder = tempfile::tempdir().unwrap();
        let folder = folder.path().join("new/home");
        let store = store(&folder);
        store.save("work", "hf_b").unwrap();
        store.save("home", "hf_a").unwrap();
        assert_eq!(store.names(), ["home", "work"]);
        let stored = fs::read_to_string(folder.join("stored_tokens")).unwrap();
        assert_eq!(
            stored,
            "[home]\nhf_token = hf_a\n\n[work]\nhf_token = hf_b\n\n"
        );
        assert_eq!(fs::read_to_string(store.path()).unwrap(), "hf_a");
        for name in ["token", "stored_tokens"] {
            let mode = fs::metadata(folder.join(name))
                .unwrap()
                .permissions()
                .mode();
            assert_eq!(mode & 0o777, 0o600, "{name}");
        }
        assert_eq!(
            fs::metadata(&folder).unwrap().permissions().mode() & 0o777,
            0o700
        );
        assert!(store.remove(Some("work")).unwrap());
        assert!(store.path().exists() && !store.remove(Some("work")).unwrap());
        assert!(store.remove(Some("home")).unwrap());
        assert!(!store.path().exists(), "it was the active one");
        store.save("again", "hf_c").unwrap();
        assert!(store.remove(None).unwrap() && !store.remove(None).unwrap());
        assert!(!folder.join("stored_tokens").exists());
    }

    #[test]
    fn what_others_keep_of_a_token_stays() {
        let folder = tempfile::tempdir().unwrap();
        let theirs = "[browser]\nhf_token = hf_x\nrefresh_token = r%1\nexpires_at = 17\n\n";
        fs::write(folder.path().join("stored_tokens"), theirs).unwrap();
        let store = store(folder.path());
        store.save("mine", "hf_m").unwrap();
        let stored = fs::read_to_string(folder.path().join("stored_tokens")).unwrap();
        assert_eq!(stored, format!("{theirs}[mine]\nhf_token = hf_m\n\n"));
        fs::write(folder.path().join("stored_tokens"), "no sense").unwrap();
        assert!(store.names().is_empty());
        for name in ["", "DEFAULT", "\n"] {
            assert!(store.save(name, "hf_m").is_err(), "{name:?}");
        }
        store.save("a\nb]c", "hf_m").unwrap();
        assert_eq!(store.names(), ["ab]c"]);
    }
}
