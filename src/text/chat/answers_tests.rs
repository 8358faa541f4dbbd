//! Tests of `Renderer::render_answers`, and of the masks that `encode_turns` makes of it.

use std::collections::BTreeMap;
use std::path::Path;

use minijinja::value::Serde;
use serde::Deserialize;

use super::super::builtin::BuiltIn;
use super::super::preference::{RowIds, Truncation, encode_turns};
use super::super::template::LLAMA3;
use super::super::tokenizer::{Tokenizer, special_tokens};
use super::*;
use crate::data::cell::Cell;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

fn tokenizer() -> Tokenizer {
    Tokenizer::load(&Path::new(GOLDEN).join("model")).unwrap()
}

fn renderer(source: &str) -> Renderer {
    let tokens = special_tokens(&Path::new(GOLDEN).join("model")).unwrap();
    Renderer::new(ChatTemplate::new(source, tokens, None).unwrap(), false)
}

fn value(cell: &Cell) -> Value {
    Value::from(Serde(cell.clone()))
}

fn conversation(messages: &[(&str, &str)]) -> ChatRow {
    let messages = messages
        .iter()
        .map(|(role, content)| message(role, content));
    ChatRow {
        messages: Some(messages.collect()),
        ..ChatRow::default()
    }
}

/// What the assistant says in a row, and all that the template prints.
fn answers(source: &str, row: ChatRow) -> Result<(Vec<String>, String)> {
    let rendered = renderer(source).render_answers(row)?;
    let text = rendered.prompt + &rendered.chosen;
    let answers = rendered.answers.unwrap_or_default().into_iter();
    let answers = answers.map(|range| text[range].to_owned()).collect();
    Ok((answers, text))
}

fn encoded(source: &str, row: ChatRow, max_length: usize) -> RowIds {
    let rendered = renderer(source).render_answers(row).unwrap();
    let ranges = rendered.answers.unwrap();
    let truncation = Truncation::Answers { max_length };
    encode_turns(
        &tokenizer(),
        &rendered.prompt,
        &rendered.chosen,
        &ranges,
        truncation,
    )
    .unwrap()
    .unwrap()
}

#[derive(Deserialize)]
struct Trained {
    messages: Vec<Cell>,
    ids: Vec<u32>,
    labels: Vec<i64>,
}

#[derive(Deserialize)]
struct Training {
    rows: Vec<Trained>,
}

/// By `{% generation %}` tags, and turn by turn with a template that prints the same without them.
#[test]
fn ids_and_labels_are_those_of_trl() {
    let golden = include_str!("../../../tests/golden/sft/assistant.json");
    let golden: Training = serde_json::from_str(golden).unwrap();
    let tagged = include_str!("../../../tests/golden/templates/llama3_generation.jinja");
    assert_eq!(golden.rows.len(), 12);
    for source in [tagged, LLAMA3] {
        for row in &golden.rows {
            let chat = ChatRow {
                messages: Some(row.messages.iter().map(value).collect()),
                ..ChatRow::default()
            };
            let made = encoded(source, chat, 256);
            assert_eq!(made.chosen.answer, row.ids);
            let learnt: Vec<bool> = row.labels.iter().map(|label| *label != -100).collect();
            assert_eq!(made.assistant_masks, Some(learnt));
        }
    }
}

#[derive(Deserialize)]
struct Case {
    template: String,
    conversation: String,
    messages: Vec<Cell>,
    #[serde(default)]
    tools: Option<Vec<Cell>>,
    ids: Vec<u32>,
    mask: String,
}

#[derive(Deserialize)]
struct Cases {
    templates: BTreeMap<String, String>,
    cases: Vec<Case>,
}

#[test]
fn masks_of_generation_tags_are_those_of_transformers() {
    let golden = include_str!("../../../tests/golden/templates/masks.json");
    let golden: Cases = serde_json::from_str(golden).unwrap();
    assert!(golden.cases.len() > 35, "{}", golden.cases.len());
    for case in &golden.cases {
        let chat = ChatRow {
            messages: Some(case.messages.iter().map(value).collect()),
            extras: Extras {
                tools: case
                    .tools
                    .as_ref()
                    .map(|tools| tools.iter().map(value).collect()),
                ..Extras::default()
            },
            ..ChatRow::default()
        };
        let made = encoded(&golden.templates[&case.template], chat, usize::MAX);
        let name = format!("{}, {}", case.template, case.conversation);
        assert_eq!(made.chosen.answer, case.ids, "{name}");
        let mask = made.assistant_masks.unwrap();
        let mask: String = mask
            .iter()
            .map(|learnt| if *learnt { '1' } else { '0' })
            .collect();
        assert_eq!(mask, case.mask, "{name}");
    }
}

