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
        let text = include_str!("../../../tests/golden/lr_schedules.json");
        let golden: std::collections::BTreeMap<String, Vec<f64>> =
            serde_json::from_str(text).unwrap();
        assert_eq!(golden.len(), 8);
        let mut largest = 0f64;
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
                let far = (schedule.factor(step) - factor).abs();
                assert!(far < 1e-7, "{name} {step}");
                largest = largest.max(far);
            }
        }
        println!("| schedules | cosine, linear, constant | {largest:.1e} | | 1e-7 |");
    }

    #[test]
    fn the_other_factors_are_those_of_transformers() {
        let text = include_str!("../../../tests/golden/lr_schedules_more.json");
        let golden: Vec<serde_json::Value> = serde_json::from_str(text).unwrap();
        assert_eq!(golden.len(), 15);
        let mut largest = 0f64;
        for case in golden {
            let kwargs = case["kwargs"].as_object().unwrap();
            let shape = match case["kind"].as_str().unwrap() {
                "cosine" => Shape::Cosine,
                "cosine_with_restarts" => {
                    let cycles = kwargs.get("num_cycles").map_or(1, |n| n.as_u64().unwrap());
                    Shape::CosineWithRestarts {
                        cycles: cycles as u32,
                    }
                }
                "inverse_sqrt" => Shape::InverseSqrt,
                other => panic!("{other}"),
            };
            let number = |name: &str| case[name].as_u64().unwrap();
            let (warmup, total) = (number("warmup"), number("total"));
            let schedule = Schedule {
                shape,
                warmup,
                total,
            };
            let factors = case["factors"].as_array().unwrap();
            assert_eq!(factors.len() as u64, total + 1);
            for (step, factor) in (0..).zip(factors) {
                let far = (schedule.factor(step) - factor.as_f64().unwrap()).abs();
                assert!(far < 1e-7, "{shape:?} warmup {warmup} step {step}: {far}");
                largest = largest.max(far);
            }
        }
        println!("| schedules | cosine_with_restarts, inverse_sqrt | {largest:.1e} | | 1e-7 |");
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
