//! Encodes texts with byte-level BPE tokenizers whose way of splitting words [`Split`] knows: those of Llama 3, Qwen, GPT-4o, Mistral's
//! tekken, `SmolLM`, `DeepSeek` and the like. The ids are those of the `tokenizers` library, at many times its speed: special tokens and words
//! are found by code written for these patterns, and the ids of words are cached. New words are merged by the library.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, anyhow};
use tokenizers::models::bpe::BPE;
use tokenizers::{Model as _, ModelWrapper, NormalizerWrapper};
use unicode_normalization_alignments::{IsNormalized, is_nfc_quick};

use super::split::Split;

/// The number of words that a cache holds at most.
const SLOTS: usize = 1 << 15;
/// The length of the longest word that is cached, in bytes.
const LONGEST: usize = 24;
/// The largest number of ids of a word that is cached.
const MOST: usize = 5;

/// The lookup tables for encoding. The vocabulary and merges remain in the library's tokenizer.
#[derive(Debug)]
pub(super) struct FastBpe {
    split: Split,
    /// Whether texts are normalised to NFC first.
    nfc: bool,
    /// Special tokens by their text.
    special: HashMap<Vec<u8>, u32>,
    /// Their lengths, the longest first.
    lengths: Vec<usize>,
    /// For each byte, whether a special token begins with it.
    begins: [bool; 256],
    /// Caches not in use. There are as many caches in all as threads have encoded at the same time.
    caches: Mutex<Vec<Box<[Slot]>>>,
}

/// A cached word and its ids. The bytes of the word are packed and padded with zeros. An empty slot has length 0.
#[derive(Debug, Clone, Copy, Default)]
struct Slot {
    word: [u64; LONGEST / 8],
    ids: [u32; MOST],
    length: u8,
    count: u8,
}

/// The character that byte-level BPE uses for each byte (`bytes_to_unicode` of GPT-2's `encoder.py`): printable characters stand for
/// themselves, the other bytes get the characters from U+0100 on.
const CHARACTERS: [char; 256] = characters();

const fn characters() -> [char; 256] {
    let mut characters = ['\0'; 256];
    let (mut byte, mut next) = (0usize, 256u32);
    while byte < 256 {
        let printable = matches!(byte, 0x21..=0x7e | 0xa1..=0xac | 0xae..=0xff);
        let code = if printable { byte as u32 } else { next };
        if !printable {
            next += 1;
        }
        if let Some(character) = char::from_u32(code) {
            characters[byte] = character;
        }
        byte += 1;
    }
    characters
}