#[test]
fn turns_are_found_by_rendering_where_a_template_has_no_tags() {
    let row = || {
        conversation(&[
            ("system", "S"),
            ("user", "a"),
            ("assistant", "b c"),
            ("user", "d"),
            ("assistant", "e"),
        ])
    };
    for (template, expected) in [
        (BuiltIn::Llama3, ["b c<|eot_id|>", "e<|eot_id|>"]),
        (BuiltIn::Chatml, ["b c<|im_end|>\n", "e<|im_end|>\n"]),
        (BuiltIn::Gemma, ["b c<end_of_turn>\n", "e<end_of_turn>\n"]),
        (
            BuiltIn::Mistral,
            [" b c<|end_of_text|>", " e<|end_of_text|>"],
        ),
        // The EOS is printed once, at the end.
        (BuiltIn::Phi3, ["b c<|end|>\n", "e<|end|>\n<|end_of_text|>"]),
        (
            BuiltIn::Zephyr,
            ["b c<|end_of_text|>\n", "e<|end_of_text|>\n"],
        ),
        (BuiltIn::Alpaca, ["b c<|end_of_text|>", "e<|end_of_text|>"]),
        // By its tags: only the last turn has room for thinking.
        (
            BuiltIn::Qwen3,
            ["b c<|im_end|>\n", "<think>\n\n</think>\n\ne<|im_end|>\n"],
        ),
    ] {
        let (said, _) = answers(template.source(), row()).unwrap();
        assert_eq!(said, expected, "{}", template.name());
    }
}

#[test]
fn templates_whose_turns_change_are_refused_with_the_message() {
    // As Qwen3, but without tags.
    let qwen3 = BuiltIn::Qwen3.source();
    let untagged = qwen3
        .replace("{%- generation -%}", "")
        .replace("{%- endgeneration -%}", "");
    let one = conversation(&[("user", "a"), ("assistant", "b")]);
    assert_eq!(
        answers(&untagged, one).unwrap().0,
        ["<think>\n\n</think>\n\nb<|im_end|>\n"]
    );
    let two = || {
        conversation(&[
            ("user", "a"),
            ("assistant", "b"),
            ("user", "c"),
            ("assistant", "d"),
        ])
    };
    let error = answers(&untagged, two()).unwrap_err().to_string();
    assert!(
        error.contains("message 2") && error.contains("when more follows"),
        "{error}"
    );
    assert!(error.contains("{% generation %}"), "{error}");
    // The generation prompt begins thinking, which the answer then lacks.
    let thinks = "{% for m in messages %}[{{ m.role }}]{{ m.content }};{% endfor %}{% if add_generation_prompt %}[assistant]<think>{% endif %}";
    let error = answers(thinks, two()).unwrap_err().to_string();
    assert!(error.contains("still to come"), "{error}");
    let short = "{{ raise_exception('short') if messages | length < 2 }}x";
    let error = answers(short, two()).unwrap_err();
    assert!(format!("{error:#}").contains("short"), "{error:#}");
}

#[test]
fn prompts_keep_their_border_and_their_answers_count() {
    let row = ChatRow {
        prompt: Some(Side::Messages(vec![
            message("user", "a"),
            message("assistant", "b"),
            message("user", "c"),
        ])),
        chosen: Some(Side::Text("d".to_owned())),
        ..ChatRow::default()
    };
    let rendered = renderer(BuiltIn::Chatml.source())
        .render_answers(row)
        .unwrap();
    assert!(rendered.prompt.ends_with("<|im_start|>assistant\n"));
    assert_eq!(rendered.chosen, "d<|im_end|>\n");
    let whole = rendered.prompt + &rendered.chosen;
    let said: Vec<&str> = rendered
        .answers
        .unwrap()
        .into_iter()
        .map(|range| &whole[range])
        .collect();
    assert_eq!(said, ["b<|im_end|>\n", "d<|im_end|>\n"]);
}

#[test]
fn rows_without_known_turns_are_refused() {
    let chatml = BuiltIn::Chatml.source();
    let rejected = ChatRow {
        prompt: Some(Side::Text("a".to_owned())),
        chosen: Some(Side::Text("b".to_owned())),
        rejected: Some(Side::Text("c".to_owned())),
        ..ChatRow::default()
    };
    let error = answers(chatml, rejected).unwrap_err().to_string();
    assert!(error.contains("`rejected`"), "{error}");
    let rendered = ChatRow {
        prompt: Some(Side::Text(
            "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n".to_owned(),
        )),
        chosen: Some(Side::Text("b<|im_end|>\n".to_owned())),
        ..ChatRow::default()
    };
    let error = answers(chatml, rendered).unwrap_err().to_string();
    assert!(error.contains("rendered already"), "{error}");
    // Nothing is said: left to the caller.
    let (said, text) = answers(chatml, conversation(&[("user", "a")])).unwrap();
    assert_eq!(
        (said.len(), text.as_str()),
        (0, "<|im_start|>user\na<|im_end|>\n")
    );
}

#[test]
fn a_cut_conversation_loses_its_last_turns() {
    let row = || {
        conversation(&[
            ("user", "a"),
            ("assistant", "b"),
            ("user", "c"),
            ("assistant", "d"),
        ])
    };
    let whole = encoded(LLAMA3, row(), usize::MAX);
    let masks = whole.assistant_masks.unwrap();
    let first = masks.iter().position(|learnt| *learnt).unwrap();
    let cut = encoded(LLAMA3, row(), first + 1);
    assert_eq!(cut.chosen.answer, whole.chosen.answer[..=first]);
    assert_eq!(cut.assistant_masks.as_deref(), Some(&masks[..=first]));
    let rendered = renderer(LLAMA3).render_answers(row()).unwrap();
    let none = encode_turns(
        &tokenizer(),
        "",
        &rendered.chosen,
        &rendered.answers.unwrap(),
        Truncation::Answers { max_length: first },
    );
    assert_eq!(none.unwrap().unwrap_err().name(), "no_assistant_token");
}
