//! Tests of `chat`.

use std::collections::BTreeMap;

use minijinja::Value;
use minijinja::value::Serde;
use proptest::prelude::*;
use serde::Deserialize;

use super::super::template::LLAMA3;
use super::*;

fn renderer(source: &str, keep_empty_system: bool) -> Renderer {
    let tokens = [
        ("bos_token", "<|begin_of_text|>"),
        ("eos_token", "<|end_of_text|>"),
    ];
    let tokens: BTreeMap<_, _> = tokens
        .iter()
        .map(|(name, token)| ((*name).into(), (*token).into()))
        .collect();
    Renderer::new(
        ChatTemplate::new(source, tokens, None).unwrap(),
        keep_empty_system,
    )
}

#[expect(clippy::unnecessary_wraps, reason = "as the fields are")]
fn text(text: &str) -> Option<Side> {
    Some(Side::Text(text.to_owned()))
}

#[expect(clippy::unnecessary_wraps, reason = "as the fields are")]
fn list(messages: &[(&str, &str)]) -> Option<Side> {
    Some(Side::Messages(
        messages
            .iter()
            .map(|(role, content)| message(role, content))
            .collect(),
    ))
}

#[derive(Deserialize)]
struct Row {
    system: String,
    prompt: String,
    chosen: String,
    rejected: String,
}

impl Row {
    fn chat(&self) -> ChatRow {
        ChatRow {
            system: Some(self.system.clone()),
            prompt: text(&self.prompt),
            chosen: text(&self.chosen),
            rejected: text(&self.rejected),
            ..ChatRow::default()
        }
    }
}

#[derive(Deserialize)]
struct Golden {
    row: usize,
    keep_empty_system: bool,
    messages: serde_json::Value,
    prompt: String,
    chosen: String,
    rejected: String,
    full_chosen: String,
    no_generation_prompt: String,
}

fn lines<T: for<'de> Deserialize<'de>>(text: &str) -> Vec<T> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn rows_render_as_trl_and_transformers_render_them() {
    let mut rows: Vec<Row> = lines(include_str!("../../../tests/golden/rows.jsonl"));
    rows.extend(lines::<Row>(include_str!(
        "../../../tests/golden/edge_rows.jsonl"
    )));
    let golden: Vec<Golden> = lines(include_str!("../../../tests/golden/rendered.jsonl"));
    assert_eq!((rows.len(), golden.len()), (28, 45));
    let reference = include_str!("../../../tests/golden/model/chat_template.jinja");
    for source in [LLAMA3, reference] {
        for case in &golden {
            let renderer = renderer(source, case.keep_empty_system);
            let row = renderer.render(rows[case.row].chat()).unwrap();
            assert_eq!(row.prompt, case.prompt, "row {}", case.row);
            assert_eq!(row.chosen, case.chosen, "row {}", case.row);
            assert_eq!(
                row.rejected.as_ref(),
                Some(&case.rejected),
                "row {}",
                case.row
            );
            assert_eq!(
                row.prompt + &row.chosen,
                case.full_chosen,
                "row {}",
                case.row
            );
            let messages: Vec<Value> = Value::from(Serde(&case.messages))
                .try_iter()
                .unwrap()
                .collect();
            assert_eq!(
                renderer.template().render(&messages, false).unwrap(),
                case.no_generation_prompt
            );
            let as_lists = ChatRow {
                prompt: Some(Side::Messages(messages)),
                chosen: list(&[("assistant", &rows[case.row].chosen)]),
                rejected: list(&[("assistant", &rows[case.row].rejected)]),
                ..ChatRow::default()
            };
            assert_eq!(renderer.render(as_lists).unwrap().chosen, case.chosen);
        }
    }
}

const PLAIN: &str = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}";

#[test]
fn lists_that_hold_the_whole_conversation_are_split_where_they_part() {
    let chosen = [
        ("user", "q"),
        ("assistant", "a"),
        ("user", "r"),
        ("assistant", "good"),
    ];
    let mut rejected = chosen;
    rejected[3].1 = "bad";
    let expected = (
        "<user>q</><assistant>a</><user>r</><assistant>",
        "good</>",
        "bad</>",
    );
    for prompt in [None, text("q"), list(&chosen[..3])] {
        let row = ChatRow {
            prompt,
            chosen: list(&chosen),
            rejected: list(&rejected),
            ..ChatRow::default()
        };
        let row = renderer(PLAIN, false).render(row).unwrap();
        assert_eq!(
            (
                row.prompt.as_str(),
                row.chosen.as_str(),
                row.rejected.as_deref()
            ),
            (expected.0, expected.1, Some(expected.2))
        );
    }
}

