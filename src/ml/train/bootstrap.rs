//! Intervals for scores by the bootstrap: rows are drawn again with replacement, and the scores of each such sample spread as the scores
//! of other rows of the same kind would (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter 13: percentile
//! intervals).

use std::collections::BTreeMap;

use pipeline_kernels::random::splitmix64;

/// How many samples are drawn.
const RESAMPLES: usize = 2000;
/// The share of samples inside of an interval.
const CONFIDENCE: f64 = 0.95;
/// The state that random numbers start from, so that the same rows give the same intervals.
const SEED: u64 = 0;

/// A score that is a ratio of two sums over rows: with denominators of 1 a mean. It may be the difference of two of these.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct RowScore {
    /// By row.
    pub numerators: Vec<f64>,
    /// By row.
    pub denominators: Vec<f64>,
    /// Whether the score is the exponential of the ratio.
    pub exponential: bool,
    /// A score of the same rows that is taken off.
    pub minus: Option<Box<Self>>,
}

impl RowScore {
    /// The mean of one value a row.
    pub fn mean(values: Vec<f64>) -> Self {
        Self {
            denominators: vec![1.; values.len()],
            numerators: values,
            ..Self::default()
        }
    }

    /// The score of these rows.
    pub fn value(&self, rows: impl Iterator<Item = usize> + Clone) -> f64 {
        if let Some(minus) = &self.minus {
            return self.ratio(rows.clone()) - minus.ratio(rows);
        }
        self.ratio(rows)
    }

    fn ratio(&self, rows: impl Iterator<Item = usize>) -> f64 {
        let (mut above, mut below) = (0., 0.);
        for row in rows {
            above += self.numerators[row];
            below += self.denominators[row];
        }
        let ratio: f64 = above / below;
        if self.exponential { ratio.exp() } else { ratio }
    }
}

/// Scores by name, all of the same rows.
pub type RowScores = BTreeMap<&'static str, RowScore>;

/// Lower and upper ends by name.
pub type Ends = BTreeMap<&'static str, [f64; 2]>;

/// Intervals of scores, and how they were made.
#[derive(Debug, Clone, PartialEq)]
pub struct Intervals {
    /// The share of samples inside.
    pub confidence: f64,
    /// How many samples were drawn.
    pub resamples: usize,
    /// What the random numbers started from.
    pub seed: u64,
    /// Of the base.
    pub base: Ends,
    /// Of what is compared with the base.
    pub paired: Option<Paired>,
}

/// The comparison of two models on the same samples of rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Paired {
    /// Intervals of the model that is compared with the base.
    pub compared: Ends,
    /// Intervals of its scores minus those of the base, both on the same sample.
    pub difference: Ends,
    /// By name, the two-sided p-value of the paired bootstrap for no difference: twice the smaller of the shares of samples in which the
    /// difference is at most 0, and at least 0. It is what makes the interval of the difference end at 0.
    pub p_values: BTreeMap<&'static str, f64>,
}

