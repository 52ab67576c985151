//! The roof of the CPU: a copy with the access pattern of the step, in the same blocks and on as many threads.

use std::array::from_fn;
use std::hint::black_box;

use pulp::{Arch, Simd, WithSimd};

/// As the CPU twin does, loads come before stores: the arrays start at like offsets in their pages.
const BLOCK_ELEMS: usize = 16;

/// Arrays to copy around.
pub struct Stream {
    momentum: bool,
    x: Vec<f32>,
    y: Vec<f32>,
    z: Vec<f32>,
}

impl Stream {
    /// Three reads and two writes per element with momentum, else two reads and one write.
    pub fn new(momentum: bool, y: &[f32]) -> Self {
        Self {
            momentum,
            x: vec![1.0; y.len()],
            y: y.to_vec(),
            z: vec![1.0; if momentum { y.len() } else { 0 }],
        }
    }

    pub fn run(&mut self) {
        let (momentum, share) = (
            self.momentum,
            self.y.len().div_ceil(rayon::current_num_threads()).max(1),
        );
        // No bits, but no compiler knows, so it cannot leave out the read.
        let mask = black_box(0);
        let mut z = self.z.chunks_mut(share);
        let shares = self.x.chunks_mut(share).zip(self.y.chunks(share));
        let mut shares = shares.map(|(x, y)| Copy {
            momentum,
            mask,
            x,
            y,
            z: z.next().unwrap_or_default(),
        });
        let own = shares.next();
        rayon::in_place_scope(|scope| {
            for share in shares {
                scope.spawn(move |_| Arch::new().dispatch(share));
            }
            if let Some(own) = own {
                Arch::new().dispatch(own);
            }
        });
    }
}

struct Copy<'a> {
    momentum: bool,
    mask: u32,
    x: &'a mut [f32],
    y: &'a [f32],
    z: &'a mut [f32],
}

impl WithSimd for Copy<'_> {
    type Output = ();

    #[inline(always)]
    fn with_simd<S: Simd>(self, _: S) {
        let mix = |x: f32, y: f32| f32::from_bits(x.to_bits() ^ (y.to_bits() & self.mask));
        let (x, x_end) = self.x.as_chunks_mut::<BLOCK_ELEMS>();
        let (y, y_end) = self.y.as_chunks::<BLOCK_ELEMS>();
        if self.momentum {
            let (z, z_end) = self.z.as_chunks_mut::<BLOCK_ELEMS>();
            for ((x, y), z) in x.iter_mut().zip(y).zip(z) {
                let (from_x, from_y, from_z) = (*x, *y, *z);
                *z = from_x;
                *x = from_fn(|i| mix(from_z[i], from_y[i]));
            }
            for ((x, y), z) in x_end.iter_mut().zip(y_end).zip(z_end) {
                (*z, *x) = (*x, mix(*z, *y));
            }
        } else {
            for (x, y) in x.iter_mut().zip(y) {
                let (from_x, from_y) = (*x, *y);
                *x = from_fn(|i| mix(from_x[i], from_y[i]));
            }
            for (x, y) in x_end.iter_mut().zip(y_end) {
                *x = mix(*x, *y);
            }
        }
    }
}
