//! Which stages of a graph become one array of jobs, and what each job waits for.

use std::collections::{BTreeMap, BTreeSet};

/// The most elements of an array that waits for those of another one each. Slurm looks at so many at a time (`correspond_after_task_cnt`),
/// and cancels the others if it has forgotten meanwhile what they wait for, even if that ended well.
const CORRESPONDING: usize = 10;

/// A script to be submitted, with a job for each of its stages.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Group {
    /// The numbers of the elements, and their stages: at least one. A single one is no array, and its number means nothing.
    pub(super) stages: Vec<(usize, usize)>,
    /// What has to succeed before.
    pub(super) after: BTreeSet<After>,
}

impl Group {
    pub(super) fn is_array(&self) -> bool {
        self.stages.len() > 1
    }
}

/// What a group waits for. Groups are named by their positions.
#[derive(Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum After {
    /// All of a group.
    All(usize),
    /// One element of an array.
    Element(usize, usize),
    /// Each element waits for the one of the same number.
    Corresponding(usize),
}

/// Divides stages into groups, in an order in which they can be submitted. Those that are `like` each other and on the same level of the
/// graph become arrays of at most so many elements, as far as they wait for the same, or each for the elements of one number of other
/// arrays (then of at most ten): none waits for more than it reads.
pub(super) fn groups<L: PartialEq>(
    inputs: &[Vec<usize>],
    order: &[usize],
    like: impl Fn(usize) -> Option<L>,
    most: usize,
) -> Vec<Group> {
    let mut level_of = vec![0; inputs.len()];
    let mut levels: Vec<Vec<(Option<L>, Vec<usize>)>> = Vec::new();
    for &stage in order {
        let behind = inputs[stage].iter().map(|input| level_of[*input] + 1);
        let number = behind.max().unwrap_or(0);
        level_of[stage] = number;
        if levels.len() <= number {
            levels.resize_with(number + 1, Vec::new);
        }
        let (level, like) = (&mut levels[number], like(stage));
        let known = level
            .iter_mut()
            .find(|(other, _)| like.is_some() && *other == like);
        match known {
            Some((_, stages)) => stages.push(stage),
            None => level.push((like, vec![stage])),
        }
    }
    let mut grouping = Grouping {
        inputs,
        most,
        groups: Vec::new(),
        place_of: vec![(0, 0); inputs.len()],
    };
    for (_, stages) in levels.into_iter().flatten() {
        grouping.add(&stages);
    }
    grouping.groups
}

struct Grouping<'a> {
    inputs: &'a [Vec<usize>],
    most: usize,
    groups: Vec<Group>,
    /// For each stage its group and the number of its element.
    place_of: Vec<(usize, usize)>,
}

