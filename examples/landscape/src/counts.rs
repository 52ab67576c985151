//! Live figures of both sides and of the device's time: computed on the GPU, read without waiting.

use std::sync::Arc;
use std::sync::atomic::{AtomicU8, Ordering};

use bytemuck::{Pod, Zeroable};
use serde::Serialize;
use wgpu_optim::wgpu::{self, BufferUsages};

/// Over how many balls, the first ones, the mean speed is taken.
pub const SPEED_SAMPLE: u32 = 65_536;

/// Workgroups that add up partial counts.
pub const COUNT_GROUPS: u32 = 64;

/// What `shaders/count.wgsl` adds up.
#[derive(Clone, Copy, Debug, Default, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct Count {
    height: f32,
    way: f32,
    deepest: u32,
    escaped: u32,
}

/// A side in figures.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Figures {
    /// Of the balls that have not escaped.
    pub mean_height: f64,
    /// Distance per step, of the first [`SPEED_SAMPLE`] balls.
    pub mean_speed: f64,
    /// Of all balls, those in the deepest valley.
    pub deepest_share: f64,
    /// Of all balls, those that are further than four half widths of the domain away.
    pub escaped_share: f64,
}

impl Count {
    fn figures(self, balls: u32, steps: u32) -> Figures {
        let all = f64::from(balls);
        let near = f64::from(balls - self.escaped.min(balls)).max(1.0);
        let sample = f64::from(balls.min(SPEED_SAMPLE));
        Figures {
            mean_height: f64::from(self.height) / near,
            mean_speed: f64::from(self.way) / (sample * f64::from(steps.max(1))),
            deepest_share: f64::from(self.deepest) / all,
            escaped_share: f64::from(self.escaped) / all,
        }
    }
}

/// How long a frame's parts took on the device, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Times {
    /// What writes the gradients.
    pub slopes: f64,
    /// The optimizers of both sides.
    pub step: f64,
    /// What adds up the figures.
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

/// What is known of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Serialize)]
pub struct Frame {
    /// Steps since the start.
    pub steps: u64,
    /// Left and right.
    pub sides: [Figures; 2],
    /// None where the device has no timestamps that tell.
    pub times: Option<Times>,
}

/// The passes of a frame that are timed, two timestamps each.
#[derive(Clone, Copy)]
pub enum Pass {
    /// What writes the gradients.
    Slopes,
    /// The optimizers of both sides.
    Step,
    /// What adds up the figures.
    Counts,
    /// Terrain and balls.
    Drawing,
}

const TIMESTAMPS: u32 = 8;
const TIMES_OFFSET: u64 = 2 * size_of::<Count>() as u64;
const RECORD_BYTES: u64 = TIMES_OFFSET + 8 * TIMESTAMPS as u64;

/// Frames on their way: what `record` copies is mapped once it has been submitted, and read when it is there.
pub struct Telemetry {
    /// Counts of both sides, then timestamps.
    pub(crate) record: wgpu::Buffer,
    queries: Option<wgpu::QuerySet>,
    resolved: Option<wgpu::Buffer>,
    nanoseconds_per_tick: f64,
    slots: Vec<Slot>,
    newest: Option<Frame>,
    /// Of how many that were started; what is on its way of an earlier one is not shown.
    run: u64,
}

struct Slot {
    buffer: wgpu::Buffer,
    state: Arc<AtomicU8>,
    run: u64,
    steps: u64,
    steps_in_frame: u32,
    balls: u32,
}

const FREE: u8 = 0;
const RECORDED: u8 = 1;
const MAPPING: u8 = 2;
const MAPPED: u8 = 3;
const FAILED: u8 = 4;

impl Telemetry {
    /// Frames that may be on their way; one that finds no slot is not read.
    const SLOTS: usize = 4;

