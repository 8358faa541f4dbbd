//! `login`, `logout` and `whoami`: the token for the hub, in the files that `huggingface_hub` reads and writes.

use std::io::{IsTerminal as _, Read as _};

use anyhow::Context as _;
use serde_json::json;

use crate::cli::{Failure, eprint, error, print, print_json, variable};
use crate::hub::{Hub, HubSettings, TokenStore};

/// The longest token that is read from standard input, in bytes.
const LONGEST: u64 = 10_000;

#[derive(clap::Args)]
#[command(after_help = "\
Examples:
  pipeline login                       # asks for the token and shows nothing of it
  pipeline login < token.txt
  pipeline login --token hf_..         # other users of the machine may see it in the list of processes")]
pub(in crate::cli) struct Login {
    /// The token; without it, it is asked for at the terminal or read from standard input
    #[arg(long, value_name = "TOKEN")]
    token: Option<String>,
}

#[derive(clap::Args)]
pub(in crate::cli) struct Logout {
    /// The name of the token to forget [default: all]
    name: Option<String>,
}

#[derive(clap::Args)]
pub(in crate::cli) struct Whoami {
    /// The account as JSON
    #[arg(long)]
    json: bool,
}

fn settings() -> Result<HubSettings, Failure> {
    let home = std::env::home_dir();
    Ok(HubSettings::from_variables(
        &|name| variable(name),
        home.as_deref(),
    )?)
}

fn store() -> Result<TokenStore, Failure> {
    let home = std::env::home_dir();
    Ok(TokenStore::from_variables(
        &|name| variable(name),
        home.as_deref(),
    )?)
}

/// The variable that holds a token, if one does.
fn token_variable() -> Option<&'static str> {
    let names = ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"];
    names
        .into_iter()
        .find(|name| variable(name).is_some_and(|token| !token.trim().is_empty()))
}

pub(in crate::cli) fn login(args: &Login) -> Result<(), Failure> {
    let mut settings = settings()?;
    let token = match &args.token {
        Some(token) if token != "-" => token.clone(),
        _ if args.token.is_none() && std::io::stdin().is_terminal() => ask(&settings)?,
        _ => {
            let mut text = String::new();
            let mut input = std::io::stdin().lock().take(LONGEST);
            input
                .read_to_string(&mut text)
                .context("could not read the token from standard input")?;
            text
        }
    };
    let token = token.trim().to_owned();
    if token.is_empty() {
        let hint = "make one at https://huggingface.co/settings/tokens";
        return Err(Failure::Usage(error::with_hint("there is no token", hint)));
    }
    if token.starts_with("api_org") {
        let hint = "make one of your own account at https://huggingface.co/settings/tokens";
        let message = "this is the token of an organisation, which can't log in";
        return Err(Failure::Usage(error::with_hint(message, hint)));
    }
    settings.token = Some(token.clone());
    let hub = Hub::new(settings, &())?;
    let account = hub.account()?;
    let name = account
        .token_name
        .clone()
        .unwrap_or_else(|| format!("oauth-{}", account.name));
    let store = store()?;
    store.save(&name, &token)?;
    print(&format!(
        "logged in to {} as `{}`; the token `{name}`{} is in `{}`\n",
        hub.endpoint_address(),
        account.name,
        account
            .role
            .map(|role| format!(" ({role})"))
            .unwrap_or_default(),
        store.path().display()
    ));
    if let Some(name) = token_variable() {
        eprint(&format!(
            "warning: the variable {name} is set, and counts instead of the token that was kept now\n"
        ));
    }
    Ok(())
}

/// Asks at the terminal, without an echo.
fn ask(settings: &HubSettings) -> Result<String, Failure> {
    let address = settings
        .endpoint
        .as_deref()
        .unwrap_or("https://huggingface.co");
    eprint(&format!(
        "make a token at {}/settings/tokens; nothing is shown while you type or paste it\n",
        crate::hub::shown_address(address)
    ));
    let token = dialoguer::Password::new().with_prompt("token").interact();
    Ok(token.context("could not read from the terminal")?)
}

pub(in crate::cli) fn logout(args: &Logout) -> Result<(), Failure> {
    let store = store()?;
    let names = store.names();
    let removed = store.remove(args.name.as_deref())?;
    match (&args.name, removed) {
        (Some(name), false) => {
            let message = format!("there is no token `{name}`");
            let hint = match &names[..] {
                [] => "no token is kept".to_owned(),
                names => format!("kept are {}", names.join(", ")),
            };
            return Err(Failure::Usage(error::with_hint(&message, &hint)));
        }
        (Some(name), true) => print(&format!("the token `{name}` is forgotten\n")),
        (None, true) => print("all tokens are forgotten\n"),
        (None, false) => print("no token was kept\n"),
    }
    if let Some(name) = token_variable() {
        eprint(&format!(
            "warning: the variable {name} is still set, and holds a token\n"
        ));
    }
    Ok(())
}

pub(in crate::cli) fn whoami(args: &Whoami) -> Result<(), Failure> {
    let settings = settings()?;
    if settings.token.is_none() {
        let hint = if settings.token_withheld {
            "unset `HF_HUB_DISABLE_IMPLICIT_TOKEN`, which keeps your token back"
        } else {
            "`pipeline login` keeps a token, or set `HF_TOKEN`"
        };
        return Err(anyhow::anyhow!("nobody is logged in; {hint}").into());
    }
    let hub = Hub::new(settings, &())?;
    let account = hub.account()?;
    let source = match token_variable() {
        Some(name) => format!("the variable {name}"),
        None => format!("`{}`", store()?.path().display()),
    };
    if args.json {
        return print_json(
            &json!({ "hub": hub.endpoint_address(), "account": account, "token_from": source }),
        );
    }
    print(&format!("{}\n", account.name));
    if !account.organisations.is_empty() {
        print(&format!(
            "organisations: {}\n",
            account.organisations.join(", ")
        ));
    }
    let token = account
        .token_name
        .unwrap_or_else(|| "without a name".to_owned());
    let role = account
        .role
        .map(|role| format!(" ({role})"))
        .unwrap_or_default();
    print(&format!(
        "token: {token}{role}, from {source}\nhub: {}\n",
        hub.endpoint_address()
    ));
    Ok(())
}
