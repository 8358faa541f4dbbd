//! Messages as people write them, brought to `role` and `content`. What is so already stays as it was written.

use anyhow::{Context as _, Result, bail, ensure};

use super::cell::Cell;

/// `ShareGPT`'s names of who speaks, and the roles that they are.
const SPEAKERS: &[(&str, &str)] = &[
    ("human", "user"),
    ("user", "user"),
    ("gpt", "assistant"),
    ("chatgpt", "assistant"),
    ("bing", "assistant"),
    ("bard", "assistant"),
    ("model", "assistant"),
    ("assistant", "assistant"),
    ("system", "system"),
    ("tool", "tool"),
    ("observation", "tool"),
    ("function_response", "tool"),
];
/// The speaker whose text is a call of a tool.
const CALL: &str = "function_call";
/// What a message may hold in place of a content.
const OTHER_CONTENTS: &[&str] = &[
    "tool_calls",
    "function_call",
    "reasoning_content",
    "thinking",
    "reasoning",
];

/// A list of messages, or, for an answer, one message alone, as messages with `role` and `content`. `share_gpt` reads `ShareGPT`'s
/// names also where a message has a `role`. The second value says whether anything was written another way.
pub(super) fn messages(value: Cell, name: &str, share_gpt: bool) -> Result<(Cell, bool)> {
    let (items, mut changed) = match value {
        Cell::List(items) => (items, false),
        one @ Cell::Map(_) if name != "messages" => (vec![one], true),
        other => bail!(
            "`{name}` is {}: expected a list of messages with `role` and `content`",
            other.noun()
        ),
    };
    let mut messages = Vec::with_capacity(items.len());
    for (number, item) in (1..).zip(items) {
        let (message, rewritten) =
            message(item, share_gpt).with_context(|| format!("message {number} of `{name}`"))?;
        changed |= rewritten;
        messages.push(message);
    }
    Ok((Cell::List(messages), changed))
}

fn message(item: Cell, share_gpt: bool) -> Result<(Cell, bool)> {
    let Cell::Map(entries) = item else {
        bail!(
            "it is {}: expected an object with `role` and `content`",
            item.noun()
        );
    };
    let message = Cell::Map(entries);
    let has = |key: &str| message.get(key).is_some_and(|value| *value != Cell::Null);
    let from_gpt = has("from") && !has("role");
    if from_gpt || (share_gpt && has("role")) {
        let by = if from_gpt { "from" } else { "role" };
        return spoken(message, by).map(|message| (message, true));
    }
    match message.get("role") {
        Some(Cell::Text(role)) if !role.trim().is_empty() => {}
        Some(Cell::Text(_)) => bail!("its `role` is empty"),
        Some(Cell::Null) => {
            bail!("its `role` is null: expected `system`, `user`, `assistant` or `tool`")
        }
        Some(other) => bail!("its `role` is {}: expected text", other.noun()),
        None => bail!("it has {}, but no `role`", keys(&message)),
    }
    if !has("content") && !OTHER_CONTENTS.iter().any(|key| has(key)) {
        if let Some(key) = ["value", "text"].into_iter().find(|key| has(key)) {
            bail!(
                "it has `{key}`, but no `content`; hint: `format: sharegpt` reads `{key}` as the content"
            );
        }
        if message.get("content").is_some() {
            bail!("its `content` is null, and it calls no tool: expected text");
        }
        bail!(
            "it has {}, but nothing to say: expected `content`",
            keys(&message)
        );
    }
    parts(&message)?;
    Ok((message, false))
}

/// Refuses a content with parts that are no text. What a tool answers may be anything.
fn parts(message: &Cell) -> Result<()> {
    let is_tool = matches!(message.get("role"), Some(Cell::Text(role)) if !matches!(role.as_str(), "user" | "assistant" | "system"));
    let Some(Cell::List(parts)) = message.get("content").filter(|_| !is_tool) else {
        return Ok(());
    };
    for (number, part) in (1..).zip(parts) {
        part_text(number, part)?;
    }
    Ok(())
}

/// The text of one part of a content.
pub(crate) fn part_text(number: usize, part: &Cell) -> Result<&str> {
    let kind = match part.get("type") {
        Some(Cell::Text(kind)) => kind.as_str(),
        _ => "text",
    };
    let what = match part {
        Cell::Map(_) if !kind.ends_with("text") => {
            format!(
                "of the type `{}`: only text can be used",
                kind.chars().take(40).collect::<String>()
            )
        }
        Cell::Map(_) => match part.get("text") {
            Some(Cell::Text(text)) => return Ok(text),
            Some(other) => format!("no text: its `text` is {}", other.noun()),
            None => "no text: it has no `text`".to_owned(),
        },
        other => format!(
            "{}: expected an object with `type` and `text`",
            other.noun()
        ),
    };
    bail!("part {number} of its `content` is {what}")
}

/// Whether `format: sharegpt` reads a role, as people write it.
pub(crate) fn is_speaker(role: &str) -> bool {
    let role = role.trim().to_lowercase();
    SPEAKERS.iter().any(|(known, _)| *known == role)
}

