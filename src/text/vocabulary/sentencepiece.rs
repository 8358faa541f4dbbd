//! The BPE of `SentencePiece`: spaces are `▁`, and what has no token is spelled in bytes.

use std::collections::HashMap;

use anyhow::{Result, ensure};
use tokenizers::Tokenizer;
use tokenizers::decoders::DecoderWrapper;
use tokenizers::decoders::byte_fallback::ByteFallback;
use tokenizers::decoders::fuse::Fuse;
use tokenizers::decoders::sequence::Sequence as Decoders;
use tokenizers::decoders::strip::Strip;
use tokenizers::models::bpe::BPE;
use tokenizers::normalizers::NormalizerWrapper;
use tokenizers::normalizers::prepend::Prepend;
use tokenizers::normalizers::replace::Replace;
use tokenizers::normalizers::utils::Sequence as Normalizers;

use super::{TokenKind, Vocabulary, failed};

/// What stands for a space.
const SPACE: &str = "▁";
/// The longest token, in characters, whose pairs are looked for; pieces of `SentencePiece` have up to 16.
const LONGEST: usize = 128;

impl Vocabulary<'_> {
    /// BPE with byte fallback. Pairs to merge are in the file (`gemma4`), or follow from scores (`llama`).
    pub(super) fn sentencepiece(&self) -> Result<Tokenizer> {
        let scored = self.model == "llama";
        let pairs = if scored {
            ensure!(
                self.scores.len() == self.tokens.len(),
                "it has no scores of tokens (`tokenizer.ggml.scores`), which tell what is merged first"
            );
            self.scored_pairs()
        } else {
            self.pairs()?
        };
        let bytes = self.kinds.iter().filter(|kind| **kind == TokenKind::Byte);
        let bytes = bytes.count();
        ensure!(
            bytes == 0 || bytes == 256,
            "it has tokens for {bytes} single bytes, expected all 256 or none"
        );
        let mut builder = BPE::builder()
            .vocab_and_merges(self.ids(), pairs)
            .byte_fallback(bytes == 256)
            .fuse_unk(true);
        if let Some(text) = self.text(self.unk) {
            builder = builder.unk_token(text.to_owned());
        }
        let mut tokenizer = Tokenizer::new(builder.build().map_err(failed)?);
        let prefix = self.add_space_prefix.unwrap_or(scored);
        let replace = Replace::new(" ", SPACE).map_err(failed)?;
        let mut normalizers = vec![NormalizerWrapper::Replace(replace)];
        if prefix {
            let prepend = Prepend::new(SPACE.to_owned());
            normalizers.insert(0, NormalizerWrapper::Prepend(prepend));
        }
        tokenizer
            .with_normalizer(Some(Normalizers::new(normalizers)))
            .map_err(failed)?;
        let back = Replace::new(SPACE, " ").map_err(failed)?;
        let mut decoders = vec![
            DecoderWrapper::Replace(back),
            DecoderWrapper::ByteFallback(ByteFallback::new()),
            DecoderWrapper::Fuse(Fuse::new()),
        ];
        if prefix {
            decoders.push(DecoderWrapper::Strip(Strip::new(' ', 1, 0)));
        }
        tokenizer.with_decoder(Some(Decoders::new(decoders)));
        Ok(tokenizer)
    }

    /// The pairs that make up a token, in the order in which `SentencePiece` merges them: that of the token's score, from the highest
    /// on. Pairs of one score come by the lengths of their parts, as transformers' converter has them.
    fn scored_pairs(&self) -> Vec<(String, String)> {
        let ids: HashMap<&str, usize> = self
            .tokens
            .iter()
            .enumerate()
            .map(|(id, text)| (text.as_str(), id))
            .collect();
        let mut pairs = Vec::new();
        for (text, score) in self.tokens.iter().zip(self.scores) {
            if text.chars().nth(LONGEST).is_some() {
                continue;
            }
            for (at, _) in text.char_indices().skip(1) {
                let (left, right) = text.split_at(at);
                if ids.contains_key(left) && ids.contains_key(right) {
                    pairs.push((*score, left, right));
                }
            }
        }
        let length = |text: &str| text.chars().count();
        pairs.sort_by(|a, b| {
            let lengths = |pair: &(f32, &str, &str)| (length(pair.1), length(pair.2));
            b.0.total_cmp(&a.0)
                .then_with(|| lengths(b).cmp(&lengths(a)))
        });
        pairs
            .into_iter()
            .map(|(_, left, right)| (left.to_owned(), right.to_owned()))
            .collect()
    }
}
