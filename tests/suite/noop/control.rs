//! What recording a controlled step does beside recording, and what of it wgpu refuses.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use allocation_counter::measure;
use wgpu_optim::wgsl::{KernelError, ScalarPath};
use wgpu_optim::{
    AdamConfig, BuildError, GpuControl, GpuOptimizer, Kernels, LossScale, Optimizer, StepControl,
    StepError, wgpu,
};

use super::{Apart, device, kernels};

fn on_immediates() -> Kernels {
    let limits = wgpu::Limits {
        max_immediate_size: 128,
        ..Default::default()
    };
    let (device, queue) = device(limits, wgpu::Features::IMMEDIATES);
    Kernels::new(&device, &queue).unwrap()
}

fn control(kernels: &Kernels) -> GpuControl {
    let control = StepControl::builder()
        .max_norm(1.0)
        .loss_scale(LossScale::default());
    GpuControl::new(kernels, control.build().unwrap()).unwrap()
}

/// An optimizer of many tensors, each in buffers of its own.
fn optimizer(kernels: &Kernels, tensors: usize, numel: u64) -> GpuOptimizer<AdamConfig> {
    let apart = Apart::new(kernels, tensors, numel);
    let config = AdamConfig::adamw(0.1).build().unwrap();
    GpuOptimizer::new(kernels, config, &apart.bindings()).unwrap()
}

/// A poll, and a submission too, calls back for what is done; a mapping needs either.
#[test]
fn recording_submits_maps_polls_and_waits_for_nothing() {
    for kernels in [on_immediates(), kernels()] {
        let (device, queue) = (kernels.device(), kernels.queue());
        let mut control = control(&kernels);
        let mut optimizer = optimizer(&kernels, 20, 9000);
        for _ in 0..3 {
            let submission = |index: wgpu::SubmissionIndex| format!("{index:?}");
            let mut encoder = device.create_command_encoder(&Default::default());
            queue.submit([]);
            let was_called = Arc::new(AtomicBool::new(false));
            let called = was_called.clone();
            queue.on_submitted_work_done(move || called.store(true, Ordering::Release));
            optimizer.step_with(&mut encoder, &mut control).unwrap();
            optimizer.step_with(&mut encoder, &mut control).unwrap();
            assert!(!was_called.load(Ordering::Acquire));
            let first = submission(queue.submit([encoder.finish()]));
            let second = submission(queue.submit([]));
            assert_ne!(first, second, "submissions are told apart");
            assert!(was_called.load(Ordering::Acquire));
        }
    }
}

/// On the heap: a few boxes for every step, as many as the steps before. `adapter::control` counts the device's objects.
#[test]
fn steps_allocate_as_much_as_those_before() {
    for kernels in [on_immediates(), kernels()] {
        let device = kernels.device();
        for (tensors, numel) in [(1, 9000), (300, 1024)] {
            let mut control = control(&kernels);
            let mut optimizer = optimizer(&kernels, tensors, numel);
            let mut heap = Vec::new();
            for _ in 0..12 {
                let mut encoder = device.create_command_encoder(&Default::default());
                let recorded = measure(|| {
                    optimizer.step_with(&mut encoder, &mut control).unwrap();
                });
                heap.push(recorded.count_total);
                kernels.queue().submit([encoder.finish()]);
                device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
                control.read();
            }
            // Three buffers take turns.
            let most = |steps: std::ops::Range<usize>| heap[steps].iter().max().copied();
            assert!(most(9..12) <= most(6..9), "{heap:?}");
        }
    }
}