/// A message with a text.
pub(super) fn text_message(role: &str, content: String) -> Cell {
    Cell::Map(vec![
        ("role".to_owned(), Cell::Text(role.to_owned())),
        ("content".to_owned(), Cell::Text(content)),
    ])
}

/// Refuses messages in which nobody answers.
pub(super) fn need_answer(messages: &Cell) -> Result<()> {
    let mut roles: Vec<&str> = Vec::new();
    if let Cell::List(messages) = messages {
        for message in messages {
            if let Some(Cell::Text(role)) = message.get("role")
                && !roles.contains(&role.as_str())
            {
                roles.push(role);
            }
        }
    }
    if roles.contains(&"assistant") {
        return Ok(());
    }
    let is_assistant = |role: &&str| {
        let small = role.trim().to_lowercase();
        SPEAKERS.contains(&(small.as_str(), "assistant"))
    };
    let hint = if roles.iter().any(is_assistant) {
        "; hint: `format: sharegpt` reads other names of the assistant"
    } else {
        ""
    };
    let roles: Vec<String> = roles
        .iter()
        .take(8)
        .map(|role| format!("`{}`", role.chars().take(40).collect::<String>()))
        .collect();
    bail!(
        "`messages` has no message of the role `assistant`, only of {}{hint}",
        roles.join(", ")
    );
}

/// A message with `ShareGPT`'s names; other keys stay.
fn spoken(message: Cell, by: &str) -> Result<Cell> {
    let speaker = match message.get(by) {
        Some(Cell::Text(speaker)) => speaker.trim().to_lowercase(),
        other => bail!(
            "its `{by}` is {}: expected text",
            other.map_or("null", Cell::noun)
        ),
    };
    let key = ["value", "content", "text"]
        .into_iter()
        .find(|key| message.get(key).is_some_and(|value| *value != Cell::Null));
    let call = speaker == CALL;
    let role = SPEAKERS.iter().find(|(known, _)| *known == speaker);
    let role = match role {
        Some((_, role)) => *role,
        None if call => "assistant",
        None => bail!(
            "its `{by}` is `{}`: expected human, gpt, system, tool or another of ShareGPT's names",
            speaker.chars().take(40).collect::<String>()
        ),
    };
    let Some(key) = key else {
        if OTHER_CONTENTS.iter().any(|key| message.get(key).is_some()) && !call {
            return Ok(renamed(message, by, role, None, Vec::new()));
        }
        bail!(
            "it has {}, but nothing to say: expected `value`",
            keys(&message)
        );
    };
    if !call {
        return Ok(renamed(message, by, role, Some(key), Vec::new()));
    }
    let calls = calls(message.get(key))?;
    let more = vec![("tool_calls".to_owned(), calls)];
    Ok(renamed(message, by, role, Some(key), more))
}

/// The message with `role` and `content` in front. The content is dropped where `more` says it.
fn renamed(
    message: Cell,
    by: &str,
    role: &str,
    key: Option<&str>,
    more: Vec<(String, Cell)>,
) -> Cell {
    let Cell::Map(entries) = message else {
        return message;
    };
    let mut made = vec![("role".to_owned(), Cell::Text(role.to_owned()))];
    let mut others = Vec::new();
    for (name, value) in entries {
        if Some(name.as_str()) == key {
            if more.is_empty() {
                made.push(("content".to_owned(), value));
            }
        } else if name != by && name != "role" && !(name == "content" && value == Cell::Null) {
            others.push((name, value));
        }
    }
    made.extend(more);
    made.extend(others);
    Cell::Map(made)
}

/// The calls that a `function_call` turn writes as JSON: an object with `name` and `arguments`, or a list of them.
fn calls(value: Option<&Cell>) -> Result<Cell> {
    let expected = "expected JSON with `name` and `arguments`";
    let parsed = match value {
        Some(Cell::Text(text)) => {
            Cell::parse(text).with_context(|| format!("the call is no JSON: {expected}"))?
        }
        Some(other) => other.clone(),
        None => bail!("there is no call: {expected}"),
    };
    let list = match parsed {
        Cell::List(list) => list,
        one => vec![one],
    };
    let call = |function: Cell| {
        ensure!(
            matches!(function.get("name"), Some(Cell::Text(_))),
            "the call is {}: {expected}",
            keys(&function)
        );
        Ok(Cell::Map(vec![
            ("type".to_owned(), Cell::Text("function".to_owned())),
            ("function".to_owned(), function),
        ]))
    };
    Ok(Cell::List(
        list.into_iter().map(call).collect::<Result<_>>()?,
    ))
}

