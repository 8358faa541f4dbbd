//! bitsandbytes' 8-bit data type: 256 values that are dense near 0 (Dettmers 2015, arXiv 1511.04561; `bitsandbytes/functional.py`,
//! `create_dynamic_map`). The moments of 8-bit AdamW and the magnitudes of doubly quantised 4-bit weights are stored in it.

use std::sync::LazyLock;

/// The values in ascending order, and the midpoints between neighbours.
pub(in crate::ml) struct Table {
    /// The value of each code.
    pub(in crate::ml) values: Vec<f32>,
    /// The midpoints between neighbouring values, one fewer than there are values.
    pub(in crate::ml) midpoints: Vec<f32>,
    /// The code of 0.
    pub(in crate::ml) zero: u8,
    /// See [`first_codes`].
    first: Vec<u8>,
}

/// For every value of the upper 16 bits of an f32, the code of the smallest number with these bits. No two midpoints have their upper
/// bits in common, so the code of any number is this one or the next.
fn first_codes(midpoints: &[f32]) -> Vec<u8> {
    let mut first = vec![0; 1 << 16];
    let mut code = 0;
    // In ascending order, without NaNs. Of the negative numbers with the same upper bits, the smallest has all lower bits set.
    let negative = (0x8000..0xff80u32).rev().map(|half| half << 16 | 0xffff);
    let positive = (0..=0x7f80u32).map(|half| half << 16);
    for bits in negative.chain(positive) {
        while midpoints
            .get(code)
            .is_some_and(|midpoint| *midpoint < f32::from_bits(bits))
        {
            code += 1;
        }
        first[(bits >> 16) as usize] = code as u8;
    }
    first
}

static SIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(true));
static UNSIGNED: LazyLock<Table> = LazyLock::new(|| Table::new(false));

impl Table {
    /// Computes the table: for each power of ten from 1e-6 to 1 evenly spaced fractions, twice as many as for the power below.
    fn new(signed: bool) -> Self {
        let mut values = vec![0f32, 1.];
        for power in 0..7i32 {
            let count = (1usize << (power + i32::from(!signed))) + 1;
            let step = (1f32 - 0.1) / (count - 1) as f32;
            let edge = |i: usize| {
                // torch's `linspace` counts from both ends and rounds each value once (fused multiply-add).
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
        let midpoints: Vec<f32> = values
            .windows(2)
            .map(|pair| f32::midpoint(pair[0], pair[1]))
            .collect();
        let first = first_codes(&midpoints);
        let zero = values.iter().position(|value| *value == 0.).unwrap_or(0) as u8;
        Self {
            values,
            midpoints,
            zero,
            first,
        }
    }

    /// The table with negative values if `signed`, else the one without.
    pub(in crate::ml) fn get(signed: bool) -> &'static Self {
        if signed { &SIGNED } else { &UNSIGNED }
    }

    /// The code of the value nearest to `x`; halfway between two, that of the lower one.
    pub(in crate::ml) fn code(&self, x: f32) -> u8 {
        let first = self.first.get((x.to_bits() >> 16) as usize);
        let first = first.copied().unwrap_or_default();
        let above = self.midpoints.get(usize::from(first));
        first + u8::from(above.is_some_and(|midpoint| *midpoint < x))
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
            let ours = &Table::get(signed).values;
            for (code, (ours, theirs)) in ours.iter().zip(&theirs).enumerate() {
                assert_eq!(ours.to_bits(), theirs.to_bits(), "{name} {code}");
            }
            assert_eq!(theirs.len(), 256);
        }
    }

    #[test]
    fn codes_are_those_of_a_plain_search() {
        for signed in [true, false] {
            let table = Table::get(signed);
            let edges = table.midpoints.iter().chain(&table.values);
            let near = edges.flat_map(|x| [x.next_down(), *x, x.next_up()]);
            let all = (0..1u32 << 18).map(|upper| f32::from_bits(upper << 14));
            let special = [f32::MAX, f32::MIN, f32::INFINITY, f32::NEG_INFINITY, -0.];
            let all = near.chain(all).chain(special);
            for x in all.filter(|x| !x.is_nan()) {
                let code = table.midpoints.partition_point(|midpoint| *midpoint < x);
                assert_eq!(usize::from(table.code(x)), code, "{x}");
            }
        }
    }

    #[test]
    fn every_value_has_its_own_code() {
        for signed in [true, false] {
            let table = Table::get(signed);
            for (code, value) in table.values.iter().enumerate() {
                assert_eq!(usize::from(table.code(*value)), code);
            }
            assert_eq!(table.values[usize::from(table.zero)].to_bits(), 0);
        }
    }
}
