//! Tests of `preference`.

use std::path::Path;

use proptest::prelude::*;
use serde::Deserialize;

use super::*;

const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model");

fn tokenizer(eos: &str) -> Tokenizer {
    let mut tokenizer = Tokenizer::load(Path::new(MODEL)).unwrap();
    tokenizer.eos = Some(tokenizer.token(eos).unwrap());
    tokenizer
}

#[derive(Deserialize)]
struct Text {
    row: usize,
    keep_empty_system: bool,
    prompt: String,
    chosen: String,
    rejected: String,
}

#[derive(Deserialize)]
struct Golden {
    row: usize,
    semantics: String,
    eos: String,
    max_length: usize,
    max_prompt_length: Option<usize>,
    truncation_mode: Option<String>,
    chosen_input_ids: Vec<u32>,
    chosen_labels: Vec<i64>,
    rejected_input_ids: Vec<u32>,
    rejected_labels: Vec<i64>,
}

fn lines<T: for<'de> Deserialize<'de>>(text: &str) -> Vec<T> {
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

fn texts() -> Vec<Text> {
    let mut texts: Vec<Text> = lines(include_str!("../../../tests/golden/rendered.jsonl"));
    texts.retain(|text| !text.keep_empty_system);
    texts
}

fn labels(side: &SideIds) -> Vec<i64> {
    let answer = side.answer.iter().map(|id| i64::from(*id));
    std::iter::repeat_n(-100, side.prompt.len())
        .chain(answer)
        .collect()
}

fn ids(side: &SideIds) -> Vec<u32> {
    [side.prompt.as_slice(), side.answer.as_slice()].concat()
}

#[test]
fn ids_and_labels_are_trls_under_both_truncations() {
    let texts = texts();
    let golden: Vec<Golden> = lines(include_str!("../../../tests/golden/tokenised.jsonl"));
    assert_eq!((texts.len(), golden.len()), (28, 168));
    let (mut dropped, mut cut) = (0, 0);
    for case in &golden {
        let text = &texts[case.row];
        assert_eq!(text.row, case.row);
        let tokenizer = tokenizer(&format!("<|{}|>", case.eos));
        let truncation = match case.max_prompt_length {
            None => Truncation::Answers {
                max_length: case.max_length,
            },
            Some(max_prompt_length) => Truncation::PromptThenAnswers {
                max_length: case.max_length,
                max_prompt_length,
                keep_end: case.truncation_mode.as_deref() == Some("keep_end"),
            },
        };
        let row = encode(
            &tokenizer,
            &text.prompt,
            &text.chosen,
            Some(&text.rejected),
            truncation,
        )
        .unwrap();
        let name = format!(
            "row {} {} {} {:?}",
            case.row, case.semantics, case.eos, case.truncation_mode
        );
        match row {
            Ok(row) => {
                cut += usize::from(row.prompt_cut || row.answer_cut);
                let rejected = row.rejected.unwrap();
                assert_eq!(ids(&row.chosen), case.chosen_input_ids, "{name}");
                assert_eq!(labels(&row.chosen), case.chosen_labels, "{name}");
                assert_eq!(ids(&rejected), case.rejected_input_ids, "{name}");
                assert_eq!(labels(&rejected), case.rejected_labels, "{name}");
            }
            Err(cause) => {
                // TRL keeps such a row, with nothing to learn from and a NaN for a loss.
                dropped += 1;
                assert_eq!(cause, SkipReason::PromptTooLong, "{name}");
                let without_answer = [&case.chosen_labels, &case.rejected_labels]
                    .iter()
                    .any(|labels| labels.iter().all(|l| *l == -100));
                assert!(without_answer, "{name}");
            }
        }
    }
    assert!(dropped > 0 && cut > 0, "{dropped} {cut}");
}

#[test]
fn a_merge_across_the_border_moves_one_token_into_the_answer() {
    let tokenizer = tokenizer("<|eot_id|>");
    let truncation = Truncation::Answers { max_length: 100 };
    // `in` + `d` merge to one token, `in` + `5` don't.
    let row = encode(&tokenizer, "in", "d", Some("5"), truncation)
        .unwrap()
        .unwrap();
    let rejected = row.rejected.unwrap();
    assert_eq!(row.chosen.prompt.len() + 1, rejected.prompt.len());
    assert_eq!(tokenizer.decode(&ids(&row.chosen), true).unwrap(), "ind");
    assert_eq!(tokenizer.decode(&ids(&rejected), true).unwrap(), "in5");
}

#[test]
fn bos_and_eos_are_never_doubled() {
    let tokenizer = tokenizer("<|eot_id|>");
    let truncation = Truncation::Answers { max_length: 100 };
    for (prompt, answer) in [("a", "b"), ("<|begin_of_text|>a", "b<|eot_id|>")] {
        let row = encode(&tokenizer, prompt, answer, None, truncation)
            .unwrap()
            .unwrap();
        let all = ids(&row.chosen);
        assert_eq!(all.iter().filter(|id| **id == 1018).count(), 1);
        assert_eq!(all.iter().filter(|id| **id == 1022).count(), 1);
        assert_eq!((all.first(), all.last()), (Some(&1018), Some(&1022)));
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn any_texts_fit_or_are_dropped(
        prompt in ".{0,60}", chosen in ".{0,40}", rejected in ".{0,40}",
        max_length in 2_usize..40, part in 1_usize..39, keep_end: bool, legacy: bool,
    ) {
        let max_prompt_length = part.min(max_length - 1);
        let truncation = if legacy {
            Truncation::PromptThenAnswers { max_length, max_prompt_length, keep_end }
        } else {
            Truncation::Answers { max_length }
        };
        let row = encode(&tokenizer("<|eot_id|>"), &prompt, &chosen, Some(&rejected), truncation).unwrap();
        if let Ok(row) = row {
            for side in [&row.chosen, row.rejected.as_ref().unwrap()] {
                prop_assert!(!side.answer.is_empty());
                prop_assert!(ids(side).len() <= max_length);
            }
        }
    }
}

/// A preparation by `SFTTrainer`.
#[derive(Deserialize)]
struct Prepared {
    kind: String,
    eos: String,
    max_length: usize,
    texts: Vec<Part>,
    rows: Vec<Labelled>,
}

#[derive(Deserialize)]
struct Part {
    prompt: String,
    answer: String,
}

#[derive(Deserialize)]
struct Labelled {
    ids: Vec<u32>,
    labels: Vec<i64>,
}

#[test]
fn answers_alone_have_the_ids_and_labels_of_sft_trainer() {
    let cases = include_str!("../../../tests/golden/sft/ids.json");
    let cases: Vec<Prepared> = serde_json::from_str(cases).unwrap();
    assert_eq!(cases.len(), 6);
    for case in &cases {
        let tokenizer = tokenizer(&case.eos);
        let truncation = Truncation::Answers {
            max_length: case.max_length,
        };
        let encode = |part: &Part| encode_alone(&tokenizer, &part.prompt, &part.answer, truncation);
        let rows = case.texts.iter().map(|part| encode(part).unwrap());
        // SFTTrainer leaves out what has no label left.
        let rows: Vec<RowIds> = rows.filter_map(Result::ok).collect();
        assert_eq!(rows.len(), case.rows.len(), "{} {}", case.kind, case.eos);
        for (row, expected) in rows.iter().zip(&case.rows) {
            assert_eq!(ids(&row.chosen), expected.ids, "{} {}", case.kind, case.eos);
            assert_eq!(labels(&row.chosen), expected.labels);
            assert_eq!((row.bos_added, row.eos_added), (0, 0));
        }
    }
}