impl FastBpe {
    /// `None` unless this type encodes exactly as the tokenizer does.
    pub(super) fn from_tokenizer(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let ModelWrapper::BPE(model) = tokenizer.get_model() else {
            return None;
        };
        let nfc = match tokenizer.get_normalizer() {
            None => false,
            Some(NormalizerWrapper::NFC(_)) => true,
            Some(_) => return None,
        };
        let known = model.dropout.is_none() && !tokenizer.get_encode_special_tokens();
        let mut fast = Self {
            split: Split::of(tokenizer.get_pre_tokenizer()?)?,
            nfc,
            special: HashMap::new(),
            lengths: Vec::new(),
            begins: [false; 256],
            caches: Mutex::default(),
        };
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            let plain = !token.normalized && !token.single_word && !token.lstrip && !token.rstrip;
            let bytes = token.content.into_bytes();
            let first = *bytes.first()?;
            if !plain || fast.special.contains_key(&bytes) {
                return None;
            }
            fast.begins[usize::from(first)] = true;
            fast.lengths.push(bytes.len());
            fast.special.insert(bytes, id);
        }
        fast.lengths.sort_unstable_by(|a, b| b.cmp(a));
        fast.lengths.dedup();
        known.then_some(fast)
    }

    /// The ids of a text, without the special tokens that a tokenizer adds; `None` for a text that must be normalised first.
    /// `tokenizer` is the one given to [`Self::from_tokenizer`].
    pub(super) fn encode(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        text: &str,
    ) -> Result<Option<Vec<u32>>> {
        if self.nfc && !text.is_ascii() && !matches!(is_nfc_quick(text.chars()), IsNormalized::Yes)
        {
            return Ok(None);
        }
        let ModelWrapper::BPE(model) = tokenizer.get_model() else {
            return Err(anyhow!("the tokenizer's model was exchanged"));
        };
        let free = || self.caches.lock().unwrap_or_else(PoisonError::into_inner);
        let cache = free().pop();
        let mut cache = cache.unwrap_or_else(|| vec![Slot::default(); SLOTS].into_boxed_slice());
        let mut ids = Vec::with_capacity(text.len() / 3);
        let (mut done, mut place) = (0, 0);
        let bytes = text.as_bytes();
        while let Some(ahead) = bytes[place..]
            .iter()
            .position(|byte| self.begins[usize::from(*byte)])
        {
            place += ahead;
            match self.special_at(&bytes[place..]) {
                Some((length, id)) => {
                    self.words(&text[done..place], model, &mut cache, &mut ids)?;
                    ids.push(id);
                    place += length;
                    done = place;
                }
                None => place += 1,
            }
        }
        self.words(&text[done..], model, &mut cache, &mut ids)?;
        free().push(cache);
        Ok(Some(ids))
    }

    /// The range of bytes that each of the ids of a text of `length` bytes stands for; `None` if they don't fill it.
    pub(super) fn places(
        &self,
        tokenizer: &tokenizers::Tokenizer,
        ids: &[u32],
        length: usize,
    ) -> Option<Vec<Range<usize>>> {
        let model = tokenizer.get_model();
        let special: HashMap<u32, usize> = self
            .special
            .iter()
            .map(|(text, id)| (*id, text.len()))
            .collect();
        let mut end = 0;
        let mut places = Vec::with_capacity(ids.len());
        for id in ids {
            // Each character of a token in the vocabulary is a byte.
            let bytes = match special.get(id) {
                Some(bytes) => *bytes,
                None => model.id_to_token(*id)?.chars().count(),
            };
            places.push(end..end + bytes);
            end += bytes;
        }
        (end == length).then_some(places)
    }

    /// The longest special token that the bytes begin with: its length and id.
    fn special_at(&self, bytes: &[u8]) -> Option<(usize, u32)> {
        let found = |length: &usize| {
            let id = self.special.get(bytes.get(..*length)?)?;
            Some((*length, *id))
        };
        self.lengths.iter().find_map(found)
    }
}

impl FastBpe {
    /// Adds the ids of a text without special tokens.
    fn words(&self, text: &str, model: &BPE, cache: &mut [Slot], ids: &mut Vec<u32>) -> Result<()> {
        self.split.each(text, |word| {
            let word = &text.as_bytes()[word];
            if word.len() > LONGEST {
                ids.extend(merged(word, model)?);
                return Ok(());
            }
            let packed = pack(word);
            let slot = &mut cache[slot(packed)];
            if usize::from(slot.length) != word.len() || slot.word != packed {
                let new = merged(word, model)?;
                if new.len() > MOST {
                    ids.extend(new);
                    return Ok(());
                }
                *slot = Slot {
                    word: packed,
                    length: word.len() as u8,
                    count: new.len() as u8,
                    ..Slot::default()
                };
                slot.ids[..new.len()].copy_from_slice(&new);
            }
            ids.extend_from_slice(&slot.ids[..usize::from(slot.count)]);
            Ok(())
        })
    }
}

/// A word's ids by the library's model.
fn merged(word: &[u8], model: &BPE) -> Result<Vec<u32>> {
    let text: String = word
        .iter()
        .map(|byte| CHARACTERS[usize::from(*byte)])
        .collect();
    let tokens = model.tokenize(&text);
    let tokens = tokens.map_err(|error| anyhow!("a text could not be tokenized: {error}"))?;
    Ok(tokens.into_iter().map(|token| token.id).collect())
}

fn pack(word: &[u8]) -> [u64; LONGEST / 8] {
    let mut bytes = [0; LONGEST];
    bytes[..word.len()].copy_from_slice(word);
    let mut packed = [0; LONGEST / 8];
    for (packed, bytes) in packed.iter_mut().zip(bytes.as_chunks::<8>().0) {
        *packed = u64::from_le_bytes(*bytes);
    }
    packed
}

/// The index of the slot for a word. Words with the same slot replace each other, which only costs time.
fn slot(packed: [u64; LONGEST / 8]) -> usize {
    const ODD: u64 = 0x9e37_79b9_7f4a_7c15;
    let mixed = packed.iter().fold(0u64, |hash, part| {
        (hash ^ part).wrapping_mul(ODD).rotate_left(29)
    });
    (mixed.wrapping_mul(ODD) >> (64 - SLOTS.trailing_zeros())) as usize
}

#[cfg(test)]
mod tests;
