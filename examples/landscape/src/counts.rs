//! Live figures of both sides and of the device's time: computed on the GPU, read without waiting.
//!
//! An engine may drop an encoder instead of submitting it. So what they are figures of comes from the device, too: it counts
//! its steps itself.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bytemuck::{Pod, Zeroable};
use serde::Serialize;
use wgpu_optim::wgpu::{self, BufferUsages};

/// Over how many balls, the first ones, the mean speed is taken.
pub const SPEED_SAMPLE: u32 = 65_536;

/// Workgroups that add up partial counts.
pub const COUNT_GROUPS: u32 = 64;

/// The sums of `shaders/count.wgsl`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Count {
    height: f32,
    way: f32,
    deepest: u32,
    escaped: u32,
}

/// The figures of one side; `Result` in `shaders/count.wgsl`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
struct Counted {
    count: Count,
    /// Since the start, and since the count before.
    steps: u32,
    steps_since: u32,
}

/// A side in figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// The mean height of the balls that have not escaped.
    pub mean_height: f64,
    /// The distance per step of the first [`SPEED_SAMPLE`] balls, their mean.
    pub mean_speed: f64,
    /// The share of all balls that are in the deepest valley.
    pub deepest_share: f64,
    /// The share of all balls that are further than four half widths of the domain away.
    pub escaped_share: f64,
}

impl Counted {
    fn figures(self, balls: u32) -> Figures {
        let Self {
            count, steps_since, ..
        } = self;
        let all = f64::from(balls);
        let near = f64::from(balls - count.escaped.min(balls)).max(1.0);
        let sample = f64::from(balls.min(SPEED_SAMPLE));
        Figures {
            mean_height: f64::from(count.height) / near,
            mean_speed: f64::from(count.way) / (sample * f64::from(steps_since.max(1))),
            deepest_share: f64::from(count.deepest) / all,
            escaped_share: f64::from(count.escaped) / all,
        }
    }
}

/// The time that a frame's parts took on the device, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Times {
    /// The pass that writes the gradients.
    pub slopes: f64,
    /// The optimizers of both sides.
    pub step: f64,
    /// The pass that adds up the figures.
    pub counts: f64,
    /// Terrain and balls.
    pub drawing: f64,
}

impl Times {
    /// The optimizer's share of the device's time in a frame.
    pub fn step_share(self) -> f64 {
        self.step / (self.slopes + self.step + self.counts + self.drawing)
    }
}

/// The figures of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Frame {
    /// Steps since the start.
    pub steps: u64,
    /// Left and right.
    pub sides: [Figures; 2],
    /// The times of the passes; [`None`] where the device has no timestamps of single passes.
    pub times: Option<Times>,
}

/// The passes of a frame that are timed, two timestamps each.
#[derive(Clone, Copy)]
pub enum Pass {
    /// The pass that writes the gradients.
    Slopes,
    /// The optimizers of both sides.
    Step,
    /// The pass that adds up the figures.
    Counts,
    /// Terrain and balls.
    Drawing,
}

const TIMESTAMPS: u32 = 8;
const TIMES_OFFSET: u64 = 2 * size_of::<Counted>() as u64;
const RECORD_BYTES: u64 = TIMES_OFFSET + 8 * TIMESTAMPS as u64;

/// Frames on their way: what `record` copies is mapped when it has been submitted and is done, and read when it is there.
pub struct Telemetry {
    /// The figures of both sides, then timestamps.
    pub(crate) record: wgpu::Buffer,
    queries: Option<wgpu::QuerySet>,
    resolved: Option<wgpu::Buffer>,
    nanoseconds_per_tick: f64,
    slots: Vec<Slot>,
    newest: Option<Frame>,
    /// The number of runs started so far; figures of an earlier run that are still on their way are not shown.
    run: u64,
}

/// A buffer that a frame's figures go to.
struct Slot {
    buffer: wgpu::Buffer,
    arrival: Arc<AtomicU8>,
    run: u64,
    balls: u32,
}

const FREE: u8 = 0;
const ON_ITS_WAY: u8 = 1;
const MAPPED: u8 = 2;

/// Lies in a frame's encoder, which calls it when the copy is mapped, or drops it with itself.
struct Arrival(Arc<AtomicU8>);

impl Arrival {
    fn set(self, is_mapped: bool) {
        if is_mapped {
            self.0.store(MAPPED, Ordering::Release);
        }
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        let (from, to) = (ON_ITS_WAY, FREE);
        let _ = self
            .0
            .compare_exchange(from, to, Ordering::AcqRel, Ordering::Relaxed);
    }
}

fn buffer(device: &wgpu::Device, label: &str, size: u64, usage: BufferUsages) -> wgpu::Buffer {
    device.create_buffer(&wgpu::BufferDescriptor {
        label: Some(label),
        size,
        usage,
        mapped_at_creation: false,
    })
}

