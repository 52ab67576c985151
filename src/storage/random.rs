//! Random bits by number: the same for an element however a dispatch is cut. Twin of `shaders/storage/random.wgsl`.

/// The stream of a tensor at a step.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Key(pub [u32; 2]);

impl Key {
    /// The stream of random bits of a seed, a tensor by its name, and how many steps have been applied to it.
    #[must_use]
    pub fn new(seed: u64, tensor: &str, applied_steps: u64) -> Self {
        // FNV-1a.
        let name = tensor.bytes().fold(0xcbf2_9ce4_8422_2325, |hash, byte| {
            (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
        });
        let key = [name, applied_steps]
            .into_iter()
            .fold(seed, |key, word| split_mix(key ^ split_mix(word)));
        Self([key as u32, (key >> 32) as u32])
    }

    /// Thirty-two bits for an element of the tensor, counted modulo 2^32, and one of its values: zero is the parameter,
    /// then come the slots.
    #[must_use]
    #[inline(always)]
    pub const fn random(self, element: u32, value: u32) -> u32 {
        let Self([x, y]) = self;
        let salt = y.wrapping_add(value.wrapping_mul(0x9e37_79b9));
        mix(mix(element ^ x).wrapping_add(salt))
    }
}

/// The finalizer of SplitMix64 (Steele, Lea and Flood 2014).
const fn split_mix(word: u64) -> u64 {
    let word = word.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let word = (word ^ word >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let word = (word ^ word >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    word ^ word >> 31
}

/// Chris Wellons' `lowbias32`: every bit of what goes in flips each bit of what comes out about as often as not.
#[inline(always)]
const fn mix(word: u32) -> u32 {
    let word = (word ^ word >> 16).wrapping_mul(0x7feb_352d);
    let word = (word ^ word >> 15).wrapping_mul(0x846c_a68b);
    word ^ word >> 16
}