/// Intervals for the scores of a model and, of the same rows, of one that is compared with it. None for less than two rows.
///
/// # Panics
/// Scores have different numbers of rows.
pub fn intervals(base: &RowScores, compared: Option<&RowScores>) -> Option<Intervals> {
    let rows = base.values().next()?.numerators.len();
    if rows < 2 {
        return None;
    }
    for score in base
        .values()
        .chain(compared.into_iter().flat_map(BTreeMap::values))
    {
        assert_eq!(
            (score.numerators.len(), score.denominators.len()),
            (rows, rows),
            "all scores are of the same rows"
        );
    }
    let mut state = SEED;
    let mut samples: [BTreeMap<&'static str, Vec<f64>>; 3] = Default::default();
    let mut drawn = vec![0; rows];
    for _ in 0..RESAMPLES {
        for row in &mut drawn {
            // The upper half of a product with a 64-bit number: as even as 64 bits allow.
            *row = ((u128::from(splitmix64(&mut state)) * rows as u128) >> 64) as usize;
        }
        for (name, score) in base {
            let of_base = score.value(drawn.iter().copied());
            samples[0].entry(name).or_default().push(of_base);
            let Some(score) = compared.and_then(|compared| compared.get(name)) else {
                continue;
            };
            let with = score.value(drawn.iter().copied());
            samples[1].entry(name).or_default().push(with);
            samples[2].entry(name).or_default().push(with - of_base);
        }
    }
    let p_values = samples[2].iter();
    let p_values = p_values.filter_map(|(name, values)| Some((*name, p_value(values)?)));
    let p_values = p_values.collect();
    let [base, with, difference] = samples.map(|samples| {
        let samples = samples.into_iter();
        let ends = samples.filter_map(|(name, values)| Some((name, ends(values)?)));
        ends.collect::<Ends>()
    });
    Some(Intervals {
        confidence: CONFIDENCE,
        resamples: RESAMPLES,
        seed: SEED,
        base,
        paired: compared.map(|_| Paired {
            compared: with,
            difference,
            p_values,
        }),
    })
}

/// The two-sided p-value for no difference, from differences of samples. The observed rows count as one more sample, so that it is never 0
/// (Davison and Hinkley 1997, "Bootstrap Methods and their Application", equation 4.11). None if a difference is not finite.
fn p_value(differences: &[f64]) -> Option<f64> {
    if differences.iter().any(|value| !value.is_finite()) {
        return None;
    }
    let share = |of: fn(&f64) -> bool| {
        let count = differences.iter().filter(|value| of(value)).count();
        (count + 1) as f64 / (differences.len() + 1) as f64
    };
    let smaller = share(|value| *value <= 0.).min(share(|value| *value >= 0.));
    Some((2. * smaller).min(1.))
}

/// The ends of the middle part of some values. None if a value is not finite.
fn ends(mut values: Vec<f64>) -> Option<[f64; 2]> {
    if values.iter().any(|value| !value.is_finite()) {
        return None;
    }
    values.sort_by(f64::total_cmp);
    let at = |share: f64| values[(share * (values.len() - 1) as f64).round() as usize];
    let outside = (1. - CONFIDENCE) / 2.;
    Some([at(outside), at(1. - outside)])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn scores(values: Vec<f64>) -> RowScores {
        [("x", RowScore::mean(values))].into()
    }

    #[test]
    fn an_interval_is_as_wide_as_theory_says() {
        // A share of 0.3 of 1000 rows: the standard error is sqrt(0.3 * 0.7 / 1000) = 0.01449.
        let values = (0..1000).map(|row| f64::from(u8::from(row % 10 < 3)));
        let base = scores(values.collect());
        let found = intervals(&base, None).unwrap();
        let [low, high] = found.base["x"];
        let expected = 1.96 * (0.3f64 * 0.7 / 1000.).sqrt();
        assert!((0.3 - low - expected).abs() < 0.003, "{low}");
        assert!((high - 0.3 - expected).abs() < 0.003, "{high}");
        assert_eq!(intervals(&base, None).unwrap(), found, "seeded");
    }

    #[test]
    fn a_difference_is_of_the_same_rows() {
        // The rows differ widely, the two sides by exactly 1 in each.
        let values: Vec<f64> = (0..50).map(|row| f64::from(row * row)).collect();
        let base = scores(values.clone());
        let adapter = scores(values.iter().map(|value| value + 1.).collect());
        let found = intervals(&base, Some(&adapter)).unwrap();
        let paired = found.paired.unwrap();
        let [low, high] = paired.difference["x"];
        assert!((low - 1.).abs() < 1e-9 && (high - 1.).abs() < 1e-9);
        let smallest = 2. / (RESAMPLES + 1) as f64;
        assert!((paired.p_values["x"] - smallest).abs() < 1e-12);
        let [low, high] = found.base["x"];
        assert!(high - low > 100.);
    }

    #[test]
    fn a_p_value_is_that_of_the_normal_distribution_where_it_holds() {
        // Differences of mean 0.1 and standard deviation 1 in 400 rows: a mean two standard errors from 0.
        let values: Vec<f64> = (0..400)
            .map(|row| 0.1 + if row % 2 == 0 { 1. } else { -1. })
            .collect();
        let base = scores(vec![0.; 400]);
        let found = intervals(&base, Some(&scores(values))).unwrap();
        let p = found.paired.unwrap().p_values["x"];
        assert!((p - 0.0455).abs() < 0.015, "{p}");
        let same = intervals(&base, Some(&base)).unwrap().paired.unwrap();
        assert!((same.p_values["x"] - 1.).abs() < 1e-12);
        assert_eq!(p_value(&[1., f64::NAN]), None);
    }

    #[test]
    fn what_has_no_spread_has_no_interval_or_an_empty_one() {
        assert_eq!(intervals(&scores(vec![1.]), None), None);
        assert_eq!(intervals(&RowScores::new(), None), None);
        let found = intervals(&scores(vec![2.; 5]), None).unwrap();
        assert!(found.base["x"].iter().all(|end| (end - 2.).abs() < 1e-12));
        let found = intervals(&scores(vec![f64::NAN; 5]), None).unwrap();
        assert!(found.base.is_empty());
        let perplexity = RowScore {
            numerators: vec![2., 4.],
            denominators: vec![1., 3.],
            exponential: true,
            minus: None,
        };
        assert!((perplexity.value(0..2) - 1.5f64.exp()).abs() < 1e-12);
    }

    /// The mean of good rows minus that of bad ones, whichever rows are drawn.
    #[test]
    fn a_difference_of_two_means_is_that_in_each_sample() {
        let good = RowScore {
            numerators: vec![3., 5., 0.],
            denominators: vec![1., 1., 0.],
            ..RowScore::default()
        };
        let bad = RowScore {
            numerators: vec![0., 0., 1.],
            denominators: vec![0., 0., 1.],
            ..RowScore::default()
        };
        let margin = RowScore {
            minus: Some(Box::new(bad)),
            ..good
        };
        assert!((margin.value(0..3) - 3.).abs() < 1e-12);
        assert!((margin.value([0, 0, 1, 2, 2].into_iter()) - (11. / 3. - 1.)).abs() < 1e-12);
        assert!(margin.value(0..2).is_nan(), "no bad row");
    }
}
