//! The mapping from the columns of a file to ours, by the common forms of data sets, which are named or recognised by their columns.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context as _, Result, bail, ensure};

use super::expression::{Expression, is_expression};

/// The columns that later stages know.
pub const CANONICAL: [&str; 12] = [
    "system",
    "prompt",
    "chosen",
    "rejected",
    "messages",
    "text",
    "label",
    "tools",
    "chat_template_kwargs",
    "question",
    "choices",
    "answer",
];

/// A form of rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// Whole conversations in `messages`, with `role` and `content`.
    Messages,
    /// `chosen` and `rejected`, with a `prompt` or with what both begin with alike.
    Preference,
    /// `prompt` and `completion`, or `chosen` in its place.
    PromptCompletion,
    /// `instruction`, perhaps `input`, and `output`.
    Alpaca,
    /// Conversations in `conversations`, with `from` and `value`.
    Sharegpt,
    /// Plain texts in `text`, which no chat template is applied to.
    Text,
    /// `chosen` and `rejected` as transcripts, `\n\nHuman: ..\n\nAssistant: ..`.
    Transcripts,
    /// `prompt`, `completion` and a `label` that says whether it is a good one.
    Kto,
    /// A `question` with `choices`, and an `answer` that says which one is right.
    Choices,
}

/// The source of one of our columns.
pub(super) enum From {
    /// A column, by its name in the file.
    Column(String),
    /// An expression on other columns.
    Expression(Box<Expression>),
    /// Alpaca's instruction, with its input and the turns before it.
    Instruction {
        instruction: String,
        input: Option<String>,
        history: Option<String>,
    },
}

impl From {
    /// The columns of the file from which it is computed.
    pub(super) fn reads(&self) -> Vec<&String> {
        match self {
            Self::Column(theirs) => vec![theirs],
            Self::Expression(expression) => expression.reads.iter().collect(),
            Self::Instruction {
                instruction,
                input,
                history,
            } => std::iter::once(instruction)
                .chain(input)
                .chain(history)
                .collect(),
        }
    }
}

/// How rows are read.
pub(super) struct Reading {
    pub(super) form: Form,
    /// Our columns, in our order.
    pub(super) ours: Vec<(&'static str, From)>,
    /// Columns that are copied unchanged, by their names in the file.
    pub(super) others: Vec<String>,
    /// A sentence about what was recognised; `None` if the columns have our names.
    pub(super) message: Option<String>,
}

/// Columns that may hold a conversation under another name.
const CONVERSATIONS: [&str; 2] = ["conversations", "conversation"];
const INPUTS: [&str; 2] = ["input", "context"];
const OUTPUTS: [&str; 2] = ["output", "response"];

/// Decides how rows with these columns are read. `columns` is the recipe's mapping from our names to the file's, and `asked` the form that the
/// recipe names.
pub(super) fn recognise(
    names: &[String],
    columns: &BTreeMap<String, String>,
    asked: Option<Form>,
) -> Result<Reading> {
    let mut given = BTreeMap::new();
    let mut renamed = Vec::new();
    for (ours, theirs) in columns {
        let Some(ours) = CANONICAL.into_iter().find(|known| known == ours) else {
            bail!(
                "`columns` maps to `{ours}`, which is no column of ours: expected one of {}",
                list(CANONICAL)
            );
        };
        let from = if names.contains(theirs) {
            renamed.push(theirs.clone());
            From::Column(theirs.clone())
        } else {
            ensure!(
                is_expression(theirs),
                "`columns` names `{theirs}`, which is not there: found {}",
                list(names)
            );
            let expression = Expression::new(theirs).context("in `columns`")?;
            if let Some(missing) = expression.reads.iter().find(|read| !names.contains(read)) {
                bail!(
                    "`columns` reads `{missing}` in `{theirs}`, which is not there: found {}",
                    list(names)
                );
            }
            From::Expression(Box::new(expression))
        };
        given.insert(ours, from);
    }
    let mut columns = Columns {
        names,
        renamed,
        given,
        used: Vec::new(),
    };
    let form = match asked {
        Some(form) => form,
        None => columns.form()?,
    };
    let foreign = ["question", "choices", "answer"]
        .into_iter()
        .find(|name| columns.given.contains_key(name));
    if let (Some(name), false) = (foreign, form == Form::Choices) {
        bail!(
            "`columns` maps to `{name}`, which only questions with `choices` and an `answer` have; hint: a mapping is from our name to the \
             file's, as in `columns: {{prompt: question}}`"
        );
    }
    let mut message = columns.fill(form, asked.is_some())?;
    if asked.is_some() {
        message = None;
    }
    for known in ["system", "tools", "chat_template_kwargs", "label"] {
        columns.take(known, known);
    }
    let ours: Vec<_> = CANONICAL
        .into_iter()
        .filter_map(|name| columns.given.remove_entry(name))
        .collect();
    let taken = |name: &String| {
        columns.used.contains(name)
            || columns.renamed.contains(name)
            || ours.iter().any(|(ours, _)| ours == name)
    };
    let others = names.iter().filter(|name| !taken(name)).cloned().collect();
    Ok(Reading {
        form,
        ours,
        others,
        message,
    })
}

struct Columns<'a> {
    names: &'a [String],
    /// Columns that the recipe gave another name.
    renamed: Vec<String>,
    given: BTreeMap<&'static str, From>,
    /// Columns from which others are computed.
    used: Vec<String>,
}