impl Telemetry {
    /// Makes the telemetry of both sides of a landscape.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Self {
        // A software adapter writes the timestamps of several passes when it flushes them, all at once.
        let has_timestamps = device.features().contains(wgpu::Features::TIMESTAMP_QUERY)
            && device.adapter_info().device_type != wgpu::DeviceType::Cpu;
        let queries = has_timestamps.then(|| {
            device.create_query_set(&wgpu::QuerySetDescriptor {
                label: Some("landscape.timestamps"),
                ty: wgpu::QueryType::Timestamp,
                count: TIMESTAMPS,
            })
        });
        let resolved = has_timestamps.then(|| {
            let usage = BufferUsages::QUERY_RESOLVE | BufferUsages::COPY_SRC;
            let size = 8 * u64::from(TIMESTAMPS);
            buffer(device, "landscape.timestamps", size, usage)
        });
        let usage = BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST;
        Self {
            record: buffer(device, "landscape.record", RECORD_BYTES, usage),
            queries,
            resolved,
            nanoseconds_per_tick: f64::from(queue.get_timestamp_period()),
            slots: Vec::new(),
            newest: None,
            run: 0,
        }
    }

    /// The timestamps that a compute pass writes.
    pub fn compute(&self, pass: Pass) -> Option<wgpu::ComputePassTimestampWrites<'_>> {
        let first = 2 * pass as u32;
        self.queries
            .as_ref()
            .map(|query_set| wgpu::ComputePassTimestampWrites {
                query_set,
                beginning_of_pass_write_index: Some(first),
                end_of_pass_write_index: Some(first + 1),
            })
    }

    /// The timestamps that the render pass writes.
    pub fn drawing(&self) -> Option<wgpu::RenderPassTimestampWrites<'_>> {
        let first = 2 * Pass::Drawing as u32;
        self.queries
            .as_ref()
            .map(|query_set| wgpu::RenderPassTimestampWrites {
                query_set,
                beginning_of_pass_write_index: Some(first),
                end_of_pass_write_index: Some(first + 1),
            })
    }

    /// Records the copy of this frame's figures.
    pub fn keep(&mut self, device: &wgpu::Device, encoder: &mut wgpu::CommandEncoder, balls: u32) {
        if let (Some(queries), Some(resolved)) = (&self.queries, &self.resolved) {
            encoder.resolve_query_set(queries, 0..TIMESTAMPS, resolved, 0);
            encoder.copy_buffer_to_buffer(resolved, 0, &self.record, TIMES_OFFSET, resolved.size());
        }
        self.collect();
        let is_free = |slot: &Slot| slot.arrival.load(Ordering::Acquire) == FREE;
        // As many as an engine has frames on their way.
        let index = self.slots.iter().position(is_free).unwrap_or_else(|| {
            let usage = BufferUsages::COPY_DST | BufferUsages::MAP_READ;
            self.slots.push(Slot {
                buffer: buffer(device, "landscape.telemetry", RECORD_BYTES, usage),
                arrival: Arc::default(),
                run: 0,
                balls: 0,
            });
            self.slots.len() - 1
        });
        let slot = &mut self.slots[index];
        (slot.run, slot.balls) = (self.run, balls);
        encoder.copy_buffer_to_buffer(&self.record, 0, &slot.buffer, 0, RECORD_BYTES);
        // What comes of an earlier frame is not this one's.
        slot.arrival = Arc::new(AtomicU8::new(ON_ITS_WAY));
        let arrival = Arrival(Arc::clone(&slot.arrival));
        encoder.map_buffer_on_submit(&slot.buffer, wgpu::MapMode::Read, .., move |mapped| {
            arrival.set(mapped.is_ok());
        });
    }

    /// The newest frame that is there. Waits for nothing.
    pub fn newest(&mut self) -> Option<Frame> {
        self.collect();
        self.newest
    }

    fn collect(&mut self) {
        for slot in &self.slots {
            if slot.arrival.load(Ordering::Acquire) == MAPPED {
                let frame = slot.frame(self.nanoseconds_per_tick, self.queries.is_some());
                slot.buffer.unmap();
                slot.arrival.store(FREE, Ordering::Release);
                if slot.run == self.run {
                    let both = self.newest.into_iter().chain(frame);
                    self.newest = both.max_by_key(|frame| frame.steps);
                }
            }
        }
    }

    /// Forgets what was read, and what is on its way.
    pub fn start_run(&mut self) {
        self.newest = None;
        self.run += 1;
    }
}

impl Slot {
    fn frame(&self, nanoseconds_per_tick: f64, has_times: bool) -> Option<Frame> {
        let view = self.buffer.get_mapped_range(..).ok()?;
        let (counts, times) = view.split_at(TIMES_OFFSET as usize);
        // Mapped memory may lie anywhere.
        let counts: Vec<Counted> = bytemuck::pod_collect_to_vec(counts);
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(times);
        let milliseconds = |pass: Pass| {
            let first = 2 * pass as usize;
            ticks[first + 1].saturating_sub(ticks[first]) as f64 * nanoseconds_per_tick / 1e6
        };
        // Both sides make the same steps.
        let Counted {
            steps, steps_since, ..
        } = counts[0];
        let per_step = f64::from(steps_since.max(1));
        Some(Frame {
            steps: steps.into(),
            sides: [0, 1].map(|side: usize| counts[side].figures(self.balls)),
            times: has_times.then(|| Times {
                slopes: per_step * milliseconds(Pass::Slopes),
                step: per_step * milliseconds(Pass::Step),
                counts: milliseconds(Pass::Counts),
                drawing: milliseconds(Pass::Drawing),
            }),
        })
    }
}

#[cfg(all(test, not(target_arch = "wasm32")))]
mod tests {
    #![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

    use wgpu_optim::{AdapterRequest, Gpu};

    use super::*;

    #[test]
    fn a_window_may_stay_hidden_for_as_long_as_it_likes() {
        let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default()).unwrap();
        let mut telemetry = Telemetry::new(&device, &queue);
        for frame in 0..10 {
            let mut encoder = device.create_command_encoder(&Default::default());
            telemetry.keep(&device, &mut encoder, 1);
            match frame {
                9 => drop(queue.submit([encoder.finish()])),
                _ if frame % 2 == 0 => drop(encoder.finish()),
                _ => drop(encoder),
            }
            assert_eq!((telemetry.newest(), telemetry.slots.len()), (None, 1));
        }
        device.poll(wgpu::PollType::wait_indefinitely()).unwrap();
        assert_eq!(telemetry.newest().unwrap().steps, 0);
    }
}
