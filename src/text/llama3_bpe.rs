//! Encodes texts with tokenizers like Llama 3's. The ids are those of the `tokenizers` library, at about ten times its speed: special
//! tokens and words are found by code written for this pattern, and the ids of words are cached. New words are merged by the library.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};

use anyhow::{Result, anyhow};
use tokenizers::models::bpe::BPE;
use tokenizers::pre_tokenizers::split::SplitPattern;
use tokenizers::{Model as _, ModelWrapper, PreTokenizerWrapper, SplitDelimiterBehavior};

use super::llama3_split::{PATTERN, word_end};

/// The number of words that a cache holds at most.
const SLOTS: usize = 1 << 15;
/// The length of the longest word that is cached, in bytes.
const LONGEST: usize = 24;
/// The largest number of ids of a word that is cached.
const MOST: usize = 5;

/// The lookup tables for encoding. The vocabulary and merges remain in the library's tokenizer.
#[derive(Debug)]
pub(super) struct Llama3Bpe {
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

impl Llama3Bpe {
    /// `None` unless this type encodes exactly as the tokenizer does.
    pub(super) fn from_tokenizer(tokenizer: &tokenizers::Tokenizer) -> Option<Self> {
        let ModelWrapper::BPE(model) = tokenizer.get_model() else {
            return None;
        };
        let known = tokenizer.get_normalizer().is_none()
            && is_llama3(tokenizer.get_pre_tokenizer()?)
            && model.dropout.is_none()
            && !tokenizer.get_encode_special_tokens();
        let mut llama3 = Self {
            special: HashMap::new(),
            lengths: Vec::new(),
            begins: [false; 256],
            caches: Mutex::default(),
        };
        for (id, token) in tokenizer.get_added_tokens_decoder() {
            let plain = !token.normalized && !token.single_word && !token.lstrip && !token.rstrip;
            let bytes = token.content.into_bytes();
            let first = *bytes.first()?;
            if !plain || llama3.special.contains_key(&bytes) {
                return None;
            }
            llama3.begins[usize::from(first)] = true;
            llama3.lengths.push(bytes.len());
            llama3.special.insert(bytes, id);
        }
        llama3.lengths.sort_unstable_by(|a, b| b.cmp(a));
        llama3.lengths.dedup();
        known.then_some(llama3)
    }

    /// The ids of a text, without the special tokens that a tokenizer adds. `tokenizer` is the one given to [`Self::from_tokenizer`].
    pub(super) fn encode(&self, tokenizer: &tokenizers::Tokenizer, text: &str) -> Result<Vec<u32>> {
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
                    words(&text[done..place], model, &mut cache, &mut ids)?;
                    ids.push(id);
                    place += length;
                    done = place;
                }
                None => place += 1,
            }
        }
        words(&text[done..], model, &mut cache, &mut ids)?;
        free().push(cache);
        Ok(ids)
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

fn is_llama3(pre_tokenizer: &PreTokenizerWrapper) -> bool {
    let PreTokenizerWrapper::Sequence(sequence) = pre_tokenizer else {
        return false;
    };
    let [
        PreTokenizerWrapper::Split(split),
        PreTokenizerWrapper::ByteLevel(bytes),
    ] = sequence.as_ref()
    else {
        return false;
    };
    split.pattern == SplitPattern::Regex(PATTERN.to_owned())
        && split.behavior == SplitDelimiterBehavior::Isolated
        && !split.invert
        && !bytes.add_prefix_space
        && !bytes.use_regex
}

