//! How long a training will take, told after its first steps.

use std::time::{Duration, Instant};

use crate::engine::Context;
use crate::ml::train::Step;

/// Steps that are measured; the first one of a process warms up and is none of them.
const STEPS: u64 = 3;
/// Short steps are measured for at least so long.
const LEAST: Duration = Duration::from_secs(2);
/// What takes no longer is not worth a sentence.
const SHORT: f64 = 60.;

/// Measures the first steps.
#[derive(Debug, Default)]
pub(super) struct FirstSteps {
    /// The first finished step, and when it was.
    first: Option<(u64, Instant)>,
    told: bool,
}

impl FirstSteps {
    /// Takes in a finished step; after some of them tells how long the rest will take, and puts that into the record.
    pub(super) fn step(&mut self, cx: &Context, step: &Step) {
        let Some((first, since)) = self.first else {
            if step.step > 0 {
                self.first = Some((step.step, Instant::now()));
            }
            return;
        };
        let done = step.step.saturating_sub(first);
        let elapsed = since.elapsed();
        if self.told || done < STEPS || elapsed < LEAST {
            return;
        }
        self.told = true;
        let each = elapsed.as_secs_f64() / done as f64;
        let left = each * step.total.saturating_sub(step.step) as f64;
        cx.note("estimated_seconds_a_step", (each * 1000.).round() / 1000.);
        if left > SHORT {
            cx.info(format!(
                "a step takes {each:.2} s, so that the other {} will take about {}",
                step.total.saturating_sub(step.step),
                duration(left)
            ));
        }
    }
}

/// Seconds as people read them, to the minute.
fn duration(seconds: f64) -> String {
    let minutes = (seconds / 60.).round() as u64;
    match minutes {
        0..60 => format!("{minutes} min"),
        _ => format!("{} h {} min", minutes / 60, minutes % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations_read_well() {
        assert_eq!(duration(61.), "1 min");
        assert_eq!(duration(8040.), "2 h 14 min");
    }
}
