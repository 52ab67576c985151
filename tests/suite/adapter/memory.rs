//! A device that runs out of memory. A software adapter takes its memory from the process, which can be limited.

use std::{env, fs};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use wgpu_optim::gpu::ArenaError;
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::{
    Arena, BuildError, GpuOptimizer, Optimizer, SgdConfig, StepError, TransferError, readback, wgpu,
};

use super::{Bench, gpu, gpu_test, in_own_process, whole};
use crate::cases::values;

const MIB: u64 = 1 << 20;

/// Elements of a tensor that fills most of a binding of 128 MiB.
const LARGE: usize = 30 << 20;

/// Names this module's process among the test's.
const CHILD: &str = "WGPU_OPTIM_TEST_OUT_OF_MEMORY";

fn address_space_bytes() -> u64 {
    let pages = fs::read_to_string("/proc/self/statm").unwrap();
    let pages: u64 = pages.split(' ').next().unwrap().parse().unwrap();
    pages * rustix::param::page_size() as u64
}

fn allocated_bytes(device: &wgpu::Device) -> u64 {
    device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
    let report = device.generate_allocator_report().unwrap();
    report.total_allocated_bytes
}

/// Builds something while the process gets no more than `room_bytes` beyond what it has.
fn with_room<T>(room_bytes: u64, build: impl FnOnce() -> T) -> T {
    let before = getrlimit(Resource::As);
    let limit = Rlimit {
        current: Some(address_space_bytes() + room_bytes),
        maximum: before.maximum,
    };
    setrlimit(Resource::As, limit).unwrap();
    let built = build();
    setrlimit(Resource::As, before).unwrap();
    built
}

#[gpu_test]
async fn out_of_memory_is_an_error_and_the_device_goes_on() {
    let info = gpu().await.adapter.get_info();
    if info.device_type != wgpu::DeviceType::Cpu || info.backend != wgpu::Backend::Vulkan {
        // A GPU has memory of its own, and wgpu does not ask OpenGL whether a buffer was allocated.
        println!(
            "not run on {} ({:?}): nothing to run out of",
            info.name, info.backend
        );
        return;
    }
    if env::var_os(CHILD).is_some() {
        while_building().await;
        while_recording().await;
        return;
    }
    // The limit would hold for the tests beside this one too.
    let name = "adapter::memory::out_of_memory_is_an_error_and_the_device_goes_on";
    in_own_process(name, &[(CHILD, "1")]);
}

/// Arena and velocity take two bindings per array, so that either can fail at its first buffer or half-way.
async fn while_building() {
    let limits = wgpu::Limits {
        max_buffer_size: 128 * MIB,
        ..gpu().await.adapter.limits()
    };
    let bench = Bench::open(wgpu::Features::empty(), limits).await;
    let tensors = || {
        [
            ("small", vec![1003]),
            ("a", vec![30 << 20]),
            ("b", vec![30 << 20]),
        ]
    };
    let new_arena = || Arena::new(&bench.device, &bench.queue, tensors());
    let arena_bytes = {
        let arena = new_arena().unwrap();
        assert_eq!(arena.params().len(), 2);
        let buffers = arena.params().iter().chain(arena.grads());
        buffers.map(wgpu::Buffer::size).sum::<u64>()
    };
    let refused = ArenaError::OutOfMemory { bytes: arena_bytes };
    let before = allocated_bytes(&bench.device);
    for room_mib in [16, 200, 400] {
        let arena = with_room(room_mib * MIB, new_arena);
        assert_eq!(arena.unwrap_err(), refused, "{room_mib} MiB");
    }
    let after = allocated_bytes(&bench.device);
    assert_eq!(after, before, "nothing is left behind");

    let arena = new_arena().unwrap();
    let (start, gradient) = (values(1, 1003), values(2, 1003));
    arena.upload_params("small", &start).unwrap();
    arena.upload_grads("small", &gradient).unwrap();
    let large = vec![1.0; LARGE];
    let upload = || arena.upload_all_params(&[&[0.5; 1003], &large[..], &large]);
    let download = || {
        let values = readback::block_on(&bench.device, arena.download_all_params());
        values.map(|values| panic!("{} tensors", values.len()))
    };
    for refused in [
        with_room(16 * MIB, upload),
        with_room(200 * MIB, upload),
        with_room(16 * MIB, download),
    ] {
        let Err(ArenaError::Transfer(TransferError::Device { message })) = refused else {
            panic!("{refused:?}");
        };
        assert!(message.contains("emory"), "{message}");
    }

    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let build = || GpuOptimizer::new(&bench.kernels, config, &arena.bindings());
    let refused = BuildError::OutOfMemory {
        bytes: arena_bytes / 2,
    };
    let before = allocated_bytes(&bench.device);
    for room_mib in [16, 200] {
        let optimizer = with_room(room_mib * MIB, build);
        assert_eq!(optimizer.unwrap_err(), refused, "{room_mib} MiB");
    }
    let after = allocated_bytes(&bench.device);
    assert_eq!(after, before, "nothing is left behind");

    let mut optimizer = build().unwrap();
    for large in ["a", "b"] {
        optimizer.set_frozen(large, true).unwrap();
    }
    let mut oracle = Oracle::new(&start, Roundoff::WGSL);
    for _ in 0..3 {
        bench.step(&mut optimizer);
        oracle.step(&config, &gradient);
    }
    let params = bench.wait(arena.download_params("small")).await.unwrap();
    oracle.check_params(&params).unwrap();
}

/// The staging of the scalars is what a step may have to allocate, on a device without immediates.
async fn while_recording() {
    let adapter = &gpu().await.adapter;
    let (device, queue) = adapter
        .request_device(&wgpu::DeviceDescriptor {
            // The allocator takes memory in small blocks, so that it has nothing left over for the staging.
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            ..Default::default()
        })
        .await
        .unwrap();
    let bench = Bench::new(device, queue);
    let (start, gradient) = (values(1, 1003), values(2, 1003));
    let buffers = [bench.buffer_of(&start), bench.buffer_of(&gradient)];
    let others = [bench.buffer(700_000), bench.buffer(700_000)];
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    // There is room for the scalars of all tensors in dispatches of eight elements, which is 70 MB.
    let kernels = bench.kernels.clone().with_max_dispatch_elems(8);
    let tensors = [
        whole("small", &buffers[0], &buffers[1]),
        whole("large", &others[0], &others[1]),
    ];
    let mut optimizer = GpuOptimizer::new(&kernels, config, &tensors).unwrap();
    optimizer.set_frozen("large", true).unwrap();
    let mut oracle = Oracle::new(&start, Roundoff::WGSL);
    for enough in [false, true, false, true] {
        let mut encoder = bench.encoder();
        if enough {
            optimizer.step(&mut encoder).unwrap();
            oracle.step(&config, &gradient);
        } else {
            let refused = with_room(16 * MIB, || optimizer.step(&mut encoder));
            let Err(StepError::Scalars { message }) = refused else {
                panic!("{refused:?}");
            };
            assert!(message.contains("emory"), "{message}");
        }
        bench.queue.submit([encoder.finish()]);
    }
    assert_eq!(optimizer.steps(), 2);
    oracle
        .check_params(&bench.download(&buffers[0]).await)
        .unwrap();
}
