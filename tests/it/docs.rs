//! The documentation says what is so: links lead somewhere, recipes are recipes, and commands print what the text shows.

mod blocks;
mod console;

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use pipeline::recipe::parse;
use pipeline::stages::KINDS;

use self::blocks::{Block, blocks};
use crate::support::program::repository;

/// Every page, by its path in the repository.
fn pages() -> Vec<PathBuf> {
    fn below(folder: &Path, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                below(&path, found);
            } else if path.extension().is_some_and(|extension| extension == "md") {
                found.push(path.strip_prefix(repository()).unwrap().to_owned());
            }
        }
    }
    let mut found = vec!["README.md".into(), "CHANGELOG.md".into()];
    below(&repository().join("docs"), &mut found);
    found.sort_unstable();
    found
}

fn read(page: &Path) -> String {
    fs::read_to_string(repository().join(page)).unwrap()
}

/// The text without what stands in blocks and spans of code.
fn prose(text: &str) -> String {
    let mut prose = String::new();
    let mut fenced = false;
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        } else if !fenced && !line.starts_with("    ") {
            for (index, part) in line.split('`').enumerate() {
                if index % 2 == 0 {
                    prose += part;
                }
            }
        }
        prose.push('\n');
    }
    prose
}

/// The addresses of a page's links and pictures.
fn links(text: &str) -> Vec<String> {
    let prose = prose(text);
    let inside = prose.split("](").skip(1);
    let inside = inside.filter_map(|rest| rest.split_once(')'));
    inside.map(|(link, _)| link.to_owned()).collect()
}

/// The anchors of a page's headings, as GitHub and mdBook make them.
fn anchors(text: &str) -> BTreeSet<String> {
    let mut fenced = false;
    let mut anchors = BTreeSet::new();
    for line in text.lines() {
        if line.trim_start().starts_with("```") {
            fenced = !fenced;
        }
        let heading = line.trim_start_matches('#');
        if fenced || heading.len() == line.len() || !heading.starts_with(' ') {
            continue;
        }
        let heading = heading.trim().to_lowercase();
        let kept = heading
            .chars()
            .filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'))
            .map(|c| if c == ' ' { '-' } else { c });
        anchors.insert(kept.collect());
    }
    anchors
}

/// Whether a file is one of those that mdBook copies.
fn is_in_the_book(file: &Path) -> bool {
    let book = repository().join("docs").canonicalize().unwrap();
    file.canonicalize().unwrap().starts_with(book)
}

