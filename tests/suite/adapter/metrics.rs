//! Values of steps on their way to the host.

use std::collections::VecDeque;

use wgpu_optim::gpu::{Metrics, StepMetrics};
use wgpu_optim::{TransferError, wgpu};

use super::{Bench, gpu_test};

/// Two values of each step, written in its encoder from a table.
struct Source<'b> {
    bench: &'b Bench,
    table: wgpu::Buffer,
    values: wgpu::Buffer,
}

const STEPS: u64 = 256;

impl<'b> Source<'b> {
    fn new(bench: &'b Bench) -> Self {
        let table: Vec<f32> = (0..2 * STEPS).map(|x| 0.5 * x as f32).collect();
        Self {
            bench,
            table: bench.buffer_of(&table),
            values: bench.buffer(4),
        }
    }

    /// The values of a step lie in bytes 4 to 12, until the next step writes its own.
    fn record(&self, encoder: &mut wgpu::CommandEncoder, metrics: &mut Metrics, step: u64) {
        encoder.copy_buffer_to_buffer(&self.table, 8 * step, &self.values, 4, 8);
        let values = [(&self.values, 8), (&self.values, 4)];
        metrics.record(encoder, step, &values).unwrap();
    }

    async fn wait(&self) {
        self.bench.download(&self.values).await;
    }
}

fn expected(step: u64) -> StepMetrics {
    let first = step as f32;
    StepMetrics {
        step,
        values: vec![first + 0.5, first],
    }
}

#[gpu_test]
async fn values_of_submitted_steps_arrive_whatever_is_dropped() {
    let bench = Bench::best().await;
    let source = Source::new(bench);
    for seed in 0..24 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let mut metrics = Metrics::new(&bench.device, &bench.queue, 2).unwrap();
        let (mut due, mut read, mut step) = (Vec::new(), Vec::new(), 0);
        let mut in_flight: VecDeque<(wgpu::CommandBuffer, Vec<u64>)> = VecDeque::new();
        while step < 100 {
            let mut encoder = bench.encoder();
            let first = step;
            // More than share a staging buffer, at times.
            for _ in 0..rng.u32(1..12) {
                source.record(&mut encoder, &mut metrics, step);
                step += 1;
            }
            match rng.u32(0..4) {
                0 => drop(encoder),
                _ => in_flight.push_back((encoder.finish(), (first..step).collect())),
            }
            if rng.bool() {
                for (commands, steps) in in_flight.drain(..) {
                    if rng.u32(0..4) > 0 {
                        bench.queue.submit([commands]);
                        due.extend(steps);
                    }
                }
            }
            if rng.u32(0..3) == 0 {
                read.extend(metrics.read());
            }
        }
        in_flight.clear();
        source.wait().await;
        read.extend(metrics.read());
        let due: Vec<_> = due.into_iter().map(expected).collect();
        assert_eq!(read, due, "seed {seed}");
        assert_eq!(metrics.read(), []);
    }
}

/// A submission that is refused has made no copies, and the staging buffer goes on.
#[gpu_test]
async fn refused_submissions_have_no_values_and_later_ones_do() {
    let bench = Bench::best().await;
    let source = Source::new(bench);
    let mut metrics = Metrics::new(&bench.device, &bench.queue, 2).unwrap();
    for step in 0..20 {
        let mut encoder = bench.encoder();
        source.record(&mut encoder, &mut metrics, step);
        let is_refused = step % 3 == 1;
        if is_refused {
            let gone = bench.buffer(1);
            encoder.clear_buffer(&gone, 0, None);
            gone.destroy();
        }
        let scope = bench.device.push_error_scope(wgpu::ErrorFilter::Validation);
        bench.queue.submit([encoder.finish()]);
        assert_eq!(scope.pop().await.is_some(), is_refused);
        source.wait().await;
        let due: Vec<_> = (!is_refused).then(|| expected(step)).into_iter().collect();
        assert_eq!(metrics.read(), due);
    }
}

#[gpu_test]
async fn what_cannot_be_copied_is_refused_and_nothing_is_recorded() {
    let bench = Bench::best().await;
    let source = Source::new(bench);
    let mut metrics = Metrics::new(&bench.device, &bench.queue, 2).unwrap();
    let write_only = bench.device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 4,
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    let mut encoder = bench.encoder();
    let good = (&source.values, 0);
    let mut refused =
        |values: &[(&wgpu::Buffer, u64)]| metrics.record(&mut encoder, 0, values).unwrap_err();
    assert!(matches!(
        refused(&[good]),
        TransferError::Length {
            expected: 8,
            actual: 4
        }
    ));
    for offset in [2, 16, u64::MAX - 3] {
        let refused = refused(&[good, (&source.values, offset)]);
        assert!(
            matches!(refused, TransferError::OutOfBounds { .. }),
            "{refused}"
        );
    }
    let missing = refused(&[good, (&write_only, 0)]);
    assert!(
        matches!(missing, TransferError::MissingUsage { .. }),
        "{missing}"
    );
    source.record(&mut encoder, &mut metrics, 3);
    bench.queue.submit([encoder.finish()]);
    source.wait().await;
    assert_eq!(metrics.read(), [expected(3)]);
}
