//! The report: one HTML file that needs nothing else, for people who look at what a recipe made.
//!
//! It is given plain data and knows nothing of recipes or stores. Everything in it is escaped by the template's rules for HTML, and a
//! policy in the page allows its own style and script by their digests and nothing else, so that no row of data can do anything.

mod graph;

use std::fmt::Write as _;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use minijinja::{AutoEscape, Environment, context};
use serde::Serialize;
use sha2::{Digest as _, Sha256};

use super::chart::{self, COLORS, Chart, Content};

/// A table; the first cell of a row names it.
#[derive(Debug, Clone, Default, PartialEq, Serialize)]
pub struct Table {
    /// Names of the columns.
    pub head: Vec<String>,
    /// Rows of cells.
    pub rows: Vec<Vec<String>>,
}

/// A name and what is known by it.
pub type Fact = (String, String);

/// A stage of the recipe.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Stage {
    /// Its name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// `fresh`, `runs`, `waits`, `unknown`, `running`, `done` or `failed`: a class of the page's style.
    pub state: &'static str,
    /// The state in a few words.
    pub state_label: String,
    /// The state in a sentence, if there is more to say.
    pub state_text: Option<String>,
    /// Why it would run.
    pub reasons: Vec<String>,
    /// What it is made from: the parameter, the stage's index in [`Page::stages`], and its name.
    pub inputs: Vec<(String, usize, String)>,
    /// How long it took.
    pub seconds: Option<String>,
    /// What is known of its result.
    pub facts: Vec<Fact>,
    /// Its parameters.
    pub parameters: Table,
    /// What it wrote down.
    pub notes: Vec<Fact>,
    /// What it said when it ran.
    pub messages: Vec<String>,
}

/// A line of a legend.
#[derive(Debug, Clone, Serialize)]
pub struct LegendEntry {
    /// What the lines show.
    pub name: String,
    /// Their colour.
    pub color: String,
    /// What else there is to say.
    pub detail: String,
}

impl LegendEntry {
    /// An entry for the lines of the colour at this index in [`COLORS`].
    pub fn new(name: String, color: usize, detail: String) -> Self {
        Self {
            name,
            color: hex(COLORS[color % COLORS.len()]),
            detail,
        }
    }
}

/// A chart in the page.
#[derive(Debug, Clone, Serialize)]
pub struct Figure {
    /// What stands above it.
    pub title: String,
    /// What it shows, for who can't see it.
    pub label: String,
    /// Whether it is a histogram.
    pub bars: bool,
    /// The drawing.
    #[serde(flatten)]
    pub drawn: chart::Drawn,
}

impl Figure {
    /// Draws a chart; `label` says what it shows.
    ///
    /// # Errors
    /// It can't be drawn.
    pub fn new(chart: &Chart, label: String) -> anyhow::Result<Self> {
        Ok(Self {
            title: chart.title.clone(),
            label,
            bars: matches!(chart.content, Content::Bars(_)),
            drawn: chart::svg(chart)?,
        })
    }
}

/// A training.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Training {
    /// The stage's name.
    pub name: String,
    /// Its kind.
    pub kind: String,
    /// How it went in a few numbers.
    pub facts: Vec<Fact>,
    /// Which lines are which.
    pub legend: Vec<LegendEntry>,
    /// The curves that people look at first.
    pub charts: Vec<Figure>,
    /// All others.
    pub more: Vec<Figure>,
    /// The numbers by step.
    pub table: Table,
    /// What the table leaves out.
    pub thinned: Option<String>,
}

/// Answers to a prompt.
#[derive(Debug, Clone, Serialize)]
pub struct Answer {
    /// The prompt.
    pub prompt: String,
    /// What the first answer is of.
    pub before_label: String,
    /// The model's answer.
    pub before: String,
    /// What the second answer is of.
    pub after_label: String,
    /// The answer with the adapter, or of the model beside a baseline.
    pub after: Option<String>,
    /// The better answer of the data.
    pub chosen: Option<String>,
    /// The worse answer of the data.
    pub rejected: Option<String>,
}

