//! Text generation beside the reference.

use super::super::decode;
use super::*;
use crate::ml::backend::Token;
use crate::ml::generate::greedy;
use crate::ml::model::Cache;

pub(super) const SEQUENCES: [&[u32]; 3] = [&[5, 90, 7, 300, 41, 2], &[500], &[12, 13, 14]];

/// Whether a decoder of these sequences, none longer than 6, gives the reference's logits. Returns those behind each.
pub(super) fn continues(
    decoder: &mut dyn crate::ml::backend::Decoder,
    model: &CausalLm,
    pass: Pass,
    within: f32,
) -> Vec<Vec<f32>> {
    let vocabulary = model.arch.vocab_size;
    // A token of each text at a time, as long as it has some, so that they stand beside each other.
    let mut last = vec![Vec::new(); SEQUENCES.len()];
    for at in 0..6 {
        let tokens: Vec<Token> = (0..SEQUENCES.len())
            .filter_map(|sequence| Some((sequence, SEQUENCES[sequence].get(at)?)))
            .map(|(sequence, &id)| Token { sequence, id })
            .collect();
        let wanted: Vec<usize> = (0..tokens.len()).collect();
        let logits = decoder.step(&tokens, &wanted).unwrap();
        for (token, logits) in tokens.iter().zip(logits.chunks_exact(vocabulary)) {
            last[token.sequence] = logits.to_vec();
        }
    }
    for (sequence, ids) in SEQUENCES.iter().enumerate() {
        let plain = model.next_logits(ids, &mut Cache::default(), pass).unwrap();
        let largest = plain.iter().fold(0f32, |most, x| most.max(x.abs()));
        let pairs = plain.iter().zip(&last[sequence]);
        let far = pairs.fold(0f32, |far, (a, b)| far.max((a - b).abs()));
        assert!(far < within * largest, "{sequence}: {far}");
    }
    let full = Token { sequence: 0, id: 1 };
    let error = decoder.step(&[full], &[]).unwrap_err().to_string();
    assert!(error.contains("beyond its longest length"), "{error}");
    last
}

#[test]
fn decoding_gives_the_reference_s_logits() {
    for (base, compute, within) in [
        ("model", DType::F32, 1e-4),
        ("model_nf4", DType::F32, 1e-4),
        ("model", DType::BF16, 3e-2),
    ] {
        let model = golden::model(base, Some("adapter_final"), Trained::Nothing, compute);
        for pass in [Pass::BASE, Pass::INFER] {
            let mut decoder = decode::Decoder::new(&model, SEQUENCES.len(), 6, pass)
                .unwrap()
                .unwrap();
            continues(&mut decoder, &model, pass, within);
        }
    }
    let half = golden::model("model", None, Trained::Nothing, DType::F16);
    let none = decode::Decoder::new(&half, 1, 1, Pass::BASE).unwrap();
    assert!(none.is_none(), "the kernels don't multiply in f16");
}

/// Prompts of unlike lengths, longer than what goes through the model at a time.
#[test]
fn both_backends_answer_alike() {
    let model = golden::model("model", Some("adapter_final"), Trained::Nothing, DType::F32);
    let long: Vec<u32> = (0..70).map(|at| at * 37 % 1000).collect();
    let prompts: [&[u32]; 3] = [&long, &[5, 90, 7], &long[3..40]];
    let answers = |kind, prompts: &[&[u32]]| {
        let execution = Execution::new(&model, kind);
        assert_eq!(execution.kind(), kind);
        greedy(&execution, prompts, 12, &[], Pass::INFER, &mut || Ok(())).unwrap()
    };
    let plain = answers(Kind::Reference, &prompts);
    assert!(plain.iter().all(|answer| answer.len() == 12));
    assert_eq!(answers(Kind::default(), &prompts), plain);
    for (prompt, answer) in prompts.iter().zip(&plain) {
        assert_eq!(&answers(Kind::Reference, &[*prompt])[0], answer);
    }
    let execution = Execution::new(&model, Kind::Reference);
    let mut decoder = execution.decoder(1, 2, Pass::INFER).unwrap();
    let token = |sequence| Token { sequence, id: 1 };
    assert!(decoder.step(&[token(0)], &[1]).is_err());
    assert!(decoder.step(&[token(1)], &[0]).is_err());
    assert!(decoder.step(&[token(0); 3], &[2]).is_err());
}