impl Grouping<'_> {
    /// Adds stages that are alike.
    fn add(&mut self, stages: &[usize]) {
        let all = stages.iter().map(|stage| self.read_by(*stage));
        let common = all.reduce(|one, other| &one & &other).unwrap_or_default();
        // Several may read the same element, each of which is then in another array.
        let mut corresponding: BTreeMap<BTreeSet<usize>, Vec<BTreeMap<usize, usize>>> =
            BTreeMap::new();
        let mut equal: Vec<(BTreeSet<usize>, Vec<usize>)> = Vec::new();
        for &stage in stages {
            let inputs = self.read_by(stage);
            if let Some((arrays, element)) = self.elements(&(&inputs - &common)) {
                let made = corresponding.entry(arrays).or_default();
                let free = made.iter_mut().find(|made| !made.contains_key(&element));
                match free {
                    Some(made) => _ = made.insert(element, stage),
                    None => made.push(BTreeMap::from([(element, stage)])),
                }
            } else if let Some((_, stages)) = equal.iter_mut().find(|(other, _)| *other == inputs) {
                stages.push(stage);
            } else {
                equal.push((inputs, vec![stage]));
            }
        }
        for (arrays, made) in corresponding {
            let made: Vec<Vec<(usize, usize)>> = made
                .into_iter()
                .map(|stages| stages.into_iter().collect())
                .collect();
            for stages in made.iter().flat_map(|stages| stages.chunks(CORRESPONDING)) {
                if let [(_, stage)] = stages {
                    let after = self.after(&self.read_by(*stage));
                    self.push(vec![(0, *stage)], after);
                } else {
                    let mut after = self.after(&common);
                    after.extend(arrays.iter().copied().map(After::Corresponding));
                    self.push(stages.to_vec(), after);
                }
            }
        }
        for (inputs, stages) in equal {
            for stages in stages.chunks(self.most.max(1)) {
                let after = self.after(&inputs);
                self.push(stages.iter().copied().enumerate().collect(), after);
            }
        }
    }

    fn push(&mut self, stages: Vec<(usize, usize)>, after: BTreeSet<After>) {
        for (element, stage) in &stages {
            self.place_of[*stage] = (self.groups.len(), *element);
        }
        self.groups.push(Group { stages, after });
    }

    fn read_by(&self, stage: usize) -> BTreeSet<usize> {
        self.inputs[stage].iter().copied().collect()
    }

    /// The arrays that these stages are elements of, if all have the same number there.
    fn elements(&self, stages: &BTreeSet<usize>) -> Option<(BTreeSet<usize>, usize)> {
        let places = stages.iter().map(|stage| self.place_of[*stage]);
        let (arrays, elements): (BTreeSet<usize>, BTreeSet<usize>) = places.unzip();
        let &element = elements.first()?;
        let is_one = elements.len() == 1
            && arrays.len() == stages.len()
            && arrays.iter().all(|group| self.groups[*group].is_array());
        is_one.then_some((arrays, element))
    }

    /// What waits for these stages waits for this.
    fn after(&self, stages: &BTreeSet<usize>) -> BTreeSet<After> {
        let mut elements: BTreeMap<usize, BTreeSet<usize>> = BTreeMap::new();
        for stage in stages {
            let (group, element) = self.place_of[*stage];
            elements.entry(group).or_default().insert(element);
        }
        let after = elements.into_iter().flat_map(|(group, elements)| {
            if elements.len() == self.groups[group].stages.len() {
                return vec![After::All(group)];
            }
            let each = |element| After::Element(group, element);
            elements.into_iter().map(each).collect()
        });
        after.collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The groups of stages that are named with what they read, as `a[1] <- b c`; those with the same letters before `[` are alike.
    fn grouped(lines: &[&str], most: usize) -> Vec<String> {
        let stages: Vec<(&str, Vec<&str>)> = lines
            .iter()
            .map(|line| {
                let (name, inputs) = line.split_once(" <- ").unwrap_or((line, ""));
                (name, inputs.split_whitespace().collect())
            })
            .collect();
        let number = |name: &str| stages.iter().position(|(other, _)| *other == name).unwrap();
        let inputs: Vec<Vec<usize>> = stages
            .iter()
            .map(|(_, inputs)| inputs.iter().map(|name| number(name)).collect())
            .collect();
        let order: Vec<usize> = (0..stages.len()).collect();
        let like = |stage: usize| stages[stage].0.split_once('[').map(|(name, _)| name);
        let found = groups(&inputs, &order, like, most);
        let shown = found.iter().map(|group| {
            let of = group.stages.iter();
            let of: Vec<String> = of
                .map(|(element, stage)| format!("{element}:{}", stages[*stage].0))
                .collect();
            format!("{} {:?}", of.join(" "), group.after)
        });
        shown.collect()
    }

    #[test]
    fn what_waits_for_the_same_is_an_array() {
        let lines = [
            "p",
            "t[1] <- p",
            "other <- p",
            "t[2] <- p",
            "t[3] <- p",
            "all <- t[1] t[2] t[3]",
            "one <- p t[2]",
        ];
        let expected = [
            "0:p {}",
            "0:t[1] 1:t[2] 2:t[3] {All(0)}",
            "0:other {All(0)}",
            "0:all {All(1)}",
            "0:one {All(0), Element(1, 1)}",
        ];
        assert_eq!(grouped(&lines, 10), expected);
        // No more than there may be.
        let bounded = grouped(&lines, 2);
        assert_eq!(bounded[1..3], ["0:t[1] 1:t[2] {All(0)}", "0:t[3] {All(0)}"]);
        assert_eq!(bounded[4], "0:all {All(1), All(2)}");
        assert_eq!(grouped(&lines, 1).len(), lines.len());
    }

    #[test]
    fn elements_wait_for_those_that_they_read() {
        let lines = [
            "p",
            "t[1] <- p",
            "t[2] <- p",
            "t[3] <- p",
            // One of them is left out.
            "s[1] <- p t[1]",
            "s[3] <- p t[3]",
            // Two of each, and each reads one of them all.
            "v[1,a] <- t[1] t[2]",
            "v[1,b] <- t[1] t[2]",
            "v[3,a] <- t[3] t[2]",
            "v[3,b] <- t[3] t[2]",
            "w[1] <- s[1] t[1]",
            "w[3] <- s[3] t[3]",
        ];
        let expected = [
            "0:p {}",
            "0:t[1] 1:t[2] 2:t[3] {All(0)}",
            "0:s[1] 2:s[3] {All(0), Corresponding(1)}",
            "0:v[1,a] 2:v[3,a] {Element(1, 1), Corresponding(1)}",
            "0:v[1,b] 2:v[3,b] {Element(1, 1), Corresponding(1)}",
            "0:w[1] 2:w[3] {Corresponding(1), Corresponding(2)}",
        ];
        assert_eq!(grouped(&lines, 10), expected);
    }

    #[test]
    fn arrays_that_wait_for_elements_are_small() {
        let names = (1..=21).map(|n| (format!("t[{n}]"), format!("s[{n}] <- t[{n}]")));
        let (first, second): (Vec<String>, Vec<String>) = names.unzip();
        let lines: Vec<&str> = first.iter().chain(&second).map(String::as_str).collect();
        let found = grouped(&lines, 100);
        let starts = [
            "0:t[1] ",
            "0:s[1] ",
            "10:s[11] ",
            "0:s[21] {Element(0, 20)}",
        ];
        assert_eq!(found.len(), starts.len(), "{found:?}");
        for (found, start) in found.iter().zip(starts) {
            assert!(found.starts_with(start), "{found}");
        }
        assert!(
            found[2].ends_with(" 19:s[20] {Corresponding(0)}"),
            "{found:?}"
        );
    }

    #[test]
    fn what_corresponds_to_no_array_is_apart() {
        let lines = [
            "a[1]",
            "b[1]",
            "a[2]",
            "b[2]",
            // Across the elements of two arrays.
            "c[1] <- a[1] b[2]",
            "c[2] <- a[2] b[1]",
            // Two of the same array.
            "d[1] <- a[1] a[2]",
            "d[2] <- b[1] b[2]",
            // On another level, and alike.
            "a[3] <- c[1]",
            "a[4] <- c[1]",
        ];
        let expected = [
            "0:a[1] 1:a[2] {}",
            "0:b[1] 1:b[2] {}",
            "0:c[1] {Element(0, 0), Element(1, 1)}",
            "0:c[2] {Element(0, 1), Element(1, 0)}",
            "0:d[1] {All(0)}",
            "0:d[2] {All(1)}",
            "0:a[3] 1:a[4] {All(2)}",
        ];
        assert_eq!(grouped(&lines, 10), expected);
    }
}
