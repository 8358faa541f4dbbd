//! A curve in one line of text.

const HEIGHTS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];

/// The values as at most `width` bars: of more values, the mean of each stretch. What is not finite is a space.
pub fn sparkline(values: &[f64], width: usize) -> String {
    if values.is_empty() || width == 0 {
        return String::new();
    }
    let count = values.len().min(width);
    let stretches: Vec<Option<f64>> = (0..count)
        .map(|index| {
            let stretch = &values[index * values.len() / count..(index + 1) * values.len() / count];
            let finite: Vec<f64> = stretch
                .iter()
                .copied()
                .filter(|value| value.is_finite())
                .collect();
            // Divided before they are added, so that large numbers stay finite.
            let share = finite.len() as f64;
            (!finite.is_empty()).then(|| finite.iter().map(|value| value / share).sum())
        })
        .collect();
    let lowest = stretches
        .iter()
        .flatten()
        .copied()
        .fold(f64::INFINITY, f64::min);
    let highest = stretches
        .iter()
        .flatten()
        .copied()
        .fold(f64::NEG_INFINITY, f64::max);
    let bar = |value: f64| {
        let above = value / 2. - lowest / 2.;
        let range = highest / 2. - lowest / 2.;
        if range <= 0. {
            return HEIGHTS[3];
        }
        let height = (above / range * (HEIGHTS.len() - 1) as f64).round() as usize;
        HEIGHTS[height.min(HEIGHTS.len() - 1)]
    };
    stretches
        .into_iter()
        .map(|value| value.map_or(' ', bar))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_has_the_shape_of_its_values() {
        let rising: Vec<f64> = (0..8).map(f64::from).collect();
        assert_eq!(sparkline(&rising, 8), "▁▂▃▄▅▆▇█");
        let many: Vec<f64> = (0..800).map(f64::from).collect();
        assert_eq!(sparkline(&many, 8), "▁▂▃▄▅▆▇█");
        assert_eq!(sparkline(&[2., 2.], 8), "▄▄");
        assert_eq!(sparkline(&[f64::MIN, f64::NAN, f64::MAX], 8), "▁ █");
        assert_eq!(sparkline(&[], 8), "");
        assert_eq!(sparkline(&[f64::NAN; 3], 8), "   ");
    }
}
