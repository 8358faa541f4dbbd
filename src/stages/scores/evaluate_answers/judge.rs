//! Whether an answer is the right one.

use anyhow::Result;
use regex::Regex;

use super::Parameters;

/// The most bytes of a regular expression when it is compiled.
const LARGEST_PATTERN: usize = 1 << 20;

/// How answers are compared.
pub(super) struct Judge<'s> {
    parameters: &'s Parameters,
    pattern: Option<Regex>,
}

impl<'s> Judge<'s> {
    /// Compiles the expression.
    ///
    /// # Errors
    /// It can't be read.
    pub(super) fn new(parameters: &'s Parameters) -> Result<Self> {
        Ok(Self {
            parameters,
            pattern: pattern(parameters)?,
        })
    }
}

impl Judge<'_> {
    /// Whether an answer is the expected one.
    pub(super) fn is_exact(&self, answer: &str, expected: &str) -> bool {
        self.plain(answer) == self.plain(expected)
    }

    fn plain(&self, text: &str) -> String {
        let mut text = text.to_owned();
        if self.parameters.ignore_case {
            text = text.to_lowercase();
        }
        if self.parameters.ignore_punctuation {
            text.retain(|letter| !letter.is_ascii_punctuation());
        }
        text.trim().to_owned()
    }

    /// What the expression finds in a text.
    fn found<'t>(&self, text: &'t str) -> Option<&'t str> {
        let all: Vec<_> = self.pattern.as_ref()?.captures_iter(text).collect();
        let place = self.parameters.group_select;
        let place = if place < 0 {
            all.len()
                .checked_sub(usize::try_from(place.unsigned_abs()).ok()?)?
        } else {
            usize::try_from(place).ok()?
        };
        let captures = all.into_iter().nth(place)?;
        let group = captures.iter().skip(1).flatten();
        let group = group
            .map(|group| group.as_str())
            .find(|text| !text.is_empty());
        let whole = if captures.len() == 1 {
            captures.get(0).map(|whole| whole.as_str())
        } else {
            None
        };
        group.or(whole).map(str::trim)
    }

    /// Whether the expression finds in an answer what it finds in the expected one.
    pub(super) fn matches(&self, answer: &str, expected: &str) -> bool {
        let expected = self.found(expected).unwrap_or(expected.trim());
        self.found(answer) == Some(expected)
    }
}

/// The expression, compiled.
fn pattern(parameters: &Parameters) -> Result<Option<Regex>> {
    let compiled = parameters.regex_pattern.as_ref().map(|pattern| {
        let mut builder = regex::RegexBuilder::new(pattern);
        builder.size_limit(LARGEST_PATTERN).build()
    });
    compiled.transpose().map_err(|error| {
        // The library draws the place over several lines.
        let text = error.to_string();
        let last = text.lines().last().unwrap_or_default();
        let last = last.strip_prefix("error: ").unwrap_or(last);
        anyhow::anyhow!("it can't be read as a regular expression: {last}")
    })
}

#[cfg(test)]
mod tests {
    use super::super::tests::parameters;
    use super::*;

    fn judge(parameters: &Parameters) -> Judge<'_> {
        Judge::new(parameters).unwrap()
    }

    #[test]
    fn answers_are_compared_as_asked() {
        let plain = parameters("{}").own;
        let judge_plain = judge(&plain);
        assert!(judge_plain.is_exact(" Paris\n", "Paris"));
        assert!(!judge_plain.is_exact("paris", "Paris"));
        assert!(!judge_plain.is_exact("Paris.", "Paris"));
        let loose = parameters(r#"{"ignore_case": true, "ignore_punctuation": true}"#).own;
        assert!(judge(&loose).is_exact("paris!", "Paris."));
    }

    #[test]
    fn an_expression_finds_what_counts() {
        let first = parameters(r#"{"regex_pattern": "= (-?[0-9.,]+)"}"#).own;
        let judge_first = judge(&first);
        assert!(judge_first.matches("so = 42 and = 43", "= 42"));
        assert!(!judge_first.matches("so 42", "= 42"));
        assert!(judge_first.matches("= 7", "7"), "a bare reference");
        let last = parameters(r#"{"regex_pattern": "[0-9]+", "group_select": -1}"#).own;
        let judge_last = judge(&last);
        assert!(judge_last.matches("1 and 2 make 3", "= 3"));
        assert!(!judge_last.matches("3 is 1 and 2", "= 3"));
        assert!(!judge_last.matches("none", "= 3"));
        let second = parameters(r#"{"regex_pattern": "(a)|(b)", "group_select": 1}"#).own;
        let judge_second = judge(&second);
        assert_eq!(judge_second.found("xaxb"), Some("b"));
        assert_eq!(judge_second.found("xax"), None);
        let far = parameters(r#"{"regex_pattern": "a", "group_select": -2}"#).own;
        assert_eq!(judge(&far).found("a"), None);
        assert_eq!(judge(&far).found("aba"), Some("a"));
    }
}
