//! Answers against those of transformers, and what ends them.

use std::path::Path;

use chrono::NaiveDate;
use serde_json::Value;

use super::*;
use crate::inference::{Folders, Message};
use crate::ml::execution::Kind;

const GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden");

fn load() -> Loaded {
    let golden = Path::new(GOLDEN);
    let folders = Folders::with_adapter(golden.join("model"), golden.join("adapter_final"));
    let date = NaiveDate::from_ymd_opt(2024, 7, 26).unwrap();
    Loaded::open(&folders, false, None, date).unwrap()
}

fn options(repetition_penalty: f64) -> Options {
    Options {
        sampling: Sampling {
            repetition_penalty,
            ..Sampling::default()
        },
        seed: 0,
        max_new_tokens: 24,
        stop: Vec::new(),
    }
}

fn golden() -> Vec<Value> {
    let text = std::fs::read_to_string(format!("{GOLDEN}/sampling/answers.json")).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn prompt(row: &Value) -> Prompt {
    Prompt::from_json(row, None, false).unwrap()
}

#[expect(clippy::unnecessary_wraps, reason = "it stands for a listener")]
fn deaf(_: Option<Piece<'_>>) -> anyhow::Result<ControlFlow<()>> {
    Ok(ControlFlow::Continue(()))
}

#[test]
fn greedy_answers_are_those_of_transformers() {
    let loaded = load();
    let rows = golden();
    let prompts: Vec<Prompt> = rows.iter().map(prompt).collect();
    for kind in [Kind::Reference, Kind::default()] {
        let execution = Execution::new(loaded.model(), kind);
        for (side, base) in [("base", true), ("tuned", false)] {
            for penalty in [1., 1.3] {
                let mut voice = Voice::new(&loaded, &execution, base, 3, options(penalty)).unwrap();
                let mut heard = vec![String::new(); prompts.len()];
                let mut hear = |piece: Option<Piece<'_>>| {
                    if let Some(piece) = piece {
                        heard[piece.number].push_str(piece.text);
                    }
                    Ok(ControlFlow::Continue(()))
                };
                let replies = voice.answer(&prompts, &mut hear).unwrap();
                for ((row, reply), heard) in rows.iter().zip(&replies).zip(&heard) {
                    let golden = &row[format!("{side} {penalty:?}")];
                    assert_eq!(
                        reply.text,
                        golden["text"].as_str().unwrap(),
                        "{kind:?}, {side} {penalty}"
                    );
                    assert_eq!(&reply.text, heard);
                    assert_eq!(
                        reply.prompt_tokens as u64,
                        row["prompt_tokens"].as_u64().unwrap()
                    );
                    let ids = golden["ids"].as_array().unwrap();
                    assert_eq!(reply.completion_tokens, ids.len());
                    let reason = serde_json::to_value(reply.finish_reason).unwrap();
                    assert_eq!(reason, golden["finish_reason"]);
                }
            }
        }
    }
}

#[test]
fn a_conversation_that_goes_on_is_answered_as_if_it_were_new() {
    let loaded = load();
    for kind in [Kind::Reference, Kind::default()] {
        let execution = Execution::new(loaded.model(), kind);
        let voice = || Voice::new(&loaded, &execution, false, 1, options(1.)).unwrap();
        let mut messages = vec![Message::new("user", "Name a bird.")];
        let mut remembering = voice();
        for said in ["And a fish?", "Why?", "Thank you."] {
            let prompt = [Prompt::Chat(messages.clone())];
            let reply = remembering.go_on(&prompt, &mut deaf).unwrap();
            assert_eq!(
                reply[0].text,
                voice().go_on(&prompt, &mut deaf).unwrap()[0].text
            );
            messages.push(Message::new("assistant", reply[0].text.clone()));
            messages.push(Message::new("user", said));
        }
        // What was said is taken back.
        let other = [Prompt::said("Name a fish.", None)];
        let reply = remembering.go_on(&other, &mut deaf).unwrap();
        assert_eq!(
            reply[0].text,
            voice().go_on(&other, &mut deaf).unwrap()[0].text
        );
    }
}