impl Columns<'_> {
    /// Whether the file has a column of this name that the recipe does not rename.
    fn has(&self, name: &str) -> bool {
        self.names.iter().any(|known| known == name)
            && !self.renamed.iter().any(|known| known == name)
    }

    /// Whether the recipe gives one of our columns, or the file has it.
    fn ours(&self, name: &str) -> bool {
        self.given.contains_key(name) || self.has(name)
    }

    fn first(&self, names: &[&'static str]) -> Option<&'static str> {
        names.iter().copied().find(|name| self.has(name))
    }

    fn form(&self) -> Result<Form> {
        Ok(if self.ours("chosen") && self.ours("rejected") {
            Form::Preference
        } else if self.ours("chosen") {
            Form::PromptCompletion
        } else if self.ours("messages") {
            Form::Messages
        } else if self.first(&CONVERSATIONS).is_some() {
            Form::Sharegpt
        } else if self.ours("prompt") && self.has("completion") {
            if self.ours("label") {
                Form::Kto
            } else {
                Form::PromptCompletion
            }
        } else if self.has("instruction") && self.first(&OUTPUTS).is_some() {
            Form::Alpaca
        } else if self.ours("text") {
            Form::Text
        } else if self.ours("prompt") {
            Form::PromptCompletion
        } else if self.ours("choices") && self.ours("answer") {
            Form::Choices
        } else {
            bail!("{}", self.advice())
        })
    }

    fn advice(&self) -> String {
        if self.names.is_empty() {
            return "there are no columns and no rows: is it empty?".to_owned();
        }
        format!(
            "there is no column that can be used: found {}, expected `prompt`, `chosen` and `rejected`, or `messages`, or another form \
             that is known (docs/data.md); hint: say which is which, as in `columns: {{prompt: question, chosen: good, rejected: bad}}`",
            list(self.names)
        )
    }

    /// Uses a column of the file as one of ours, unless that has a source already.
    fn take(&mut self, ours: &'static str, theirs: &str) -> bool {
        if self.given.contains_key(ours) {
            return true;
        }
        let there = self.has(theirs);
        if there {
            self.used.push(theirs.to_owned());
            self.given.insert(ours, From::Column(theirs.to_owned()));
        }
        there
    }

    /// Uses the first of several columns of the file as one of ours; it is an error if none exists.
    fn need(&mut self, ours: &'static str, theirs: &[&'static str], form: &str) -> Result<()> {
        for name in theirs {
            if self.take(ours, name) {
                return Ok(());
            }
        }
        bail!(
            "`format: {form}` needs a column {}: found {}",
            theirs
                .iter()
                .map(|name| format!("`{name}`"))
                .collect::<Vec<_>>()
                .join(" or "),
            list(self.names)
        )
    }

    /// Finds the sources of our columns for a form, and returns a sentence about what was recognised.
    fn fill(&mut self, form: Form, asked: bool) -> Result<Option<String>> {
        match form {
            Form::Messages => {
                self.need(
                    "messages",
                    &["messages", "conversations", "conversation"],
                    "messages",
                )?;
                Ok(None)
            }
            Form::Sharegpt => {
                if self.ours("chosen") {
                    return self.fill(Form::Preference, asked);
                }
                self.need(
                    "messages",
                    &["conversations", "conversation", "messages"],
                    "sharegpt",
                )?;
                Ok(self.conversations("messages"))
            }
            Form::Preference | Form::Transcripts => {
                let name = if form == Form::Preference {
                    "preference"
                } else {
                    "transcripts"
                };
                self.need("chosen", &["chosen"], name)?;
                self.need("rejected", &["rejected"], name)?;
                Ok(self.prompt())
            }
            Form::PromptCompletion => {
                // Prompts alone are data too, although nothing can be learnt from them.
                if asked || self.ours("chosen") || self.has("completion") {
                    self.need("chosen", &["chosen", "completion"], "prompt_completion")?;
                }
                let message = self.prompt();
                Ok(message.or_else(|| {
                    self.renamed_answer("chosen", "completion", "prompt and completion")
                }))
            }
            Form::Kto => {
                self.need("prompt", &["prompt"], "kto")?;
                self.need("chosen", &["completion", "chosen"], "kto")?;
                self.need("label", &["label"], "kto")?;
                Ok(Some(
                    "rows with a `label` are read as KTO's: `completion` is the answer, and `label` says whether it is a good one"
                        .to_owned(),
                ))
            }
            Form::Alpaca => {
                self.need("chosen", &["output", "response", "chosen"], "alpaca")?;
                let message = self.prompt();
                ensure!(
                    self.given.contains_key("prompt"),
                    "`format: alpaca` needs a column `instruction`: found {}",
                    list(self.names)
                );
                Ok(message)
            }
            Form::Choices => {
                self.need("choices", &["choices"], "choices")?;
                self.need("answer", &["answer"], "choices")?;
                self.take("question", "question");
                Ok(None)
            }
            Form::Text => {
                self.need("text", &["text"], "text")?;
                Ok(Some(
                    "the column `text` is read as whole texts, which no chat template is applied to".to_owned(),
                ))
            }
        }
    }

    /// Finds the source of the prompt: its own column, a conversation, or an instruction.
    fn prompt(&mut self) -> Option<String> {
        if self.take("prompt", "prompt") {
            return None;
        }
        if let Some(name) = self.first(&CONVERSATIONS) {
            self.take("prompt", name);
            return self.conversations("prompt");
        }
        if !self.has("instruction") {
            return None;
        }
        let instruction = "instruction".to_owned();
        let input = self.first(&INPUTS).map(str::to_owned);
        let history = self.has("history").then(|| "history".to_owned());
        self.used.push(instruction.clone());
        self.used.extend(input.clone());
        self.used.extend(history.clone());
        let mut message = "`instruction`".to_owned();
        if let Some(input) = &input {
            _ = write!(
                message,
                ", and behind a blank line `{input}` where it is not empty,"
            );
        }
        message.push_str(" is the prompt");
        if let Some(From::Column(answer)) = self.given.get("chosen") {
            _ = write!(message, ", `{answer}` the answer");
        }
        if history.is_some() {
            message.push_str(", `history` the turns before");
        }
        let from = From::Instruction {
            instruction,
            input,
            history,
        };
        self.given.insert("prompt", from);
        Some(format!("read as Alpaca's rows: {message}"))
    }

    fn conversations(&self, ours: &str) -> Option<String> {
        match self.given.get(ours) {
            Some(From::Column(name)) if CONVERSATIONS.contains(&name.as_str()) => Some(format!(
                "read as ShareGPT's rows: `{name}` holds the conversations; human is the user, gpt the assistant"
            )),
            _ => None,
        }
    }

    fn renamed_answer(&self, ours: &str, theirs: &str, what: &str) -> Option<String> {
        match self.given.get(ours) {
            Some(From::Column(name)) if name == theirs && self.used.contains(name) => {
                Some(format!("read as {what}: `{theirs}` is the answer"))
            }
            _ => None,
        }
    }
}

