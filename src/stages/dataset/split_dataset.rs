//! `split_dataset`: a held-out part.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use anyhow::{Context as _, Result, ensure};
use arrow_array::{BooleanArray, RecordBatch};
use arrow_select::filter::filter_record_batch;
use pipeline_kernels::random::splitmix64;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::data::table::{BATCH_ROWS, Split, Writer, splits};
use crate::engine::{Context, Input, Problem, Stage};
use crate::stages::artifacts::Dataset;
use groups::{By, Groups};

mod groups;

/// Splits the rows of `train` into `train` and `test`.
///
/// Which rows are held out is drawn with `seed`; in both splits the rows keep their order, and training shuffles them anyway. Rows of
/// preferences with the same prompt stay together, so that none is trained on and tested. Other splits of the dataset are carried along.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SplitDataset {
    /// The dataset to split.
    dataset: Input<Dataset>,
    /// How many rows become `test`: below 1 the part of all rows (rounded up), else their number.
    test_size: f64,
    /// Decides which rows are held out.
    #[serde(default = "default_seed")]
    seed: u64,
    /// Draw the rows; without it the last rows are held out.
    #[serde(default = "default_shuffle")]
    shuffle: bool,
    /// Rows with equal values in this column, or in all columns of a list, go into the same split: `prompt` (what is asked, also where
    /// it is only in `chosen` and `rejected` or in `messages`), the default for preferences; `none` keeps nothing together, the default otherwise.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    group_by: Option<GroupBy>,
    /// Hold out the same part of the rows of each value of this column.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    stratify: Option<String>,
}

/// A column or several.
#[derive(Debug, Clone, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
enum GroupBy {
    Column(String),
    Columns(Vec<String>),
}

fn default_seed() -> u64 {
    42
}

fn default_shuffle() -> bool {
    true
}

impl Stage for SplitDataset {
    const KIND: &'static str = "split_dataset";
    const VERSION: u32 = 2;
    type Output = Dataset;
    const BOUNDED: bool = true;

    fn check(&self) -> Vec<Problem> {
        let mut problems = Vec::new();
        let size = self.test_size;
        let fits = size > 0.0 && size.is_finite() && (size < 1.0 || size.fract() == 0.0);
        if !fits {
            let problem = Problem::new(
                "test_size",
                "expected a part above 0 and below 1, or a number of rows",
            );
            problems.push(problem.hint("0.1 holds out a tenth, 100 holds out 100 rows"));
        }
        if matches!(&self.group_by, Some(GroupBy::Columns(columns)) if columns.is_empty()) {
            let problem = Problem::new("group_by", "expected at least one column");
            problems.push(problem.hint("`group_by: none` keeps nothing together"));
        }
        if self.stratify.is_some() && !self.shuffle {
            let problem = Problem::new("stratify", "without `shuffle` the last rows are held out");
            problems.push(problem.hint("leave `shuffle: false` out"));
        }
        problems
    }

    fn run(&self, cx: &Context) -> Result<()> {
        let folder = cx.input(&self.dataset)?;
        let all = splits(folder)?;
        ensure!(
            !all.contains_key("test"),
            "the dataset has a split `test` already, so there is nothing to hold out"
        );
        let train = Split::open(folder, "train")?;
        let rows = train.rows();
        let wanted = test_rows(rows, self.test_size);
        ensure!(
            wanted < rows,
            "`test_size` {} holds out {wanted} of {rows} rows and leaves none to train on",
            self.test_size
        );
        let is_test = self.chosen(&train, wanted, cx)?;
        let held_out = is_test.iter().filter(|test| **test).count();
        let mut writers = [
            Writer::create(cx.out(), "train", train.schema().clone())?,
            Writer::create(cx.out(), "test", train.schema().clone())?,
        ];
        let mut done = 0;
        for batch in train.batches(BATCH_ROWS) {
            let batch = batch?;
            let range = is_test.get(done..done + batch.num_rows());
            let mask = range.context("the split holds more rows than its files say")?;
            for (writer, held_out) in writers.iter_mut().zip([false, true]) {
                writer.write(&only(&batch, mask, held_out)?)?;
            }
            done += batch.num_rows();
            cx.progress(done as u64, Some(rows as u64), "rows");
            cx.check_cancelled()?;
        }
        for writer in writers {
            writer.finish()?;
        }
        for file in all
            .iter()
            .filter(|(name, _)| *name != "train")
            .flat_map(|(_, files)| files)
        {
            let name = file.file_name().context("a file without a name")?;
            let copied = std::fs::copy(file, cx.out().join(name));
            copied.with_context(|| format!("could not copy `{}`", file.display()))?;
        }
        cx.note(
            "rows",
            BTreeMap::from([("train", rows - held_out), ("test", held_out)]),
        );
        Ok(())
    }
}

