//! Text out of ids that come one by one.

use anyhow::Result;

use super::tokenizer::Tokenizer;

/// The text of an answer as it grows. A letter of several tokens comes when it is whole, and joined with the others it is the text that all
/// ids have together.
#[derive(Debug)]
pub struct TextStream<'a> {
    tokenizer: &'a Tokenizer,
    ids: Vec<u32>,
    /// Where the last text began that was given whole: what is before changes nothing any more.
    begin: usize,
    /// How many ids are in the text that was given.
    given: usize,
}

/// What stands for bytes that are no letter (yet).
const BROKEN: char = '\u{fffd}';

impl<'a> TextStream<'a> {
    /// An answer without ids; special tokens will be left out.
    pub fn new(tokenizer: &'a Tokenizer) -> Self {
        Self {
            tokenizer,
            ids: Vec::new(),
            begin: 0,
            given: 0,
        }
    }

    /// The text that an id adds, empty where it waits for more of a letter.
    ///
    /// # Errors
    /// Ids that can't be decoded.
    pub fn push(&mut self, id: u32) -> Result<String> {
        self.ids.push(id);
        let whole = self.decode(self.ids.len())?;
        if whole.ends_with(BROKEN) {
            return Ok(String::new());
        }
        self.give(&whole)
    }

    /// What is left when no id follows: a letter that was never finished.
    ///
    /// # Errors
    /// Ids that can't be decoded.
    pub fn finish(&mut self) -> Result<String> {
        let whole = self.decode(self.ids.len())?;
        self.give(&whole)
    }

    fn give(&mut self, whole: &str) -> Result<String> {
        let before = self.decode(self.given)?;
        let new = whole.get(before.len()..).unwrap_or_default().to_owned();
        if !new.is_empty() {
            self.begin = self.given;
            self.given = self.ids.len();
        }
        Ok(new)
    }

    /// The text from where it changes no more up to the id at `end`.
    fn decode(&self, end: usize) -> Result<String> {
        let ids = self.ids.get(self.begin..end).unwrap_or_default();
        self.tokenizer.decode(ids, true)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    const MODEL: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/model");

    #[test]
    fn joined_it_is_the_text_of_all_ids() {
        let tokenizer = Tokenizer::load(Path::new(MODEL)).unwrap();
        for text in [
            "",
            "plain words, twice: plain words",
            "größer 日本語 🦀🦀 end",
            " leading and trailing  \n\n",
        ] {
            let ids = tokenizer.encode(text).unwrap();
            let mut stream = TextStream::new(&tokenizer);
            let mut pieces = Vec::new();
            for id in ids {
                pieces.push(stream.push(id).unwrap());
            }
            pieces.push(stream.finish().unwrap());
            assert_eq!(pieces.concat(), text);
            assert!(pieces.iter().all(|piece| !piece.contains(BROKEN)));
        }
        // Bytes that never become a letter.
        let ids = [854, 222, 303, 244, 309, 239];
        let mut stream = TextStream::new(&tokenizer);
        let mut pieces = String::new();
        for id in ids {
            pieces.push_str(&stream.push(id).unwrap());
        }
        pieces.push_str(&stream.finish().unwrap());
        assert_eq!(pieces, tokenizer.decode(&ids, true).unwrap());
    }
}