/// An evaluation.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Evaluation {
    /// The stage's index.
    pub stage: usize,
    /// The stage's name.
    pub name: String,
    /// What was scored, and how the intervals were made.
    pub about: String,
    /// The scores.
    pub table: Table,
    /// Answers before and after.
    pub answers: Vec<Answer>,
}

/// A row of a dataset.
#[derive(Debug, Clone, Serialize)]
pub struct Sample {
    /// Its split and number.
    pub title: String,
    /// Columns and values.
    pub cells: Vec<Fact>,
}

/// The rows that a stage made.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Data {
    /// The stage's name.
    pub name: String,
    /// The noun of its result.
    pub output: String,
    /// Splits with their rows and columns.
    pub splits: Table,
    /// What the stage noted about rows: dropped, cut, lints.
    pub notes: Vec<Fact>,
    /// Whether its lengths are shown at once.
    pub open: bool,
    /// Lengths by column.
    pub lengths: Table,
    /// That lengths are those of a part only.
    pub part: Option<String>,
    /// Histograms of lengths.
    pub charts: Vec<Figure>,
    /// The first rows.
    pub samples: Vec<Sample>,
}

/// All that a report shows.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Page {
    /// The title.
    pub title: String,
    /// What the recipe says of itself.
    pub description: Option<String>,
    /// The recipe's path.
    pub recipe: String,
    /// When the report was made.
    pub made: String,
    /// The version of the program.
    pub program: String,
    /// Whether it is served and follows a run.
    pub live: bool,
    /// What state is shown, so that an unchanged page need not be sent again.
    pub state: String,
    /// What is running now.
    pub running: Option<String>,
    /// States and how many stages are in them.
    pub counts: Vec<Fact>,
    /// All stages, in the order of the recipe's work.
    pub stages: Vec<Stage>,
    /// Trainings.
    pub trainings: Vec<Training>,
    /// Evaluations.
    pub evaluations: Vec<Evaluation>,
    /// Datasets, chats and tokens.
    pub data: Vec<Data>,
    /// The runs.
    pub runs: Table,
    /// The machine and the versions.
    pub environment: Vec<Fact>,
}

/// The text of the page.
///
/// # Errors
/// The template fails, which it has no reason to.
pub fn render(page: &Page) -> anyhow::Result<String> {
    let mut templates = Environment::new();
    templates.set_auto_escape_callback(|_| AutoEscape::Html);
    templates.add_template("page", include_str!("page.html"))?;
    let mut style = include_str!("page.css").to_owned();
    let colors = COLORS.iter().enumerate();
    let colors = colors.map(|(index, color)| (hex(*color), format!("var(--c{index})")));
    let others = [
        (hex(chart::INK), "var(--label)".to_owned()),
        (hex(chart::GRID), "var(--grid)".to_owned()),
    ];
    for (color, instead) in colors.chain(others) {
        _ = writeln!(
            style,
            ".chart [fill=\"{color}\"]{{fill:{instead}}}.chart [stroke=\"{color}\"]{{stroke:{instead}}}"
        );
    }
    let script = include_str!("page.js");
    let connect = if page.live {
        "connect-src 'self'; "
    } else {
        ""
    };
    let policy = format!(
        "default-src 'none'; {connect}style-src 'sha256-{}'; script-src 'sha256-{}'; img-src data:; base-uri 'none'; form-action 'none'",
        digest(&style),
        digest(script)
    );
    let mut parts = vec![("graph", "Stages")];
    let further = [
        ("training", "Training", !page.trainings.is_empty()),
        ("evaluation", "Evaluation", !page.evaluations.is_empty()),
        ("data", "Data", !page.data.is_empty()),
        ("runs", "Runs", !page.runs.rows.is_empty()),
        ("environment", "Environment", true),
    ];
    let further = further.iter().filter(|part| part.2);
    parts.extend(further.map(|part| (part.0, part.1)));
    let graph = graph::draw(&page.stages);
    let page = minijinja::Value::from(minijinja::value::Serde(page));
    let text = templates.get_template("page")?.render(context! {
        page, style, script, policy, parts, graph,
    })?;
    Ok(text)
}

