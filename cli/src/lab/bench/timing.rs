//! Clocks and what their readings say.

use std::time::Instant;

use anyhow::Context as _;
use serde::{Deserialize, Serialize};
use statrs::distribution::{Binomial, DiscreteCDF as _};
use statrs::statistics::{Data, OrderStatistics as _};
use wgpu_optim::{readback, wgpu};

use crate::Failure;
use crate::backend::OpenGpu;

/// One run of a path.
#[derive(Clone, Copy, Debug)]
pub struct Sample {
    /// From nothing recorded to everything done.
    pub wall_ms: f64,
    /// The device's own times of a GPU path.
    pub gpu: Option<GpuSample>,
}

#[derive(Clone, Copy, Debug)]
pub struct GpuSample {
    /// Making, recording and finishing the encoder.
    pub record_us: f64,
    pub submit_us: f64,
    /// Between the timestamps at the two ends of the pass, where the device has them.
    pub pass_ms: Option<f64>,
}

/// The wall clock around something that waits for itself.
pub fn time(run: impl FnOnce() -> Result<(), Failure>) -> Result<Sample, Failure> {
    let started = Instant::now();
    run()?;
    let wall_ms = started.elapsed().as_secs_f64() * 1e3;
    Ok(Sample { wall_ms, gpu: None })
}

/// Something that is recorded into a compute pass.
pub trait GpuWork {
    /// Records the commands that come before the pass.
    fn prepare(&mut self, _encoder: &mut wgpu::CommandEncoder) -> Result<(), Failure> {
        Ok(())
    }

    fn record(&mut self, pass: &mut wgpu::ComputePass<'_>) -> Result<(), Failure>;
}

/// The wall clock, and the device's own where it has one: one for all that is timed on a device, because drivers have
/// room for few query sets, Metal for 32 in all.
pub struct GpuClock {
    timestamps: Option<Timestamps>,
}

struct Timestamps {
    queries: wgpu::QuerySet,
    resolved: wgpu::Buffer,
    ns_per_tick: f64,
}

impl GpuClock {
    pub fn new(open: &OpenGpu) -> Self {
        let (device, queue) = (&open.gpu.device, &open.gpu.queue);
        let has_timestamps = device.features().contains(wgpu::Features::TIMESTAMP_QUERY);
        let timestamps = has_timestamps.then(|| Timestamps {
            queries: device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("wgpu_optim.timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count: 2,
            }),
            resolved: device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("wgpu_optim.timestamps"),
                size: 16,
                usage: wgpu::BufferUsages::QUERY_RESOLVE | wgpu::BufferUsages::COPY_SRC,
                mapped_at_creation: false,
            }),
            ns_per_tick: f64::from(queue.get_timestamp_period()),
        });
        Self { timestamps }
    }

    /// Records, submits and waits.
    pub fn time(&self, open: &OpenGpu, work: &mut impl GpuWork) -> Result<Sample, Failure> {
        let (device, queue) = (&open.gpu.device, &open.gpu.queue);
        let started = Instant::now();
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        work.prepare(&mut encoder)?;
        let timestamp_writes =
            self.timestamps
                .as_ref()
                .map(|timestamps| wgpu::ComputePassTimestampWrites {
                    query_set: &timestamps.queries,
                    beginning_of_pass_write_index: Some(0),
                    end_of_pass_write_index: Some(1),
                });
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("wgpu_optim.bench"),
            timestamp_writes,
        });
        work.record(&mut pass)?;
        drop(pass);
        let commands = encoder.finish();
        let recorded = started.elapsed();
        queue.submit([commands]);
        let submitted = started.elapsed();
        open.finish()?;
        let wall_ms = started.elapsed().as_secs_f64() * 1e3;
        let timestamps = self.timestamps.as_ref();
        Ok(Sample {
            wall_ms,
            gpu: Some(GpuSample {
                record_us: recorded.as_secs_f64() * 1e6,
                submit_us: (submitted - recorded).as_secs_f64() * 1e6,
                pass_ms: timestamps.map(|t| t.pass_ms(open)).transpose()?,
            }),
        })
    }
}

impl Timestamps {
    fn pass_ms(&self, open: &OpenGpu) -> Result<f64, Failure> {
        let (device, queue) = (&open.gpu.device, &open.gpu.queue);
        let mut encoder = device.create_command_encoder(&wgpu::CommandEncoderDescriptor::default());
        encoder.resolve_query_set(&self.queries, 0..2, &self.resolved, 0);
        queue.submit([encoder.finish()]);
        // The two 64-bit counts, as the four words that they are.
        let words = readback::download_blocking(device, queue, &self.resolved, 0, 4)
            .context("cannot read the timestamps")
            .map_err(Failure::Failed)?;
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(&words);
        let [begin, end] = ticks[..] else {
            return Ok(0.0);
        };
        Ok(end.saturating_sub(begin) as f64 * self.ns_per_tick / 1e6)
    }
}

/// A median, and an interval that holds the true one with 95% confidence, whatever the distribution: between two
/// order statistics, whose ranks are binomial. Of fewer than six values it is their whole range.
#[derive(Clone, Copy, Debug, PartialEq, Serialize, Deserialize)]
pub struct Median {
    pub median: f64,
    pub low: f64,
    pub high: f64,
}

impl Median {
    pub fn of(values: impl IntoIterator<Item = f64>) -> Option<Self> {
        let values: Vec<f64> = values.into_iter().collect();
        let count = values.len();
        let mut values = Data::new(values);
        let ranks = Binomial::new(0.5, count as u64).ok()?;
        let rank = (ranks.inverse_cdf(0.025) as usize).max(1);
        (count > 0).then(|| Self {
            median: values.median(),
            low: values.order_statistic(rank),
            high: values.order_statistic(count + 1 - rank),
        })
    }

    /// Half the interval over the median.
    pub fn uncertainty(&self) -> f64 {
        (self.high - self.low) / (2.0 * self.median)
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_interval_is_that_of_the_sign_test() {
        // Ranks for 95%, from any table of the binomial distribution.
        for (count, low, high) in [
            (1, 1, 1),
            (5, 1, 5),
            (6, 1, 6),
            (9, 2, 8),
            (20, 6, 15),
            (100, 40, 61),
        ] {
            let values = (1..=count).rev().map(f64::from);
            let median = Median::of(values).unwrap();
            assert_eq!(median.median, f64::from(count + 1) / 2.0);
            assert_eq!((median.low, median.high), (f64::from(low), f64::from(high)));
        }
        assert_eq!(Median::of([]), None);
    }
}
