//! Conditions on columns, such as `beta>0.1`, and the columns that names mean.

use std::collections::BTreeSet;
use std::str::FromStr;

use serde_json::Value;

use crate::cli::gather::plain;

/// A condition on a column.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Condition {
    /// The column as it was typed.
    pub(super) column: String,
    comparison: Comparison,
    wanted: String,
}

#[derive(Debug, Clone, Copy, PartialEq)]
enum Comparison {
    Equal,
    Unequal,
    Less,
    AtMost,
    Greater,
    AtLeast,
}

/// The longer ones first.
const COMPARISONS: [(&str, Comparison); 7] = [
    ("==", Comparison::Equal),
    ("!=", Comparison::Unequal),
    ("<=", Comparison::AtMost),
    (">=", Comparison::AtLeast),
    ("=", Comparison::Equal),
    ("<", Comparison::Less),
    (">", Comparison::Greater),
];

impl FromStr for Condition {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let expected = || "expected COLUMN, one of = != < <= > >=, and a value, such as `beta>0.1`";
        let at = text.find(['=', '!', '<', '>']).ok_or_else(expected)?;
        let (column, rest) = text.split_at(at);
        let found = COMPARISONS
            .iter()
            .find_map(|(sign, comparison)| Some((rest.strip_prefix(sign)?, *comparison)));
        let (wanted, comparison) = found.ok_or_else(expected)?;
        let (column, wanted) = (column.trim(), wanted.trim());
        if column.is_empty() || wanted.is_empty() {
            return Err(expected().to_owned());
        }
        Ok(Self {
            column: column.to_owned(),
            comparison,
            wanted: wanted.to_owned(),
        })
    }
}

impl Condition {
    /// Whether it is true of a value; of none it is never true.
    pub(super) fn holds(&self, value: Option<&Value>) -> bool {
        let Some(value) = value else {
            return false;
        };
        let text = plain(value);
        let number = |text: &str| text.parse::<f64>().ok();
        let order = match (
            value.as_f64().or_else(|| number(&text)),
            number(&self.wanted),
        ) {
            (Some(value), Some(wanted)) => value.partial_cmp(&wanted),
            _ => Some(text.as_str().cmp(&self.wanted)),
        };
        match self.comparison {
            Comparison::Equal => order.is_some_and(std::cmp::Ordering::is_eq),
            Comparison::Unequal => order.is_none_or(std::cmp::Ordering::is_ne),
            Comparison::Less => order.is_some_and(std::cmp::Ordering::is_lt),
            Comparison::AtMost => order.is_some_and(std::cmp::Ordering::is_le),
            Comparison::Greater => order.is_some_and(std::cmp::Ordering::is_gt),
            Comparison::AtLeast => order.is_some_and(std::cmp::Ordering::is_ge),
        }
    }
}

/// The column that a name means: the one called so, or the only one that ends in it behind a dot, or else the only one of these that
/// differs. The error is a sentence and a hint.
pub(super) fn column(
    names: &BTreeSet<&str>,
    differing: &[String],
    wanted: &str,
) -> Result<String, (String, String)> {
    const MOST: usize = 30;
    if names.contains(wanted) {
        return Ok(wanted.to_owned());
    }
    let listed = |names: &[&str]| {
        let more = names.len().saturating_sub(MOST);
        let shown = names.iter().take(MOST).copied().collect::<Vec<_>>();
        let shown = shown.join(", ");
        if more > 0 {
            format!("{shown} and {more} more")
        } else {
            shown
        }
    };
    let ending: Vec<&str> = names
        .iter()
        .copied()
        .filter(|name| {
            let before = name.strip_suffix(wanted);
            before.is_some_and(|before| before.ends_with('.'))
        })
        .collect();
    let differs = |name: &&str| differing.iter().any(|other| other == name);
    let mut narrowed = ending.iter().copied().filter(differs);
    if let (Some(one), None) = (narrowed.next(), narrowed.next()) {
        return Ok(one.to_owned());
    }
    match ending[..] {
        [one] => Ok(one.to_owned()),
        [] => {
            let all: Vec<&str> = names.iter().copied().collect();
            let message = format!("no result has `{wanted}`");
            Err((message, format!("the columns are {}", listed(&all))))
        }
        ref several => {
            let message = format!("`{wanted}` may be {} columns", several.len());
            Err((message, format!("write one of {}", listed(several))))
        }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn conditions_compare_numbers_as_numbers_and_texts_as_texts() {
        let holds =
            |text: &str, value: Value| text.parse::<Condition>().unwrap().holds(Some(&value));
        assert!(holds("beta>0.1", json!(0.2)) && !holds("beta > 0.1", json!(0.1)));
        assert!(holds("beta>=1e-1", json!(0.1)) && holds("beta=0.10", json!(0.1)));
        assert!(holds("seed!=2", json!(10)) && holds("seed<10", json!(9)));
        assert!(holds("optim=adamw_8bit", json!("adamw_8bit")));
        assert!(holds("optim!=sgd", json!("adamw_8bit")) && !holds("on==false", json!(true)));
        assert!(!"a<=1".parse::<Condition>().unwrap().holds(None));
        assert!(!holds("loss<1", json!("NaN")) && holds("loss!=1", json!("NaN")));
        for wrong in ["beta", "=1", "beta>", "beta!1", ""] {
            assert!(wrong.parse::<Condition>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn columns_are_found_by_their_end() {
        let names = BTreeSet::from(["tuned.beta", "tuned.seed", "split.seed", "run"]);
        assert_eq!(column(&names, &[], "beta").unwrap(), "tuned.beta");
        assert_eq!(column(&names, &[], "split.seed").unwrap(), "split.seed");
        let differing = ["tuned.seed".to_owned()];
        assert_eq!(column(&names, &differing, "seed").unwrap(), "tuned.seed");
        assert!(
            column(&names, &[], "seed")
                .unwrap_err()
                .0
                .contains("2 columns")
        );
        assert!(
            column(&names, &[], "gamma")
                .unwrap_err()
                .1
                .contains("tuned.beta")
        );
    }
}