#[test]
fn conversations_without_a_second_answer_end_in_their_last_answer() {
    let row = ChatRow {
        system: Some("s".into()),
        messages: Some(vec![
            message("user", "q"),
            message("assistant", "a"),
            message("user", "thanks"),
        ]),
        ..ChatRow::default()
    };
    let row = renderer(PLAIN, false).render(row).unwrap();
    assert_eq!(
        (row.prompt.as_str(), row.chosen.as_str()),
        ("<system>s</><user>q</><assistant>", "a</>")
    );
    assert_eq!(row.rejected, None);
    let row = ChatRow {
        prompt: text("q"),
        chosen: text("a"),
        ..ChatRow::default()
    };
    assert_eq!(
        renderer(PLAIN, false).render(row).unwrap().prompt,
        "<user>q</><assistant>"
    );
}

#[test]
fn an_answer_may_continue_the_assistants_own_words() {
    let row = ChatRow {
        prompt: list(&[("user", "q"), ("assistant", "I think")]),
        chosen: list(&[("assistant", "yes")]),
        rejected: list(&[("assistant", "no")]),
        ..ChatRow::default()
    };
    let row = renderer(PLAIN, false).render(row).unwrap();
    assert_eq!(row.prompt, "<user>q</><assistant>I think");
    assert_eq!(row.chosen, "</><assistant>yes</>");
}

#[test]
fn a_template_that_opens_differently_than_it_renders_moves_the_border() {
    // As DeepSeek-R1's: the generation prompt holds more than the rendered conversation does.
    let source = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<assistant><think>{% endif %}";
    let row = ChatRow {
        prompt: text("q"),
        chosen: text("<tick>"),
        rejected: text("b"),
        ..ChatRow::default()
    };
    let row = renderer(source, false).render(row).unwrap();
    assert_eq!(row.prompt, "<user>q<assistant>");
    assert_eq!(
        (row.chosen.as_str(), row.rejected.as_deref()),
        ("<tick>", Some("b"))
    );
}

#[test]
fn text_that_was_rendered_already_is_not_rendered_twice() {
    let renderer = renderer(LLAMA3, false);
    let row = || ChatRow {
        prompt: text("q"),
        chosen: text("good"),
        rejected: text("bad"),
        ..ChatRow::default()
    };
    let once = renderer.render(row()).unwrap();
    assert_eq!(once.seen, Seen::default());
    let whole = |answer: &str| text(&(once.prompt.clone() + answer));
    let rejected = once.rejected.clone().unwrap();
    for (prompt, chosen, rejected) in [
        (text(&once.prompt), text(&once.chosen), text(&rejected)),
        (text(&once.prompt), whole(&once.chosen), whole(&rejected)),
        (text("q"), whole(&once.chosen), whole(&rejected)),
        (None, whole(&once.chosen), whole(&rejected)),
    ] {
        let again = renderer
            .render(ChatRow {
                prompt,
                chosen,
                rejected,
                ..ChatRow::default()
            })
            .unwrap();
        assert_eq!(
            again,
            Rendered {
                seen: Seen {
                    already_rendered: true,
                    ..Seen::default()
                },
                ..once.clone()
            }
        );
    }
    for mention in ["<|eot_id|> ends a turn", "<|eot_id|> or <|end_header_id|>?"] {
        let rendered = renderer
            .render(ChatRow {
                prompt: text(mention),
                ..row()
            })
            .unwrap();
        assert!(mention.contains(&rendered.seen.special_token.unwrap()));
        assert_eq!(
            rendered.prompt,
            once.prompt.replace("\n\nq<", &format!("\n\n{mention}<"))
        );
    }
}

#[test]
fn html_and_templates_without_a_generation_prompt_are_no_rendered_rows() {
    let mistral = "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}";
    let tokens = [("bos_token", "<s>"), ("eos_token", "</s>")];
    let tokens = tokens.map(|(name, token)| (name.to_owned(), token.to_owned()));
    let renderer = Renderer::new(
        ChatTemplate::new(mistral, tokens.into(), None).unwrap(),
        false,
    );
    let row = |prompt: &str, chosen: &str| ChatRow {
        prompt: text(prompt),
        chosen: text(chosen),
        ..ChatRow::default()
    };
    let html = renderer.render(row("<s>old</s> new", "<s>a</s>")).unwrap();
    assert_eq!(html.prompt, "<s>[INST] <s>old</s> new [/INST]");
    assert_eq!(
        (html.chosen.as_str(), html.seen.already_rendered),
        ("<s>a</s></s>", false)
    );
    assert!(html.seen.special_token.is_some());
    for prompt in ["<s>[INST] q [/INST]", "[INST] q [/INST]"] {
        let whole = renderer.render(row(prompt, " a</s>")).unwrap();
        assert_eq!(
            (whole.prompt.as_str(), whole.seen.already_rendered),
            (prompt, true)
        );
    }
    let other = renderer
        .render(row("<|im_start|>user\nq<|im_end|>\n", "a"))
        .unwrap();
    assert!(other.seen.of_another_template && !other.seen.already_rendered);
}

