//! shim rng
pub struct TorchRng {
    s: Vec<u32>,
    i: usize,
}
impl TorchRng {
    pub fn new(seed: u64) -> Self {
        let mut s = vec![seed as u32];
        for i in 1..624u32 {
            let p = s[i as usize - 1];
            s.push(1_812_433_253u32.wrapping_mul(p ^ (p >> 30)).wrapping_add(i));
        }
        Self { s, i: 624 }
    }
    pub fn next_u32(&mut self) -> u32 {
        if self.i == 624 {
            for k in 0..624 {
                let y = (self.s[k] & 0x8000_0000) | (self.s[(k + 1) % 624] & 0x7fff_ffff);
                self.s[k] =
                    self.s[(k + 397) % 624] ^ (y >> 1) ^ if y & 1 == 1 { 0x9908_b0df } else { 0 };
            }
            self.i = 0;
        }
        let mut y = self.s[self.i];
        self.i += 1;
        y ^= y >> 11;
        y ^= (y << 7) & 0x9d2c_5680;
        y ^= (y << 15) & 0xefc6_0000;
        y ^ (y >> 18)
    }
}