impl SplitDataset {
    /// Which rows are held out, about `wanted` of them.
    fn chosen(&self, train: &Split, wanted: usize, cx: &Context) -> Result<Vec<bool>> {
        let by = match &self.group_by {
            Some(GroupBy::Column(name)) if name == "none" => By::Nothing,
            Some(GroupBy::Column(name)) if name == "prompt" => By::Prompt,
            Some(GroupBy::Column(name)) => By::Columns(vec![name.clone()]),
            Some(GroupBy::Columns(names)) => By::Columns(names.clone()),
            None if train.schema().field_with_name("rejected").is_ok() => By::Prompt,
            None => By::Nothing,
        };
        let rows = train.rows();
        if by == By::Nothing && self.stratify.is_none() {
            return Ok(draw(rows, wanted, self.seed, self.shuffle));
        }
        let groups =
            Groups::build(train, &by, cx).context("rows can't be put together by `group_by`")?;
        ensure!(
            groups.of_row.len() == rows,
            "the split holds more or fewer rows than its files say"
        );
        let is_held_out = match &self.stratify {
            None if groups.sizes.len() == rows => draw(rows, wanted, self.seed, self.shuffle),
            None => {
                let all: Vec<usize> = (0..groups.sizes.len()).collect();
                let mut chosen = vec![false; all.len()];
                let random = self.shuffle.then_some(SplitMix(self.seed));
                hold_out(&groups, all, wanted, random, &mut chosen);
                chosen
            }
            Some(column) => self.stratified(train, &groups, column, wanted, cx)?,
        };
        let is_test: Vec<bool> = groups
            .of_row
            .iter()
            .map(|group| is_held_out[*group])
            .collect();
        let held_out = is_test.iter().filter(|test| **test).count();
        let count = groups.sizes.len();
        if count < rows {
            let what = match &by {
                By::Prompt => "the same prompt".to_owned(),
                By::Columns(columns) => format!("equal `{}`", columns.join("`, `")),
                By::Nothing => "nothing in common".to_owned(),
            };
            let mut message =
                format!("rows with {what} stay together: {rows} rows are {count} groups");
            if held_out != wanted {
                _ = write!(
                    message,
                    ", so that {held_out} rows are held out where {wanted} are asked for"
                );
            }
            if held_out.abs_diff(wanted) * 10 > wanted {
                cx.warn(message);
            } else {
                cx.info(message);
            }
        }
        ensure!(
            (1..rows).contains(&held_out),
            "no split into `train` and `test` keeps rows together that have the same `group_by`: {rows} rows are {count} group{}; hint: \
             `group_by: none` keeps nothing together",
            if count == 1 { "" } else { "s" }
        );
        Ok(is_test)
    }

    /// Which rows are held out: the same share of each class.
    fn stratified(
        &self,
        train: &Split,
        groups: &Groups,
        column: &str,
        wanted: usize,
        cx: &Context,
    ) -> Result<Vec<bool>> {
        let classes = Groups::build(train, &By::Columns(vec![column.to_owned()]), cx)
            .context("rows have no class to `stratify` by")?;
        let count = classes.sizes.len();
        // A group has the class of its last row.
        let mut members: Vec<Vec<usize>> = vec![Vec::new(); count];
        let mut sizes = vec![0; count];
        for (group, last) in groups.last.iter().enumerate() {
            let class = classes.of_row[*last];
            members[class].push(group);
            sizes[class] += groups.sizes[group];
        }
        for (class, members) in members.iter().enumerate() {
            ensure!(
                members.len() >= 2,
                "the class {:?} of the column `{column}` has too few rows to be in `train` and in `test`: {} that belong together; \
                 hint: leave `stratify` out, or the class",
                classes.shown[class],
                sizes[class]
            );
        }
        let rows = train.rows();
        ensure!(
            wanted >= count && rows - wanted >= count,
            "the column `{column}` has {count} classes, more than the {} rows of `{}`; hint: leave `stratify` out, or hold out {}",
            wanted.min(rows - wanted),
            if wanted < count { "test" } else { "train" },
            if wanted < count { "more" } else { "fewer" },
        );
        let mut chosen = vec![false; groups.sizes.len()];
        let mut random = SplitMix(self.seed);
        for (members, wanted) in members.into_iter().zip(proportional(&sizes, wanted)) {
            let seed = splitmix64(&mut random.0);
            if wanted > 0 {
                hold_out(groups, members, wanted, Some(SplitMix(seed)), &mut chosen);
            }
        }
        Ok(chosen)
    }
}