/// A step of some optimizers that is not the one that was prepared, whatever else was.
#[test]
fn only_the_optimizers_that_were_prepared_are_recorded() {
    for kernels in [on_immediates(), kernels()] {
        let (device, queue) = (kernels.device(), kernels.queue());
        let mut control = control(&kernels);
        let mut other = self::control(&kernels);
        let [mut a, mut b, mut c] = [(); 3].map(|()| optimizer(&kernels, 2, 64));
        let mut encoder = device.create_command_encoder(&Default::default());
        macro_rules! refused {
            ($($optimizer:ident),*) => {
                let mut pass = encoder.begin_compute_pass(&Default::default());
                let refused = control.record(&mut pass, &mut [$( &mut $optimizer ),*]);
                assert_eq!(refused, Err(StepError::NotPrepared));
                drop(pass);
                control.report(&mut encoder);
                assert_eq!((control.steps(), control.unread()), (0, 0));
                assert_eq!([a.steps(), b.steps(), c.steps()], [0, 0, 0]);
            };
        }
        // Nothing was.
        refused!();
        refused!(a, b);
        control
            .prepare(&mut encoder, &mut [&mut b, &mut c])
            .unwrap();
        control
            .prepare(&mut encoder, &mut [&mut a, &mut b])
            .unwrap();
        // Fewer, more, others, and one that was prepared for the step before.
        refused!();
        refused!(a);
        refused!(b);
        refused!(a, c);
        refused!(b, c);
        refused!(a, b, c);

        // One of them goes on to another control, or is changed.
        other.prepare(&mut encoder, &mut [&mut a]).unwrap();
        refused!(a, b);
        control
            .prepare(&mut encoder, &mut [&mut a, &mut b])
            .unwrap();
        b.set_frozen("0", true).unwrap();
        refused!(a, b);
        b.set_frozen("0", false).unwrap();
        refused!(a, b);
        control
            .prepare(&mut encoder, &mut [&mut a, &mut b])
            .unwrap();
        control.set_control(control.control().clone());
        refused!(a, b);

        // It is refused itself, after the first of them was staged.
        let mut unread = optimizer(&kernels, 2, 64);
        let mut open = device.create_command_encoder(&Default::default());
        unread.step_with(&mut open, &mut other).unwrap();
        let prepared = control.prepare(&mut encoder, &mut [&mut a, &mut unread]);
        assert_eq!(prepared, Err(StepError::Unread));
        refused!(a, unread);
        refused!(a);
        drop(open);
        let unknown = StepControl::builder().group_max_norm("heads", 1.0);
        let known = control.control().clone();
        control.set_control(unknown.build().unwrap());
        let prepared = control.prepare(&mut encoder, &mut [&mut a, &mut b]);
        assert!(matches!(prepared, Err(StepError::UnknownGroup { .. })));
        refused!(a, b);
        control.set_control(known);

        // Its copies were dropped, as encoder or finished.
        let mut dropped = device.create_command_encoder(&Default::default());
        control
            .prepare(&mut dropped, &mut [&mut a, &mut b])
            .unwrap();
        drop(dropped);
        refused!(a, b);
        let mut dropped = device.create_command_encoder(&Default::default());
        control
            .prepare(&mut dropped, &mut [&mut a, &mut b])
            .unwrap();
        drop(dropped.finish());
        refused!(a, b);

        // In any order.
        control
            .prepare(&mut encoder, &mut [&mut a, &mut b])
            .unwrap();
        let mut pass = encoder.begin_compute_pass(&Default::default());
        control.record(&mut pass, &mut [&mut b, &mut a]).unwrap();
        drop(pass);
        control.report(&mut encoder);
        queue.submit([encoder.finish()]);
        assert_eq!((control.steps(), control.unread()), (1, 1));
        assert_eq!([a.steps(), b.steps(), c.steps()], [1, 1, 0]);
    }
}

/// Without immediates both kinds of steps take their scalars from one buffer: what was prepared last is what it holds.
#[test]
fn of_two_preparations_the_last_is_recorded() {
    let kernels = kernels();
    assert_eq!(kernels.scalar_path(), ScalarPath::Uniforms);
    let mut control = control(&kernels);
    let mut optimizer = optimizer(&kernels, 2, 64);
    let device = kernels.device();
    let mut encoder = device.create_command_encoder(&Default::default());
    optimizer.prepare(&mut encoder).unwrap();
    control
        .prepare(&mut encoder, &mut [&mut optimizer])
        .unwrap();
    let mut pass = encoder.begin_compute_pass(&Default::default());
    assert_eq!(optimizer.record(&mut pass), Err(StepError::NotPrepared));
    control.record(&mut pass, &mut [&mut optimizer]).unwrap();
    drop(pass);
    drop(encoder);

    let mut encoder = device.create_command_encoder(&Default::default());
    control
        .prepare(&mut encoder, &mut [&mut optimizer])
        .unwrap();
    optimizer.prepare(&mut encoder).unwrap();
    let mut pass = encoder.begin_compute_pass(&Default::default());
    let refused = control.record(&mut pass, &mut [&mut optimizer]);
    assert_eq!(refused, Err(StepError::NotPrepared));
    optimizer.record(&mut pass).unwrap();
    drop(pass);
    assert_eq!((optimizer.steps(), control.steps()), (1, 0));
}

