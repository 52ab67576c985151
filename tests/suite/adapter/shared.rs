//! The adapter and the devices that all tests share.

use wgpu_optim::{Gpu, OPTIONAL_FEATURES, wgpu};

use super::{Bench, open_gpu};

#[cfg(not(target_arch = "wasm32"))]
mod opened {
    use std::sync::LazyLock;

    use super::{Bench, Gpu, OPTIONAL_FEATURES, open_gpu, wgpu};

    static GPU: LazyLock<Gpu> = LazyLock::new(|| pollster::block_on(open_gpu()));
    static BEST: LazyLock<Bench> =
        LazyLock::new(|| pollster::block_on(Bench::with(OPTIONAL_FEATURES)));
    static UNIFORMS: LazyLock<Bench> =
        LazyLock::new(|| pollster::block_on(Bench::with(wgpu::Features::empty())));

    pub async fn gpu() -> &'static Gpu {
        &GPU
    }

    pub async fn benches() -> [&'static Bench; 2] {
        [&*BEST, &*UNIFORMS]
    }
}

/// A browser has one thread for the tests, on which they wait for what they open, one after the other. Its devices have
/// no immediates, so one is all.
#[cfg(target_arch = "wasm32")]
mod opened {
    use std::cell::Cell;

    use super::{Bench, Gpu, OPTIONAL_FEATURES, open_gpu};

    thread_local! {
        static GPU: Cell<Option<&'static Gpu>> = const { Cell::new(None) };
        static BEST: Cell<Option<&'static Bench>> = const { Cell::new(None) };
    }

    pub async fn gpu() -> &'static Gpu {
        if GPU.get().is_none() {
            GPU.set(Some(Box::leak(Box::new(open_gpu().await))));
        }
        GPU.get().unwrap()
    }

    pub async fn benches() -> [&'static Bench; 1] {
        if BEST.get().is_none() {
            let bench = Bench::with(OPTIONAL_FEATURES).await;
            BEST.set(Some(Box::leak(Box::new(bench))));
        }
        [BEST.get().unwrap()]
    }
}

pub use opened::{benches, gpu};