    /// For both sides of one landscape.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Self {
        let buffer = |label, size, usage| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage,
                mapped_at_creation: false,
            })
        };
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
            buffer("landscape.timestamps", 8 * u64::from(TIMESTAMPS), usage)
        });
        let slots = (0..Self::SLOTS).map(|_| Slot {
            buffer: buffer(
                "landscape.telemetry",
                RECORD_BYTES,
                BufferUsages::COPY_DST | BufferUsages::MAP_READ,
            ),
            state: Arc::new(AtomicU8::new(FREE)),
            run: 0,
            steps: 0,
            steps_in_frame: 0,
            balls: 0,
        });
        Self {
            record: buffer(
                "landscape.record",
                RECORD_BYTES,
                BufferUsages::STORAGE | BufferUsages::COPY_SRC | BufferUsages::COPY_DST,
            ),
            queries,
            resolved,
            nanoseconds_per_tick: f64::from(queue.get_timestamp_period()),
            slots: slots.collect(),
            newest: None,
            run: 0,
        }
    }

    /// Where a compute pass puts its timestamps.
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

    /// Where the render pass puts its own.
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

    /// Records the copy of this frame's figures, if a slot is free.
    pub fn keep(
        &mut self,
        encoder: &mut wgpu::CommandEncoder,
        steps: u64,
        steps_in_frame: u32,
        balls: u32,
    ) {
        if let (Some(queries), Some(resolved)) = (&self.queries, &self.resolved) {
            encoder.resolve_query_set(queries, 0..TIMESTAMPS, resolved, 0);
            encoder.copy_buffer_to_buffer(resolved, 0, &self.record, TIMES_OFFSET, resolved.size());
        }
        // One that nobody has asked for since may as well hold this frame.
        let states = [FREE, RECORDED].into_iter();
        let mut slot = states.filter_map(|wanted| {
            let state = |slot: &Slot| slot.state.load(Ordering::Acquire);
            self.slots.iter().position(|slot| state(slot) == wanted)
        });
        if let Some(slot) = slot.next().map(|index| &mut self.slots[index]) {
            encoder.copy_buffer_to_buffer(&self.record, 0, &slot.buffer, 0, RECORD_BYTES);
            slot.state.store(RECORDED, Ordering::Release);
            (slot.run, slot.steps) = (self.run, steps);
            (slot.steps_in_frame, slot.balls) = (steps_in_frame, balls);
        }
    }

    /// The newest frame that is there. Frames recorded before the call have to have been submitted. Waits for nothing.
    pub fn newest(&mut self) -> Option<Frame> {
        for slot in &mut self.slots {
            match slot.state.load(Ordering::Acquire) {
                RECORDED => {
                    let state = Arc::clone(&slot.state);
                    state.store(MAPPING, Ordering::Release);
                    slot.buffer
                        .map_async(wgpu::MapMode::Read, .., move |result| {
                            let mapped = if result.is_ok() { MAPPED } else { FAILED };
                            state.store(mapped, Ordering::Release);
                        });
                }
                MAPPED => {
                    let frame = slot.frame(self.nanoseconds_per_tick, self.queries.is_some());
                    slot.buffer.unmap();
                    slot.state.store(FREE, Ordering::Release);
                    if slot.run == self.run {
                        let both = self.newest.into_iter().chain(frame);
                        self.newest = both.max_by_key(|frame| frame.steps);
                    }
                }
                _ => {}
            }
        }
        self.newest
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
        let counts: Vec<Count> = bytemuck::pod_collect_to_vec(counts);
        let ticks: Vec<u64> = bytemuck::pod_collect_to_vec(times);
        let milliseconds = |pass: Pass| {
            let first = 2 * pass as usize;
            ticks[first + 1].saturating_sub(ticks[first]) as f64 * nanoseconds_per_tick / 1e6
        };
        let figures = |side: usize| counts[side].figures(self.balls, self.steps_in_frame);
        let per_step = f64::from(self.steps_in_frame.max(1));
        Some(Frame {
            steps: self.steps,
            sides: [figures(0), figures(1)],
            times: has_times.then(|| Times {
                slopes: per_step * milliseconds(Pass::Slopes),
                step: per_step * milliseconds(Pass::Step),
                counts: milliseconds(Pass::Counts),
                drawing: milliseconds(Pass::Drawing),
            }),
        })
    }
}
