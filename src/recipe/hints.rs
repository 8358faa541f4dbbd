//! Did-you-mean: by edit distance, and by what people type for other programs.

use crate::engine::Kind;

use super::schema::Parameters;
use super::spellings::{ELSEWHERE, KINDS_BY_MEANING, NO_KIND, SPELLINGS, VALUES, WITHIN};

/// The most names that a sentence lists, and the most characters of each.
const MOST_LISTED: usize = 100;
const LONGEST_NAME: usize = 100;
/// The most names that one is compared with.
const MOST_COMPARED: usize = 1000;

/// The name most like `name`, when one is near enough to be meant.
pub(crate) fn nearest<'n>(name: &str, known: impl IntoIterator<Item = &'n str>) -> Option<&'n str> {
    if name.len() > 200 {
        return None;
    }
    let lower = name.to_lowercase().replace('-', "_");
    let limit = match lower.chars().count() {
        0 => return None,
        1..=2 => 0,
        3..=5 => 1,
        6..=9 => 2,
        _ => 3,
    };
    known
        .into_iter()
        .take(MOST_COMPARED)
        // Bytes may be four a character, and lower case may be longer.
        .filter(|known| known.len() <= 4 * lower.len() + 12)
        .map(|known| {
            let other = known.to_lowercase();
            (strsim::damerau_levenshtein(&lower, &other), known)
        })
        .filter(|(distance, known)| *distance <= limit && *known != name)
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, known)| known)
}

/// `a`, `b` and `c`.
pub(crate) fn list<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    joined(names, "and")
}

/// `a`, `b` or `c`.
pub(crate) fn either<'n>(names: impl IntoIterator<Item = &'n str>) -> String {
    joined(names, "or")
}

fn joined<'n>(names: impl IntoIterator<Item = &'n str>, word: &str) -> String {
    let mut names = names.into_iter();
    let quoted = |name: &str| match name.char_indices().nth(LONGEST_NAME) {
        Some((end, _)) => format!("`{}..`", name.get(..end).unwrap_or_default()),
        None => format!("`{name}`"),
    };
    let mut shown: Vec<String> = names.by_ref().take(MOST_LISTED).map(quoted).collect();
    match names.count() {
        0 => {}
        more => shown.push(format!("{more} more")),
    }
    match shown.split_last() {
        None => "nothing".to_owned(),
        Some((one, [])) => one.clone(),
        Some((last, rest)) => format!("{} {word} {last}", rest.join(", ")),
    }
}

/// Advice for a parameter that `kind` doesn't have.
pub(crate) fn parameter(name: &str, kind: &Kind, kinds: &'static [Kind]) -> String {
    let parameters = Parameters::from_kind(kind);
    let own: Vec<&str> = parameters
        .0
        .iter()
        .map(|parameter| parameter.name.as_str())
        .collect();
    let lower = name.to_lowercase().replace('-', "_");
    let within = WITHIN
        .iter()
        .find(|(holder, foreign, _)| *holder == kind.name && *foreign == lower);
    if let Some((.., advice)) = within {
        return (*advice).to_owned();
    }
    let ours = SPELLINGS.iter().find(|(foreign, _)| *foreign == lower);
    let ours = ours.map_or(&[][..], |(_, ours)| ours);
    if let Some(known) = ours.iter().find(|known| own.contains(*known)) {
        return format!("here it is called `{known}`");
    }
    // A word that other programs know is meant as they mean it, however much another one looks like it.
    let elsewhere = ELSEWHERE.iter().find(|(foreign, _)| *foreign == lower);
    if elsewhere.is_none()
        && let Some(known) = nearest(name, own.iter().copied())
    {
        return format!("did you mean `{known}`?");
    }
    // The same thing in another stage: by our name, or by a foreign one.
    for wanted in std::iter::once(&name).chain(ours) {
        let holders: Vec<&str> = kinds
            .iter()
            .filter(|other| other.name != kind.name && Parameters::from_kind(other).has(wanted))
            .map(|other| other.name)
            .collect();
        if !holders.is_empty() {
            let it = if *wanted == name {
                "it is".to_owned()
            } else {
                format!("here it is called `{wanted}`,")
            };
            return format!("{it} a parameter of {}", list(holders));
        }
    }
    if let Some((_, elsewhere)) = elsewhere {
        return (*elsewhere).to_owned();
    }
    if own.is_empty() {
        return format!("`{}` takes no parameters", kind.name);
    }
    let all = format!("`pipeline kinds {}` lists all parameters", kind.name);
    match &by_meaning(&lower, &parameters)[..] {
        _ if own.len() <= FEW => format!("`{}` takes {}", kind.name, list(own)),
        [] => all,
        some => format!("perhaps {}; {all}", either(some.iter().copied())),
    }
}

