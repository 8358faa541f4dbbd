//! Learning-rate schedules, as transformers defines them: a factor from the number of finished steps.

/// The shape of a schedule.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Shape {
    /// Down to 0 on half a cosine.
    Cosine,
    /// Half a cosine, started again so many times.
    CosineWithRestarts {
        /// The number of falls.
        cycles: u32,
    },
    /// Down to 0 on a line.
    Linear,
    /// 1 from the start; warm-up is ignored.
    Constant,
    /// 1 after the warm-up.
    ConstantWithWarmup,
    /// One over the square root of the step.
    InverseSqrt,
}

/// A schedule for a whole training.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Schedule {
    /// Its shape.
    pub shape: Shape,
    /// Steps over which the rate rises from 0.
    pub warmup: u64,
    /// All steps.
    pub total: u64,
}

impl Schedule {
    /// The factor after `step` finished steps; the first step uses `factor(0)`.
    pub fn factor(&self, step: u64) -> f64 {
        let (s, warmup, total) = (step as f64, self.warmup as f64, self.total as f64);
        if self.shape == Shape::Constant {
            return 1.;
        }
        if step < self.warmup {
            return s / warmup.max(1.);
        }
        let progress = (s - warmup) / (total - warmup).max(1.);
        match self.shape {
            Shape::Cosine => (0.5 * (1. + (std::f64::consts::PI * progress).cos())).max(0.),
            Shape::CosineWithRestarts { cycles } => {
                if progress >= 1. {
                    return 0.;
                }
                let cycle = (f64::from(cycles) * progress) % 1.;
                (0.5 * (1. + (std::f64::consts::PI * cycle).cos())).max(0.)
            }
            Shape::Linear => ((total - s) / (total - warmup).max(1.)).max(0.),
            Shape::Constant | Shape::ConstantWithWarmup => 1.,
            Shape::InverseSqrt => {
                // transformers: the time scale is the warm-up, or 10,000 without one.
                let scale = if self.warmup == 0 { 10_000. } else { warmup };
                let shift = scale - warmup;
                1. / ((s + shift) / scale).sqrt()
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_are_those_of_transformers() {
        let text = include_str!("../../tests/golden/lr_schedules.json");
        let golden: std::collections::BTreeMap<String, Vec<f64>> =
            serde_json::from_str(text).unwrap();
        assert_eq!(golden.len(), 8);
        for (name, factors) in golden {
            let (shape, warmup) = name.rsplit_once("_warmup").unwrap();
            let shape = match shape {
                "cosine" => Shape::Cosine,
                "linear" => Shape::Linear,
                "constant" => Shape::Constant,
                "constant_with_warmup" => Shape::ConstantWithWarmup,
                other => panic!("{other}"),
            };
            let warmup = warmup.parse().unwrap();
            let schedule = Schedule {
                shape,
                warmup,
                total: 20,
            };
            for (step, factor) in (0..).zip(factors) {
                assert!(
                    (schedule.factor(step) - factor).abs() < 1e-7,
                    "{name} {step}"
                );
            }
        }
    }

    #[test]
    fn restarts_begin_at_the_top_again() {
        let schedule = Schedule {
            shape: Shape::CosineWithRestarts { cycles: 2 },
            warmup: 0,
            total: 20,
        };
        assert!((schedule.factor(10) - 1.).abs() < 1e-12);
        assert!((schedule.factor(15) - 0.5).abs() < 1e-12);
        assert!(schedule.factor(20).abs() < 1e-12);
    }
}