#[test]
fn every_link_leads_somewhere() {
    let mut wrong = Vec::new();
    let mut seen = 0;
    for page in pages() {
        let text = read(&page);
        for link in links(&text) {
            if link.contains("://") || link.starts_with("mailto:") {
                continue;
            }
            seen += 1;
            let (file, anchor) = match link.split_once('#') {
                Some((file, anchor)) => (file, Some(anchor)),
                None => (link.as_str(), None),
            };
            let target = if file.is_empty() {
                repository().join(&page)
            } else {
                repository().join(&page).parent().unwrap().join(file)
            };
            if !target.exists() {
                wrong.push(format!("{}: there is no `{link}`", page.display()));
            } else if page.starts_with("docs") && !is_in_the_book(&target) {
                wrong.push(format!("{}: `{link}` is outside the book", page.display()));
            } else if let Some(anchor) = anchor
                && !anchors(&fs::read_to_string(&target).unwrap()).contains(anchor)
            {
                wrong.push(format!("{}: no heading for `{link}`", page.display()));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
    assert!(seen > 60, "only {seen} links");
}

/// How many cells a row of a table has. A `|` in a cell has a backslash before it, in code too.
fn cells(row: &str) -> usize {
    row.replace("\\|", "").matches('|').count()
}

#[test]
fn every_row_of_a_table_has_the_cells_of_its_head() {
    let mut wrong = Vec::new();
    for page in pages() {
        let (mut fenced, mut head) = (false, None);
        for (number, line) in read(&page).lines().enumerate() {
            fenced ^= line.starts_with("```");
            if fenced || !line.starts_with('|') {
                head = None;
            } else if *head.get_or_insert(cells(line)) != cells(line) {
                wrong.push(format!("{}:{}", page.display(), number + 1));
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn the_book_has_every_page() {
    let summary = read(Path::new("docs/SUMMARY.md"));
    let listed: BTreeSet<PathBuf> = links(&summary).into_iter().map(PathBuf::from).collect();
    let there: BTreeSet<PathBuf> = pages()
        .iter()
        .filter_map(|page| page.strip_prefix("docs").ok())
        .filter(|page| *page != Path::new("SUMMARY.md"))
        .map(Path::to_owned)
        .collect();
    assert_eq!(listed, there);
    let book = fs::read_to_string(repository().join("docs/book.toml")).unwrap();
    assert!(book.contains("src = \".\"") && book.contains("create-missing = false"));
}

/// What is wrong with a part of a recipe, such as one stage: mistakes of links don't count, because the rest is elsewhere.
fn mistakes(part: &str) -> Result<(), String> {
    // Left of a stage's name is the indentation that it has in a recipe.
    let indent = part
        .lines()
        .map(|line| line.len() - line.trim_start().len());
    let indent = indent.zip(part.lines());
    let indent = indent.filter(|(_, line)| !line.trim().is_empty());
    let least = indent.map(|(indent, _)| indent).min().unwrap_or(0);
    let lines = part.lines().map(|line| line.get(least..).unwrap_or(""));
    let part = lines.collect::<Vec<_>>().join("\n");
    let value: serde_yaml::Value =
        serde_yaml::from_str(&part).map_err(|error| format!("no YAML: {error}"))?;
    let Some(map) = value.as_mapping() else {
        return Ok(());
    };
    let is_kind =
        |name: &serde_yaml::Value| KINDS.iter().any(|kind| Some(kind.name) == name.as_str());
    let indented = |text: &str, by: &str| {
        let lines = text.lines().map(|line| format!("{by}{line}\n"));
        lines.collect::<String>()
    };
    let recipe = if map.contains_key("version") {
        part.clone()
    } else if map.keys().all(is_kind) {
        format!("version: 1\nstages:\n  it:\n{}", indented(&part, "    "))
    } else if map.values().all(|stage| {
        stage
            .as_mapping()
            .is_some_and(|stage| stage.keys().any(is_kind))
    }) {
        format!("version: 1\nstages:\n{}", indented(&part, "  "))
    } else {
        return Ok(());
    };
    let whole = map.contains_key("version");
    let Err(errors) = parse(Path::new("docs"), &recipe, &[], KINDS) else {
        return Ok(());
    };
    let wrong = errors.0.into_iter().filter(|error| {
        let message = &error.message;
        let elsewhere = ["there is no stage", "needs `", "there is no var"];
        whole || !elsewhere.iter().any(|other| message.contains(other))
    });
    let wrong: Vec<String> = wrong.map(|error| error.to_string()).collect();
    if wrong.is_empty() {
        Ok(())
    } else {
        Err(wrong.join("\n"))
    }
}

#[test]
fn what_looks_like_a_recipe_is_one() {
    let mut seen = 0;
    for page in pages() {
        for Block { info, text, line } in blocks(&read(&page)) {
            let place = format!("{}:{line}", page.display());
            match info.split(' ').next().unwrap_or_default() {
                "yaml"
                    if text.contains("{ .. }")
                        || text.contains("version: 1") && !text.contains("stages:") => {}
                "yaml" => {
                    seen += 1;
                    mistakes(&text).unwrap_or_else(|wrong| panic!("{place}: {wrong}"));
                }
                "json" | "jsonl" => {
                    for row in text.lines().filter(|row| !row.is_empty()) {
                        let read = serde_json::from_str::<serde_json::Value>(row);
                        read.unwrap_or_else(|error| panic!("{place}: {error}"));
                    }
                }
                _ => {}
            }
        }
    }
    assert!(seen > 15, "only {seen} blocks");
    assert!(mistakes("a:\n  merge:\n    adaptor: b\n").is_err());
    assert!(mistakes("version: 1\nstages:\n  a:\n    merge:\n      adapter: b\n").is_err());
    assert!(mistakes("a:\n  merge:\n    adapter: b\n").is_ok());
}