/// Divides `whole` in proportion to `sizes`: each part is rounded down, and those with the largest remainders get one more.
fn proportional(sizes: &[usize], whole: usize) -> Vec<usize> {
    let all: usize = sizes.iter().sum();
    let exact = |size: usize| size as u128 * whole as u128;
    let mut parts: Vec<usize> = sizes
        .iter()
        .map(|size| (exact(*size) / all.max(1) as u128) as usize)
        .collect();
    let mut order: Vec<usize> = (0..sizes.len()).collect();
    order.sort_by_key(|class| std::cmp::Reverse(exact(sizes[*class]) % all.max(1) as u128));
    let missing = whole - parts.iter().sum::<usize>();
    for class in order.into_iter().take(missing) {
        parts[class] += 1;
    }
    parts
}

/// Marks some of these groups, so that they have about `wanted` rows: those that fit in a random order, or from the last one on.
fn hold_out(
    groups: &Groups,
    mut order: Vec<usize>,
    wanted: usize,
    random: Option<SplitMix>,
    chosen: &mut [bool],
) {
    match random {
        None => order.sort_by_key(|group| std::cmp::Reverse(groups.last[*group])),
        Some(mut random) => {
            for last in (1..order.len()).rev() {
                order.swap(last, random.below(last as u64 + 1) as usize);
            }
        }
    }
    let mut left = wanted;
    let mut smallest: Option<usize> = None;
    for group in order.iter().copied() {
        let size = groups.sizes[group];
        if size <= left {
            chosen[group] = true;
            left -= size;
        } else if smallest.is_none_or(|smallest| size < groups.sizes[smallest]) {
            smallest = Some(group);
        }
    }
    // A group is added if that brings the number of rows nearer to the wanted one, and in any case if nothing is held out yet.
    if let Some(group) = smallest.filter(|_| left > 0)
        && (groups.sizes[group] - left < left || left == wanted)
    {
        chosen[group] = true;
    }
}

fn only(batch: &RecordBatch, is_test: &[bool], held_out: bool) -> Result<RecordBatch> {
    let mask: BooleanArray = is_test.iter().map(|test| Some(*test == held_out)).collect();
    Ok(filter_record_batch(batch, &mask)?)
}

/// The number of rows held out, rounded as `datasets` does.
fn test_rows(rows: usize, test_size: f64) -> usize {
    if test_size < 1.0 {
        (test_size * rows as f64).ceil() as usize
    } else {
        test_size as usize
    }
}

/// Which rows are held out.
fn draw(rows: usize, held_out: usize, seed: u64, shuffle: bool) -> Vec<bool> {
    let mut is_test = vec![false; rows];
    if !shuffle {
        is_test[rows - held_out..].fill(true);
        return is_test;
    }
    // Floyd's sampling (Bentley and Floyd 1987): every set of `held_out` rows is equally likely, and no permutation is stored.
    let mut random = SplitMix(seed);
    for last in rows - held_out..rows {
        let drawn = random.below(last as u64 + 1) as usize;
        if is_test[drawn] {
            is_test[last] = true;
        } else {
            is_test[drawn] = true;
        }
    }
    is_test
}

/// `SplitMix64` (Steele, Lea, Flood 2014): small, well mixed, and the same on every machine.
struct SplitMix(u64);

impl SplitMix {
    /// An even draw from `0..bound`.
    fn below(&mut self, bound: u64) -> u64 {
        ((u128::from(splitmix64(&mut self.0)) * u128::from(bound)) >> 64) as u64
    }
}

#[cfg(test)]
mod tests;