/// A transcript as hh-rlhf has it, `\n\nHuman: ..\n\nAssistant: ..`, as messages; none for another text.
pub(super) fn transcript(text: &str) -> Option<Vec<Cell>> {
    const TURNS: [(&str, &str); 2] = [("\n\nHuman:", "user"), ("\n\nAssistant:", "assistant")];
    let next = |text: &str| {
        let found = TURNS
            .iter()
            .filter_map(|turn| Some((text.find(turn.0)?, *turn)));
        found.min_by_key(|(at, _)| *at)
    };
    let mut rest = text;
    // Some begin without the two blank lines.
    let start = TURNS
        .iter()
        .find_map(|(mark, role)| Some((text.strip_prefix(mark.trim_start())?, *role)));
    let mut role = if let Some((after, role)) = start {
        rest = after;
        role
    } else {
        let (at, (mark, role)) = next(text)?;
        if !text[..at].trim().is_empty() {
            return None;
        }
        rest = &rest[at + mark.len()..];
        role
    };
    let mut turns: Vec<Cell> = Vec::new();
    loop {
        let (end, following) = match next(rest) {
            Some((at, turn)) => (at, Some(turn)),
            None => (rest.len(), None),
        };
        let said = rest[..end].trim();
        turns.push(text_message(role, said.to_owned()));
        let Some((mark, following)) = following else {
            break;
        };
        rest = &rest[end + mark.len()..];
        role = following;
    }
    Some(turns)
}

fn keys(message: &Cell) -> String {
    let Cell::Map(entries) = message else {
        return message.noun().to_owned();
    };
    if entries.is_empty() {
        return "no key".to_owned();
    }
    let names: Vec<String> = entries
        .iter()
        .take(8)
        .map(|(name, _)| format!("`{}`", name.chars().take(40).collect::<String>()))
        .collect();
    names.join(", ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(json: &str, share_gpt: bool) -> Result<String> {
        let (cell, _) = messages(Cell::parse(json).unwrap(), "chosen", share_gpt)?;
        Ok(serde_json::to_string(&cell)?)
    }

    #[test]
    fn messages_with_roles_stay_as_they_are() {
        let text = r#"[{"content":[{"type":"text","text":"q"}],"role":"user","weight":0},{"role":"assistant","content":null,"tool_calls":[{"function":{"name":"f","arguments":{}}}]}]"#;
        let (cell, changed) = messages(Cell::parse(text).unwrap(), "messages", false).unwrap();
        assert!(!changed);
        assert_eq!(serde_json::to_string(&cell).unwrap(), text);
    }

    #[test]
    fn share_gpt_has_other_names_for_the_same() {
        let text = r#"[{"from":"System","value":"s"},{"from":"human","value":"q"},{"from":"gpt","value":"a","weight":1},{"from":"function_call","value":"{\"name\":\"f\",\"arguments\":{\"n\":1.0}}"},{"from":"observation","value":"5"}]"#;
        assert_eq!(
            read(text, false).unwrap(),
            r#"[{"role":"system","content":"s"},{"role":"user","content":"q"},{"role":"assistant","content":"a","weight":1},{"role":"assistant","tool_calls":[{"type":"function","function":{"name":"f","arguments":{"n":1.0}}}]},{"role":"tool","content":"5"}]"#
        );
        let one = r#"{"role":"Human","value":"q"}"#;
        assert_eq!(
            read(one, true).unwrap(),
            r#"[{"role":"user","content":"q"}]"#
        );
    }

    #[test]
    fn what_no_message_is_gets_a_sentence() {
        for (text, expected) in [
            (r#"["hi"]"#, "message 1 of `chosen`: it is text"),
            (
                r#"[{"role":"user","value":"hi"}]"#,
                "hint: `format: sharegpt`",
            ),
            (
                r#"[{"role":"user","content":"x"},{"role":null,"content":"hi"}]"#,
                "message 2 of `chosen`: its `role` is null",
            ),
            (r#"[{"role":"user"}]"#, "nothing to say"),
            (
                r#"[{"role":"user","content":null}]"#,
                "its `content` is null",
            ),
            (
                r#"[{"role":"user","content":["x"]}]"#,
                "part 1 of its `content` is text: expected an object",
            ),
            (
                r#"[{"role":"user","content":[{"type":"text","text":"x"},{"type":"image","image":"x"}]}]"#,
                "part 2 of its `content` is of the type `image`",
            ),
            (
                r#"[{"role":"user","content":[{"type":"text"}]}]"#,
                "it has no `text`",
            ),
            (r#"[{"content":"x"}]"#, "it has `content`, but no `role`"),
            (
                r#"[{"from":"narrator","value":"x"}]"#,
                "its `from` is `narrator`",
            ),
            (r#"[{"from":"gpt"}]"#, "nothing to say"),
            ("7", "`chosen` is a number"),
        ] {
            let error = format!("{:#}", read(text, false).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn a_transcript_is_cut_at_its_speakers() {
        let turns = transcript(
            "\n\nHuman: hi\n\nthere\n\nAssistant: yes: Human: no\n\nHuman: \n\nAssistant:",
        )
        .unwrap();
        let text = serde_json::to_string(&Cell::List(turns)).unwrap();
        assert_eq!(
            text,
            r#"[{"role":"user","content":"hi\n\nthere"},{"role":"assistant","content":"yes: Human: no"},{"role":"user","content":""},{"role":"assistant","content":""}]"#
        );
        assert_eq!(transcript("Human: a\n\nAssistant: b").unwrap().len(), 2);
        assert!(transcript("The text \n\nHuman: x").is_none());
        assert!(transcript("plain").is_none());
    }
}
