//! The roof of the CPU: a copy with the access pattern of the step, by the twin's rules. It takes tasks from a queue
//! on all threads, loads a block of elements before it stores any, and keeps its arrays out of step in their pages.

use std::hint::black_box;
use std::sync::{Mutex, PoisonError};

use pulp::{Arch, Simd, WithSimd};

const TASK_ELEMS: usize = 32 * 1024;
const BLOCK_ELEMS: usize = 32;
const STAGGER_ELEMS: usize = 256;

/// Arrays to copy around.
pub struct Stream {
    momentum: bool,
    x: Vec<f32>,
    y: Vec<f32>,
    /// Further in by [`STAGGER_ELEMS`].
    z: Vec<f32>,
}

impl Stream {
    /// Three reads and two writes per element with momentum, else two reads and one write.
    pub fn new(momentum: bool, y: &[f32]) -> Self {
        let z_numel = if momentum { y.len() } else { 0 };
        Self {
            momentum,
            x: vec![1.0; y.len()],
            y: y.to_vec(),
            z: vec![1.0; STAGGER_ELEMS + z_numel],
        }
    }

    pub fn run(&mut self) {
        let momentum = self.momentum;
        // No bits, but no compiler knows, so it cannot leave out the read.
        let mask = black_box(0);
        let mut z = self.z[STAGGER_ELEMS..].chunks_mut(TASK_ELEMS);
        let tasks = self.x.chunks_mut(TASK_ELEMS).zip(self.y.chunks(TASK_ELEMS));
        let helpers = tasks.len().min(rayon::current_num_threads());
        let tasks = Mutex::new(tasks.map(|(x, y)| Copy {
            momentum,
            mask,
            x,
            y,
            z: z.next().unwrap_or_default(),
        }));
        let work = || {
            let take = || tasks.lock().unwrap_or_else(PoisonError::into_inner).next();
            while let Some(task) = take() {
                Arch::new().dispatch(task);
            }
        };
        rayon::in_place_scope(|scope| {
            for _ in 1..helpers {
                scope.spawn(|_| work());
            }
            work();
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
                for i in 0..BLOCK_ELEMS {
                    x[i] = mix(from_z[i], from_y[i]);
                }
            }
            for ((x, y), z) in x_end.iter_mut().zip(y_end).zip(z_end) {
                (*z, *x) = (*x, mix(*z, *y));
            }
        } else {
            for (x, y) in x.iter_mut().zip(y) {
                let (from_x, from_y) = (*x, *y);
                for i in 0..BLOCK_ELEMS {
                    x[i] = mix(from_x[i], from_y[i]);
                }
            }
            for (x, y) in x_end.iter_mut().zip(y_end) {
                *x = mix(*x, *y);
            }
        }
    }
}