#[test]
fn texts_end_an_answer_wherever_tokens_end() {
    let loaded = load();
    let execution = Execution::fastest(loaded.model());
    let prompts = [prompt(&golden()[0])];
    let ask = |stop: &[&str]| {
        let mut options = options(1.);
        options.stop = stop.iter().map(|text| (*text).to_owned()).collect();
        let mut voice = Voice::new(&loaded, &execution, false, 1, options).unwrap();
        let mut heard = String::new();
        let mut hear = |piece: Option<Piece<'_>>| {
            heard.push_str(piece.map_or("", |piece| piece.text));
            Ok(ControlFlow::Continue(()))
        };
        let reply = voice.answer(&prompts, &mut hear).unwrap().remove(0);
        assert_eq!(reply.text, heard);
        reply
    };
    let whole = ask(&[]);
    assert_eq!(whole.finish_reason, FinishReason::Length);
    // Of the middle of one token and the beginning of the next.
    let stop: String = whole.text.chars().skip(5).take(4).collect();
    let cut = ask(&[&stop, "never"]);
    assert_eq!(cut.finish_reason, FinishReason::Stop);
    assert_eq!(cut.text, whole.text[..whole.text.find(&stop).unwrap()]);
    assert!(cut.completion_tokens < whole.completion_tokens);
    // One that only seems to come is not left out.
    let nearly = format!("{stop}\u{7}");
    assert_eq!(ask(&[&nearly]).text, whole.text);
}

#[test]
fn an_answer_can_be_interrupted_and_the_conversation_goes_on() {
    let loaded = load();
    let execution = Execution::fastest(loaded.model());
    let mut voice = Voice::new(&loaded, &execution, false, 1, options(1.)).unwrap();
    let prompts = [prompt(&golden()[0])];
    let mut steps = 0;
    let mut hear = |piece: Option<Piece<'_>>| {
        steps += usize::from(piece.is_none());
        Ok(if steps > 6 {
            ControlFlow::Break(())
        } else {
            ControlFlow::Continue(())
        })
    };
    let reply = voice.go_on(&prompts, &mut hear).unwrap().remove(0);
    assert_eq!(reply.finish_reason, FinishReason::Interrupted);
    assert!(reply.completion_tokens < 24);
    let whole = voice.go_on(&prompts, &mut deaf).unwrap().remove(0);
    assert!(whole.text.starts_with(&reply.text));
    assert_eq!(whole.completion_tokens, 24);
}

#[test]
fn drawn_answers_depend_on_the_seed_and_the_number_alone() {
    let loaded = load();
    let execution = Execution::fastest(loaded.model());
    let rows = golden();
    let prompts: Vec<Prompt> = rows.iter().map(prompt).collect();
    let ask = |seed, at_once: usize| {
        let mut options = options(1.);
        options.sampling.do_sample = true;
        options.seed = seed;
        let mut voice = Voice::new(&loaded, &execution, false, at_once, options).unwrap();
        let mut texts = Vec::new();
        for prompts in prompts.chunks(at_once) {
            let replies = voice.answer(prompts, &mut deaf).unwrap();
            texts.extend(replies.into_iter().map(|reply| reply.text));
        }
        texts
    };
    assert_eq!(ask(1, 3), ask(1, 2));
    assert_ne!(ask(1, 3), ask(2, 3));
}

#[test]
fn what_does_not_fit_is_a_sentence() {
    let loaded = load();
    let execution = Execution::fastest(loaded.model());
    let mut voice = Voice::new(&loaded, &execution, false, 1, options(1.)).unwrap();
    let long = [Prompt::said(&"word ".repeat(5000), None)];
    let error = voice.go_on(&long, &mut deaf).unwrap_err().to_string();
    assert!(error.contains("the model takes"), "{error}");
    let mut bad = options(1.);
    bad.sampling.top_p = 2.;
    assert!(voice.set(bad).is_err());
}
