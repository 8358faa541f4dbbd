//! Random numbers that depend on nothing but a seed and an index.

/// The increment of splitmix64's state from one number to the next.
pub(crate) const GAMMA: u64 = 0x9e37_79b9_7f4a_7c15;

/// Advances a splitmix64 state and returns the stream's next number, uniform over all of `u64` and the same on every machine
/// (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators", figure 16).
#[inline(always)]
pub fn splitmix64(state: &mut u64) -> u64 {
    *state = state.wrapping_add(GAMMA);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The first numbers of the reference implementation with the seed 1234567.
    #[test]
    fn numbers_are_those_of_the_reference_implementation() {
        let mut state = 1_234_567;
        let numbers = [(); 3].map(|()| splitmix64(&mut state));
        assert_eq!(
            numbers,
            [
                6_457_827_717_110_365_317,
                3_203_168_211_198_807_973,
                9_817_491_932_198_370_423
            ]
        );
    }
}