/// So many names are listed whole.
const FEW: usize = 8;
/// The most names that are suggested by their meaning.
const SUGGESTED: usize = 3;

/// The parameters whose names or descriptions have the words of a name.
fn by_meaning<'p>(name: &str, parameters: &'p Parameters) -> Vec<&'p str> {
    let words: Vec<&str> = name
        .split('_')
        .filter(|word| word.len() > 2 && !["use", "the", "max", "num", "per"].contains(word))
        .collect();
    let stem = |word: &str| word.trim_end_matches('s').to_owned();
    let mut scored: Vec<(usize, &str)> = parameters
        .0
        .iter()
        .map(|parameter| {
            let of_name: Vec<String> = parameter.name.split('_').map(stem).collect();
            let text = parameter.description.to_lowercase();
            let of_text: Vec<String> = text
                .split(|c: char| !c.is_alphanumeric())
                .map(stem)
                .collect();
            let score = words.iter().map(|word| {
                let word = stem(word);
                4 * usize::from(of_name.contains(&word)) + usize::from(of_text.contains(&word))
            });
            (score.sum(), parameter.name.as_str())
        })
        .filter(|(score, _)| *score > 0)
        .collect();
    scored.sort_by_key(|(score, _)| std::cmp::Reverse(*score));
    let best = scored.first().map_or(0, |(score, _)| *score);
    let near = scored.into_iter().filter(|(score, _)| 2 * score > best);
    near.take(SUGGESTED).map(|(_, name)| name).collect()
}

/// Advice for a word that a parameter doesn't know.
pub(crate) fn word(parameter: &str, found: &str, known: &[&'static str]) -> Option<String> {
    let name = parameter.rsplit('.').next().unwrap_or(parameter);
    let lower = found.to_lowercase();
    let told = VALUES
        .iter()
        .find(|(of, foreign, _)| *of == name && *foreign == lower);
    if let Some((.., advice)) = told {
        return Some((*advice).to_owned());
    }
    let known = || known.iter().copied();
    let part = |word: &&str| lower.len() > 2 && (word.contains(&lower) || lower.contains(word));
    let near = nearest(found, known()).or_else(|| known().find(part));
    near.map(|known| format!("did you mean `{known}`?"))
}

/// Advice for a kind that doesn't exist.
pub(crate) fn kind(name: &str, kinds: &[Kind]) -> String {
    let names = || kinds.iter().map(|kind| kind.name);
    let lower = name.to_lowercase().replace('-', "_");
    if let Some((_, advice)) = NO_KIND.iter().find(|(foreign, _)| *foreign == lower) {
        return (*advice).to_owned();
    }
    let meant = KINDS_BY_MEANING
        .iter()
        .find(|(foreign, _)| foreign.contains(&lower.as_str()));
    let meant = meant.map_or(&[][..], |(_, ours)| ours);
    let meant: Vec<&str> = names().filter(|name| meant.contains(name)).collect();
    if !meant.is_empty() {
        return format!("did you mean {}?", either(meant));
    }
    match nearest(name, names()) {
        Some(known) => format!("did you mean `{known}`?"),
        None => format!("the kinds are {}", list(names())),
    }
}