#[test]
fn what_does_not_go_together_is_refused_before_anything_is_recorded() {
    let (here, elsewhere) = (kernels(), kernels());
    let mut control = control(&here);
    let mut foreign = optimizer(&elsewhere, 1, 64);
    let mut encoder = here.device().create_command_encoder(&Default::default());
    let refused = foreign.step_with(&mut encoder, &mut control);
    assert_eq!(refused, Err(StepError::OtherKernels));
    assert_eq!((foreign.steps(), control.steps()), (0, 0));

    let mut optimizer = optimizer(&here, 1, 64);
    control
        .prepare(&mut encoder, &mut [&mut optimizer])
        .unwrap();
    optimizer.set_lr(0.2).unwrap();
    let mut pass = encoder.begin_compute_pass(&Default::default());
    let refused = control.record(&mut pass, &mut [&mut optimizer]);
    assert_eq!(refused, Err(StepError::NotPrepared));
    drop(pass);
    control
        .prepare(&mut encoder, &mut [&mut optimizer])
        .unwrap();
    let mut pass = encoder.begin_compute_pass(&Default::default());
    control.record(&mut pass, &mut [&mut optimizer]).unwrap();
    let again = control.record(&mut pass, &mut [&mut optimizer]);
    assert_eq!(again, Err(StepError::NotPrepared));
    drop(pass);
    assert_eq!((optimizer.steps(), control.steps()), (1, 1));

    let limits = wgpu::Limits {
        max_storage_buffers_per_shader_stage: 4,
        ..Default::default()
    };
    let (device, queue) = device(limits, wgpu::Features::empty());
    let kernels = Kernels::new(&device, &queue).unwrap();
    let refused = GpuControl::new(&kernels, StepControl::default()).unwrap_err();
    assert!(
        matches!(
            refused,
            BuildError::Kernel(KernelError::LimitTooLow {
                required: 5,
                actual: 4,
                ..
            })
        ),
        "{refused}"
    );
}

/// Norms of tensors bind one buffer more than a control of all: the step is refused, and another control's goes on.
#[test]
fn tensors_are_clipped_one_by_one_where_six_buffers_can_be_bound() {
    for actual in [5, 6] {
        let limits = wgpu::Limits {
            max_storage_buffers_per_shader_stage: actual,
            ..Default::default()
        };
        let (device, queue) = device(limits, wgpu::Features::empty());
        let kernels = Kernels::new(&device, &queue).unwrap();
        let mut optimizer = optimizer(&kernels, 2, 64);
        let by_tensor = StepControl::builder().tensor_max_norm(1.0).build().unwrap();
        let mut clips = GpuControl::new(&kernels, by_tensor.clone()).unwrap();
        let mut encoder = device.create_command_encoder(&Default::default());
        let refused = optimizer.step_with(&mut encoder, &mut clips);
        if actual == 5 {
            let limit = KernelError::LimitTooLow {
                limit: "max_storage_buffers_per_shader_stage",
                required: 6,
                actual: 5,
            };
            assert_eq!(refused, Err(BuildError::Kernel(limit).into()));
        } else {
            refused.unwrap();
        }
        let stepped = u64::from(actual == 6);
        assert_eq!((optimizer.steps(), clips.steps()), (stepped, stepped));
        queue.submit([encoder.finish()]);

        clips.set_control(StepControl::builder().max_norm(1.0).build().unwrap());
        let mut encoder = device.create_command_encoder(&Default::default());
        optimizer.step_with(&mut encoder, &mut clips).unwrap();
        queue.submit([encoder.finish()]);
        assert_eq!(optimizer.steps(), stepped + 1);
    }
}
