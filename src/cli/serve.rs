//! The report on a port of this machine, which follows a run in progress.
//!
//! Only this machine can reach it (127.0.0.1). A page of another site can't read it either: the `Host` must be ours, and the path has
//! a part that nobody can guess.

use std::io::Read as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, anyhow};
use tiny_http::{Header, Method, Request, Response, Server};

use super::args::{RecipeArgs, StoreArgs};
use super::gather::page::{Memo, page};
use super::leaving::on_interrupt;
use super::project::Project;
use super::{Failure, eprint, print};
use crate::engine::digest_json;
use crate::report::page::render;

/// A page is made anew at most this often.
const YOUNGEST: Duration = Duration::from_secs(1);
/// Making pages takes at most one part in so many of the time, so that a run is not slowed down.
const SHARE: u32 = 20;
/// How often the end is looked for.
const PATIENCE: Duration = Duration::from_millis(200);

/// A page with its version.
struct Made {
    text: String,
    version: String,
    at: Instant,
    took: Duration,
}

/// Serves the report until somebody interrupts.
pub(super) fn serve(recipe: &RecipeArgs, store: &StoreArgs, open: bool) -> Result<(), Failure> {
    let mut memo = Memo::default();
    let mut made = make(recipe, store, &mut memo)?;
    let server =
        Server::http("127.0.0.1:0").map_err(|error| anyhow!("could not listen: {error}"))?;
    let port = server
        .server_addr()
        .to_ip()
        .context("the server has no port")?
        .port();
    let hosts = [format!("127.0.0.1:{port}"), format!("localhost:{port}")];
    let path = format!("/{}/", secret()?);
    let address = format!("http://{}{path}", hosts[0]);
    print(&format!("{address}\n"));
    let ended = Arc::new(AtomicBool::new(false));
    let end = Arc::clone(&ended);
    on_interrupt(move || end.store(true, Ordering::Relaxed))?;
    if open {
        show(&address);
    }
    while !ended.load(Ordering::Relaxed) {
        let request = server.recv_timeout(PATIENCE).context("could not listen")?;
        let Some(request) = request else { continue };
        let wanted = refusal(&request, &hosts, &path);
        if wanted.is_none() && made.at.elapsed() > YOUNGEST.max(made.took * SHARE) {
            // A recipe that is being edited may be wrong for a moment: then the last page stays.
            match make(recipe, store, &mut memo) {
                Ok(new) => made = new,
                Err(_) => made.at = Instant::now(),
            }
        }
        // A browser that went away is no reason to stop.
        let _ = match wanted {
            Some(status) => request.respond(Response::empty(status)),
            None => answer(request, &made),
        };
    }
    Ok(())
}

/// The status for what is not answered with the page.
fn refusal(request: &Request, hosts: &[String], path: &str) -> Option<u16> {
    let host = value(request, "Host");
    if !host.is_some_and(|host| hosts.contains(&host)) {
        return Some(403);
    }
    if request.url() != path {
        return Some(404);
    }
    (!matches!(request.method(), Method::Get | Method::Head)).then_some(405)
}

fn value(request: &Request, name: &'static str) -> Option<String> {
    let headers = request.headers().iter();
    let mut found = headers.filter(|header| header.field.equiv(name));
    // Of two it would be unclear which one counts.
    let value = found.next()?.value.to_string();
    found.next().is_none().then_some(value)
}

fn answer(request: Request, made: &Made) -> std::io::Result<()> {
    let version = format!("\"{}\"", made.version);
    if value(&request, "If-None-Match").as_deref() == Some(&version) {
        return request.respond(Response::empty(304));
    }
    let headers = [
        ("Content-Type", "text/html; charset=utf-8"),
        ("ETag", &version),
        ("Cache-Control", "no-store"),
        ("X-Content-Type-Options", "nosniff"),
        ("Content-Security-Policy", "frame-ancestors 'none'"),
        ("Cross-Origin-Resource-Policy", "same-origin"),
    ];
    let mut response = Response::from_string(made.text.as_str());
    for (name, value) in headers {
        if let Ok(header) = Header::from_bytes(name, value) {
            response.add_header(header);
        }
    }
    request.respond(response)
}

fn make(recipe: &RecipeArgs, store: &StoreArgs, memo: &mut Memo) -> Result<Made, Failure> {
    let started = Instant::now();
    let project = Project::open(recipe, store)?;
    let mut page = page(&project, true, memo)?;
    // The time at which it was made is no news.
    let made = std::mem::take(&mut page.made);
    let all = serde_json::to_value(&page).map_err(anyhow::Error::from)?;
    page.state = digest_json(&all).chars().take(16).collect();
    page.made = made;
    Ok(Made {
        text: render(&page)?,
        version: page.state,
        at: Instant::now(),
        took: started.elapsed(),
    })
}

/// A part of an address that nobody can guess.
fn secret() -> anyhow::Result<String> {
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")
        .and_then(|mut random| random.read_exact(&mut bytes))
        .context("could not read random bytes")?;
    Ok(format!("{:032x}", u128::from_be_bytes(bytes)))
}

/// Shows a file or an address in the browser; where there is none, it is only said.
pub(super) fn show(what: &str) {
    if let Err(error) = open::that_detached(what) {
        eprint(&format!("could not open a browser: {error}\n"));
    }
}