pub(super) fn list<T: AsRef<str>>(names: impl IntoIterator<Item = T>) -> String {
    let names: Vec<_> = names
        .into_iter()
        .map(|name| format!("`{}`", name.as_ref()))
        .collect();
    if names.is_empty() {
        return "none".to_owned();
    }
    let more = names.len().saturating_sub(30);
    let mut text = names.into_iter().take(30).collect::<Vec<_>>().join(", ");
    if more > 0 {
        _ = write!(text, " and {more} more");
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(names: &[&str], columns: &[(&str, &str)], asked: Option<Form>) -> Result<String> {
        let names: Vec<String> = names.iter().map(|name| (*name).to_owned()).collect();
        let pairs = columns
            .iter()
            .map(|(a, b)| ((*a).to_owned(), (*b).to_owned()));
        let reading = recognise(&names, &pairs.collect(), asked)?;
        let ours: Vec<String> = reading
            .ours
            .iter()
            .map(|(name, from)| match from {
                From::Column(theirs) => format!("{name}={theirs}"),
                From::Expression(of) => format!("{name}=({})", of.reads.join(" ")),
                From::Instruction { input, history, .. } => {
                    format!("{name}=instruction+{input:?}+{history:?}")
                }
            })
            .collect();
        Ok(format!(
            "{:?}: {} | {}",
            reading.form,
            ours.join(" "),
            reading.others.join(" ")
        ))
    }

    #[test]
    fn forms_are_known_by_their_columns() {
        for (names, expected) in [
            (
                &["id", "prompt", "chosen", "rejected", "messages"][..],
                "Preference: prompt=prompt chosen=chosen rejected=rejected | id messages",
            ),
            (
                &["messages", "tools"],
                "Messages: messages=messages tools=tools | ",
            ),
            (
                &["id", "conversations", "system"],
                "Sharegpt: system=system messages=conversations | id",
            ),
            (
                &["conversations", "chosen", "rejected"],
                "Preference: prompt=conversations chosen=chosen rejected=rejected | ",
            ),
            (
                &["prompt", "completion"],
                "PromptCompletion: prompt=prompt chosen=completion | ",
            ),
            (
                &["prompt", "completion", "label"],
                "Kto: prompt=prompt chosen=completion label=label | ",
            ),
            (
                &["instruction", "input", "output", "text"],
                "Alpaca: prompt=instruction+Some(\"input\")+None chosen=output | text",
            ),
            (
                &["instruction", "context", "response", "category"],
                "Alpaca: prompt=instruction+Some(\"context\")+None chosen=response | category",
            ),
            (
                &["instruction", "input", "chosen", "rejected"],
                "Preference: prompt=instruction+Some(\"input\")+None chosen=chosen rejected=rejected | ",
            ),
            (&["text", "meta"], "Text: text=text | meta"),
            (
                &["id", "question", "choices", "answer"],
                "Choices: question=question choices=choices answer=answer | id",
            ),
            (
                &["chosen", "rejected"],
                "Preference: chosen=chosen rejected=rejected | ",
            ),
        ] {
            assert_eq!(read(names, &[], None).unwrap(), expected);
        }
    }

    #[test]
    fn what_the_recipe_says_comes_first() {
        let names = ["instruction", "input", "output", "meta"];
        let pairs = [("prompt", "instruction"), ("chosen", "output")];
        assert_eq!(
            read(&names, &pairs, None).unwrap(),
            "PromptCompletion: prompt=instruction chosen=output | input meta"
        );
        let joined = [
            ("prompt", "${instruction} ${input}"),
            ("chosen", "meta.best"),
        ];
        assert_eq!(
            read(&names, &joined, None).unwrap(),
            "PromptCompletion: prompt=(input instruction) chosen=(meta) | instruction input output meta"
        );
        let swapped = [("chosen", "rejected"), ("rejected", "chosen")];
        assert_eq!(
            read(&["prompt", "chosen", "rejected"], &swapped, None).unwrap(),
            "Preference: prompt=prompt chosen=rejected rejected=chosen | "
        );
    }

    #[test]
    fn what_is_missing_is_named() {
        for (names, columns, asked, expected) in [
            (
                &["question", "best"][..],
                &[][..],
                None,
                "found `question`, `best`",
            ),
            (&["prompts"], &[], None, "no column that can be used"),
            (
                &["prompt"],
                &[("chosen", "best")],
                None,
                "names `best`, which is not there",
            ),
            (&["a"], &[("prompt", "${b}")], None, "reads `b`"),
            (&["a"], &[("best", "a")], None, "no column of ours"),
            (
                &["prompt", "completion"],
                &[("question", "prompt"), ("chosen", "completion")],
                None,
                "`columns` maps to `question`, which only questions",
            ),
            (
                &["prompt", "completion"],
                &[],
                Some(Form::Kto),
                "`format: kto` needs a column `label`",
            ),
            (&["text"], &[], Some(Form::Alpaca), "`output` or `response`"),
        ] {
            let error = format!("{:#}", read(names, columns, asked).unwrap_err());
            assert!(error.contains(expected), "{error}");
        }
    }
}
