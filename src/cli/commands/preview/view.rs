//! What a preview shows: rows by pieces, then what the lints found; as text that is as readable without colours, and as JSON.

use std::fmt::Write as _;

use serde_json::{Value, json};

use super::trials::{Found, Trials};
use crate::engine::Level;
use crate::report::{harmless, style};
use crate::stages::preview::{Piece, Role, Row};

/// The text of a piece that is shown; of a longer one, its beginning and its end.
const SHOWN: usize = 600;

/// Everything as JSON.
pub(super) fn json(trials: &Trials<'_>, found: &[Found]) -> Value {
    let stages = trials.tried.iter().map(|tried| {
        let of = |wanted: Level| {
            let texts = tried.messages.iter();
            let texts = texts.filter(|(level, _)| *level == wanted);
            texts.map(|(_, text)| text.as_str()).collect::<Vec<_>>()
        };
        json!({
            "stage": tried.stage,
            "kind": tried.kind,
            "notes": tried.notes,
            "warnings": of(Level::Warning),
            "messages": of(Level::Info),
        })
    });
    let targets = found.iter().map(|found| {
        let plain = found.plain.iter();
        let plain = plain.map(|(split, row)| json!({ "split": split, "row": row }));
        json!({
            "stage": found.stage,
            "rows": found.rows,
            "plain_rows": plain.collect::<Vec<_>>(),
        })
    });
    json!({
        "rows_read": trials.rows,
        "targets": targets.collect::<Vec<_>>(),
        "stages": stages.collect::<Vec<_>>(),
    })
}

/// Everything for people.
pub(super) fn text(trials: &Trials<'_>, found: &[Found], ids: bool) -> String {
    let mut text = String::new();
    for found in found {
        _ = writeln!(text, "{}", style::paint(style::BOLD, &found.stage));
        for row in &found.rows {
            text.push_str(&row_text(row, ids));
        }
        for (split, row) in &found.plain {
            _ = writeln!(text, "\n{}", harmless(&format!("{split}: {row}")));
        }
        text.push('\n');
    }
    let mut clean = true;
    for tried in &trials.tried {
        for (level, told) in &tried.messages {
            let (word, sign) = match level {
                Level::Warning => ("warning", style::WARNING),
                Level::Info => ("note", style::DIM),
            };
            clean &= *level != Level::Warning;
            let word = style::paint(sign, &format!("{word}:"));
            _ = writeln!(
                text,
                "{word} {}",
                harmless(&format!("{}: {told}", tried.stage))
            );
        }
    }
    text.push_str(&summary(trials));
    if clean {
        _ = writeln!(text, "{}", style::paint(style::GOOD, "no warnings"));
    }
    text
}

/// How much was read, and how long the answers are.
fn summary(trials: &Trials<'_>) -> String {
    let mut text = String::new();
    for tried in &trials.tried {
        let number = |name: &str| tried.notes.get(name).and_then(Value::as_u64);
        let (Some(tokens), Some(longest)) = (number("tokens"), number("longest_sequence")) else {
            continue;
        };
        let rows = tried.notes.get("rows").and_then(Value::as_object);
        let rows = rows.into_iter().flatten();
        let rows: Vec<String> = rows
            .map(|(split, count)| format!("{count} of {split}"))
            .collect();
        _ = writeln!(
            text,
            "{}: {} rows, {tokens} tokens, the longest sequence {longest}",
            harmless(&tried.stage),
            harmless(&rows.join(", "))
        );
        if let Some(means) = tried.notes.get("mean_answer_tokens") {
            _ = writeln!(
                text,
                "{}: answers have {} tokens in the mean where chosen, {} where rejected",
                harmless(&tried.stage),
                means["chosen"],
                means["rejected"]
            );
        }
    }
    text
}

fn row_text(row: &Row, ids: bool) -> String {
    let mut text = String::new();
    let dropped = row.dropped.map_or(String::new(), |why| {
        format!(
            ", {}",
            style::paint(style::ERROR, &format!("left out ({why})"))
        )
    });
    _ = writeln!(
        text,
        "\nrow {} of {}{dropped}",
        row.row,
        harmless(&row.split)
    );
    for side in &row.sides {
        let count: usize = side.pieces.iter().map(|piece| piece.ids.len()).sum();
        let cut = side.pieces.iter().filter(|piece| piece.role == Role::Cut);
        let cut: usize = cut.map(|piece| piece.ids.len()).sum();
        let cut = if cut > 0 {
            format!(", {cut} of them cut")
        } else {
            String::new()
        };
        _ = writeln!(text, "  {} ({count} tokens{cut})", side.name);
        for piece in &side.pieces {
            text.push_str(&piece_text(piece, ids));
        }
    }
    text
}

fn piece_text(piece: &Piece, ids: bool) -> String {
    let (name, sign) = match piece.role {
        Role::Prompt => ("prompt", style::DIM),
        Role::Trained => ("trained", style::GOOD),
        Role::Cut => ("cut", style::ERROR),
    };
    let lines: Vec<String> = if ids {
        let tokens = piece.ids.iter().zip(&piece.tokens);
        tokens
            .map(|(id, token)| format!("{id:>7}  {token}"))
            .collect()
    } else {
        // A line break at the end is a token's text, too.
        shortened(&piece.text)
            .split('\n')
            .map(str::to_owned)
            .collect()
    };
    let mut text = String::new();
    for (number, line) in lines.iter().enumerate() {
        let name = if number == 0 { name } else { "" };
        _ = writeln!(text, "    {name:<7} | {}", style::paint(sign, line));
    }
    text
}

/// A text, or its beginning and its end.
fn shortened(text: &str) -> String {
    let count = text.chars().count();
    if count <= SHOWN {
        return text.to_owned();
    }
    let half = SHOWN / 2;
    let start: String = text.chars().take(half).collect();
    let end: String = text.chars().skip(count - half).collect();
    format!("{start} [.. {} characters ..] {end}", count - 2 * half)
}