fn digest(text: &str) -> String {
    BASE64_STANDARD.encode(Sha256::digest(text.as_bytes()))
}

fn hex(color: plotters::style::RGBColor) -> String {
    format!("#{:02X}{:02X}{:02X}", color.0, color.1, color.2)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::chart::{Look, Series};

    const BAD: &str =
        "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`</style></pre>";

    #[test]
    fn nothing_from_data_is_markup() {
        let bad = || BAD.to_owned();
        let chart = Chart {
            title: bad(),
            x_label: bad(),
            content: Content::Lines(vec![Series {
                name: bad(),
                color: 0,
                look: Look::Line,
                points: vec![(1., 2.), (2., 3.)],
            }]),
        };
        let figure = Figure::new(&chart, bad()).unwrap();
        let table = || Table {
            head: vec![bad(), bad()],
            rows: vec![vec![bad(), bad()]],
        };
        let page = Page {
            title: bad(),
            description: Some(bad()),
            recipe: bad(),
            made: bad(),
            program: bad(),
            live: true,
            state: bad(),
            running: Some(bad()),
            counts: vec![("fresh".into(), bad())],
            stages: vec![Stage {
                name: bad(),
                kind: bad(),
                state: "fresh",
                state_label: bad(),
                state_text: Some(bad()),
                reasons: vec![bad()],
                inputs: vec![(bad(), 0, bad())],
                seconds: Some(bad()),
                facts: vec![(bad(), bad())],
                parameters: table(),
                notes: vec![(bad(), bad())],
                messages: vec![bad()],
            }],
            trainings: vec![Training {
                name: bad(),
                kind: bad(),
                facts: vec![(bad(), bad())],
                legend: vec![LegendEntry::new(bad(), 0, bad())],
                charts: vec![figure.clone()],
                more: vec![figure.clone()],
                table: table(),
                thinned: Some(bad()),
            }],
            evaluations: vec![Evaluation {
                stage: 0,
                name: bad(),
                about: bad(),
                table: table(),
                answers: vec![Answer {
                    prompt: bad(),
                    before_label: bad(),
                    after_label: bad(),
                    before: bad(),
                    after: Some(bad()),
                    chosen: Some(bad()),
                    rejected: Some(bad()),
                }],
            }],
            data: vec![Data {
                name: bad(),
                output: bad(),
                splits: table(),
                notes: vec![(bad(), bad())],
                open: true,
                lengths: table(),
                part: Some(bad()),
                charts: vec![figure],
                samples: vec![Sample {
                    title: bad(),
                    cells: vec![(bad(), bad())],
                }],
            }],
            runs: table(),
            environment: vec![(bad(), bad())],
        };
        let text = render(&page).unwrap();
        assert_eq!(text.matches("<script").count(), 1);
        assert_eq!(text.matches("</script").count(), 1);
        assert_eq!(text.matches("<style").count(), 1);
        assert!(!text.contains("<img"));
        assert!(
            text.matches("&lt;img").count() > 60,
            "{}",
            text.matches("&lt;img").count()
        );
        assert!(!text.contains("unsafe-inline"));
        // No address outside of the page but the names of XML's vocabularies, and no attribute that the policy would refuse.
        for address in text.split("http").skip(1) {
            assert!(
                address.starts_with("://www.w3.org/2000/svg") || address.starts_with("-equiv"),
                "{}",
                &address[..40]
            );
        }
        assert!(!text.contains(" style=\"") && !text.contains(" onclick"));
    }

    #[test]
    fn a_page_with_nothing_is_whole() {
        let text = render(&Page::default()).unwrap();
        assert!(text.starts_with("<!doctype html>") && text.ends_with("</html>"));
        assert!(!text.contains("connect-src"));
    }
}