/// Adds the ids of a text without special tokens.
fn words(text: &str, model: &BPE, cache: &mut [Slot], ids: &mut Vec<u32>) -> Result<()> {
    let mut start = 0;
    while start < text.len() {
        let end = word_end(text, start);
        let word = &text.as_bytes()[start..end];
        start = end;
        if word.len() > LONGEST {
            ids.extend(merged(word, model)?);
            continue;
        }
        let packed = pack(word);
        let slot = &mut cache[slot(packed)];
        if usize::from(slot.length) != word.len() || slot.word != packed {
            let new = merged(word, model)?;
            if new.len() > MOST {
                ids.extend(new);
                continue;
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
    }
    Ok(())
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
mod tests {
    use std::path::Path;

    use proptest::prelude::*;
    use tokenizers::{AddedToken, Tokenizer};

    use super::*;

    fn golden() -> Tokenizer {
        let path = concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/model/tokenizer.json"
        );
        Tokenizer::from_file(Path::new(path)).unwrap()
    }

    fn by_the_library(tokenizer: &Tokenizer, text: &str) -> Vec<u32> {
        tokenizer
            .encode_fast(text, false)
            .unwrap()
            .get_ids()
            .to_vec()
    }

    #[test]
    fn ids_are_those_of_the_library() {
        let tokenizer = golden();
        let llama3 = Llama3Bpe::from_tokenizer(&tokenizer).unwrap();
        let sources = [
            include_str!("../../tests/golden/rendered.jsonl"),
            include_str!("../../tests/golden/edge_rows.jsonl"),
            include_str!("llama3_bpe.rs"),
            "<|eot_id|><|eot_id<|eot_id|>|<|begin_of_text|>\n\n<|end_of_text|",
            "\u{0}\u{1}\u{7f}\u{ad}\u{feff}\u{10ffff}",
        ];
        for text in sources {
            let ids = llama3.encode(&tokenizer, text).unwrap();
            assert!(ids == by_the_library(&tokenizer, text));
            // From the cache, too.
            assert!(llama3.encode(&tokenizer, text).unwrap() == ids);
        }
        let every_byte: String = (0..0x800).filter_map(char::from_u32).collect();
        assert_eq!(
            llama3.encode(&tokenizer, &every_byte).unwrap(),
            by_the_library(&tokenizer, &every_byte)
        );
    }

    #[test]
    fn threads_share_nothing_but_the_ids() {
        let tokenizer = golden();
        let llama3 = Llama3Bpe::from_tokenizer(&tokenizer).unwrap();
        let text = include_str!("../../tests/golden/rendered.jsonl");
        let expected = by_the_library(&tokenizer, text);
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..5 {
                        assert!(llama3.encode(&tokenizer, text).unwrap() == expected);
                    }
                });
            }
        });
        assert!(llama3.caches.lock().unwrap().len() <= 4);
    }

    #[test]
    fn other_tokenizers_are_left_to_the_library() {
        let text = std::fs::read_to_string(concat!(
            env!("CARGO_MANIFEST_DIR"),
            "/tests/golden/model/tokenizer.json"
        ))
        .unwrap();
        let changed = |change: &dyn Fn(&mut serde_json::Value)| {
            let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
            change(&mut json);
            Llama3Bpe::from_tokenizer(&json.to_string().parse::<Tokenizer>().unwrap()).is_none()
        };
        assert!(!changed(&|_| {}));
        assert!(changed(
            &|json| json["normalizer"] = serde_json::json!({"type": "NFC"})
        ));
        assert!(changed(
            &|json| json["model"]["dropout"] = serde_json::json!(0.1)
        ));
        assert!(changed(
            &|json| json["added_tokens"][0]["lstrip"] = true.into()
        ));
        assert!(changed(
            &|json| json["added_tokens"][0]["normalized"] = true.into()
        ));
        let splits = "/pre_tokenizer/pretokenizers";
        assert!(changed(&|json| {
            *json
                .pointer_mut(&format!("{splits}/0/pattern/Regex"))
                .unwrap() = r"\p{N}".into();
        }));
        assert!(changed(&|json| {
            *json
                .pointer_mut(&format!("{splits}/1/add_prefix_space"))
                .unwrap() = true.into();
        }));
    }

    #[test]
    fn of_special_tokens_the_longest_counts() {
        let mut tokenizer = golden();
        let added = ["<a", "<a>", "<a><b>", "é>"].map(|text| AddedToken::from(text, true));
        tokenizer.add_special_tokens(added).unwrap();
        let llama3 = Llama3Bpe::from_tokenizer(&tokenizer).unwrap();
        for text in ["<a><b>", "<a><bé>", "<<a>é>é", "x<a", "<a<a><a><b><"] {
            assert_eq!(
                llama3.encode(&tokenizer, text).unwrap(),
                by_the_library(&tokenizer, text),
                "{text}"
            );
        }
    }

    proptest! {
        #[test]
        fn any_text_has_the_ids_of_the_library(texts in prop::collection::vec(
            prop_oneof![".{0,20}", "[a-e '\n.0-9]{0,30}", Just("<|eot_id|>".to_owned()), Just("<|".to_owned())], 0..8)) {
            let tokenizer = golden();
            let llama3 = Llama3Bpe::from_tokenizer(&tokenizer).unwrap();
            let text = texts.concat();
            prop_assert_eq!(llama3.encode(&tokenizer, &text).unwrap(), by_the_library(&tokenizer, &text));
        }
    }
}