#[test]
fn a_prompt_that_the_answer_continues_keeps_its_space() {
    let chosen = |content: &str, source: &str| {
        let row = ChatRow {
            prompt: list(&[("user", "q"), ("assistant", content)]),
            chosen: list(&[("assistant", "yes")]),
            ..ChatRow::default()
        };
        renderer(source, false).render(row).unwrap().prompt
    };
    assert_eq!(chosen(" I think ", PLAIN), "<user>q</><assistant> I think ");
    let trims = PLAIN.replace("m.content", "m.content | trim");
    assert_eq!(chosen(" I think ", &trims), "<user>q</><assistant>I think");
    // What was said before is not taken for the end.
    let twice = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}(I)";
    assert_eq!(chosen("I", twice), "<user>q</><assistant>I");
}

#[test]
fn turns_that_are_not_learnt_are_noted() {
    let conversation = |roles: &[&str]| ChatRow {
        messages: Some(roles.iter().map(|role| message(role, "x")).collect()),
        ..ChatRow::default()
    };
    let seen = |roles: &[&str]| {
        renderer(PLAIN, false)
            .render(conversation(roles))
            .unwrap()
            .seen
    };
    let two = seen(&["user", "assistant", "user", "assistant", "user"]);
    assert_eq!((two.earlier_answers, two.end_left_out), (1, true));
    let one = seen(&["system", "user", "assistant"]);
    assert_eq!((one.earlier_answers, one.end_left_out), (0, false));
}

#[test]
fn tools_and_variables_of_the_row_reach_the_template() {
    let source = "{% if tools %}{{ tools[0].name }}:{% endif %}{% if think is defined and not think %}quick:{% endif %}{{ messages[0].content }}{{ bos_token }}";
    let extras = Extras {
        tools: Some(Value::from(vec![Value::from_pairs([("name", "f")])])),
        variables: [
            ("think".to_owned(), Value::from(false)),
            ("bos_token".to_owned(), Value::from("!")),
        ]
        .into(),
    };
    let row = ChatRow {
        prompt: text("q"),
        chosen: text("a"),
        extras,
        ..ChatRow::default()
    };
    let rendered = renderer(source, false).render(row).unwrap();
    assert_eq!(rendered.prompt, "f:quick:q!");
}

#[test]
fn rows_that_lack_something_say_what() {
    let cases = [
        (ChatRow::default(), "neither `chosen` nor `messages`"),
        (
            ChatRow {
                rejected: text("x"),
                ..ChatRow::default()
            },
            "no `chosen`",
        ),
        (
            ChatRow {
                chosen: text("x"),
                ..ChatRow::default()
            },
            "no `prompt`",
        ),
        (
            ChatRow {
                prompt: text("p"),
                chosen: text("x"),
                rejected: list(&[]),
                ..ChatRow::default()
            },
            "`rejected` is messages",
        ),
        (
            ChatRow {
                chosen: list(&[]),
                rejected: list(&[]),
                ..ChatRow::default()
            },
            "`chosen` has no message",
        ),
        (
            ChatRow {
                chosen: list(&[("user", "a"), ("assistant", "x")]),
                rejected: list(&[("user", "b"), ("assistant", "y")]),
                ..ChatRow::default()
            },
            "begin with different messages",
        ),
        (
            ChatRow {
                messages: Some(vec![message("user", "x")]),
                ..ChatRow::default()
            },
            "role `assistant`",
        ),
    ];
    for (row, expected) in cases {
        let error = format!("{:#}", renderer(PLAIN, false).render(row).unwrap_err());
        assert!(error.contains(expected), "{error}");
    }
}

proptest! {
    #[test]
    fn prompt_and_answer_join_to_the_whole_conversation(
        system in proptest::option::of("\\PC{0,20}"), prompt in "(?s).{0,40}", chosen in "(?s).{0,40}", rejected in "(?s).{0,40}", llama: bool,
    ) {
        let renderer = renderer(if llama { LLAMA3 } else { PLAIN }, true);
        let mut messages: Vec<Value> = system.iter().map(|system| message("system", system)).collect();
        messages.push(message("user", &prompt));
        let row = ChatRow { system, prompt: text(&prompt), chosen: text(&chosen), rejected: text(&rejected), ..ChatRow::default() };
        let row = renderer.render(row).unwrap();
        prop_assume!(!row.seen.already_rendered);
        for (answer, rendered) in [(&chosen, &row.chosen), (&rejected, row.rejected.as_ref().unwrap())] {
            let whole: Vec<Value> = messages.iter().cloned().chain([message("assistant", answer)]).collect();
            prop_assert_eq!(format!("{}{rendered}", row.prompt), renderer.template().render(&whole, false).unwrap());
        }
    }

    #[test]
    fn any_messages_are_text_or_an_error(roles in proptest::collection::vec("[a-z]{0,9}", 0..4), content in "\\PC{0,9}", same: bool) {
        let chosen: Vec<Value> = roles.iter().map(|role| message(role, &content)).collect();
        let mut rejected = chosen.clone();
        if !same { rejected.pop(); }
        let row = ChatRow { chosen: Some(Side::Messages(chosen)), rejected: Some(Side::Messages(rejected)), ..ChatRow::default() };
        let _ = renderer(LLAMA3, false).render(row);
    }
}
