//! bitsandbytes' 8-bit data type: 256 values that are dense near 0 (Dettmers 2015, arXiv 1511.04561). The moments of 8-bit
//! AdamW and the magnitudes of doubly quantised 4-bit weights are stored in it.

use std::sync::LazyLock;

/// The values in rising order, and the midpoints between neighbours.
pub(super) struct Table {
    /// The value of each code.
    pub(super) values: Vec<f32>,
    /// One fewer than values.
    pub(super) midpoints: Vec<f32>,
    /// The code of 0.
    pub(super) zero: u8,
}

static SIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(true));
static UNSIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(false));

impl Table {
    /// For each power of ten from 1e-6 to 1: evenly spaced fractions, twice as many as for the power below.
    fn new(signed: bool) -> Self {
        let mut values = vec![0f32, 1.];
        for power in 0..7i32 {
            let count = (1usize << (power + i32::from(!signed))) + 1;
            let step = (1f32 - 0.1) / (count - 1) as f32;
            let edge = |i: usize| {
                // torch's `linspace`: from both ends, each value rounded once (fused multiply-add).
                if i < count / 2 {
                    step.mul_add(i as f32, 0.1)
                } else {
                    (-step).mul_add((count - 1 - i) as f32, 1.)
                }
            };
            for i in 0..count - 1 {
                let middle = f32::midpoint(edge(i), edge(i + 1));
                let value = (10f64.powi(power - 6) as f32) * middle;
                values.push(value);
                if signed {
                    values.push(-value);
                }
            }
        }
        values.sort_by(f32::total_cmp);
        let midpoints = values
            .windows(2)
            .map(|pair| f32::midpoint(pair[0], pair[1]))
            .collect();
        let zero = values.iter().position(|value| *value == 0.).unwrap_or(0) as u8;
        Self {
            values,
            midpoints,
            zero,
        }
    }

    /// The table with negative values, or without.
    pub(super) fn of(signed: bool) -> &'static Self {
        if signed { &SIGNED } else { &UNSIGNED }
    }

    /// The code of the nearest value; halfway, of the lower one.
    pub(super) fn code(&self, x: f32) -> u8 {
        self.midpoints.partition_point(|midpoint| *midpoint < x) as u8
    }
}

#[cfg(test)]
mod tests {
    use candle_core::Device;

    use super::*;

    #[test]
    fn tables_are_those_of_bitsandbytes() {
        let path = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/golden/nf4.safetensors");
        let golden = candle_core::safetensors::load(path, &Device::Cpu).unwrap();
        for (name, signed) in [("signed", true), ("unsigned", false)] {
            let theirs: Vec<f32> = golden[&format!("dynamic_map_{name}")].to_vec1().unwrap();
            let ours = &Table::of(signed).values;
            for (code, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                assert_eq!(ours.to_bits(), theirs.to_bits(), "{name} {code}");
            }
            assert_eq!(theirs.len(), 256);
        }
    }

    #[test]
    fn every_value_has_its_own_code() {
        for signed in [true, false] {
            let table = Table::of(signed);
            for (code, value) in table.values.iter().enumerate() {
                assert_eq!(usize::from(table.code(*value)), code);
            }
            assert_eq!(table.values[usize::from(table.zero)].to_bits(), 0);
        }
    }
}
