//! The paths that are timed side by side: every way to make a step, the roofs above them, and the transfers.

use std::fmt;

use anyhow::anyhow;
use serde::{Deserialize, Serialize};
use wgpu_optim::oracle::Roundoff;
use wgpu_optim::{Rule as _, readback, wgpu};

use super::elementwise::{Elementwise, Pipelines};
use super::stream::Stream;
use super::timing::{GpuClock, GpuWork, Sample, time};
use super::wide_copy::WideCopy;
use super::wide_stream::WideStream;
use crate::Failure;
use crate::backend::OpenGpu;
use crate::lab::memory::check_memory;
use crate::lab::problem::{OnCpu, OnGpu, OnReference, Problem, Stepper};

/// Bytes that the copies of a path's buffers take together, so that none is in a cache when its turn comes: twice the
/// largest last-level cache of GPUs and desktop processors.
const CYCLED_BYTES: usize = 256 << 20;

/// More copies than that make small problems slow to set up.
const MAX_COPIES: usize = 64;

/// The kinds of paths that are timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// The fused kernel.
    Fused,
    /// The fused kernel under a control: norm, clip, and skip if something is not finite.
    Controlled,
    /// The step in separate kernels for scale and add.
    Unfused,
    /// The roof of a GPU: a copy kernel with the step's access pattern.
    Copy,
    /// All gradients to the GPU.
    UploadGrads,
    /// All parameters from the GPU.
    DownloadParams,
    /// The parallel CPU optimizer.
    CpuTwin,
    /// The step under a control.
    ControlledTwin,
    /// The roof of the CPU: a copy on all threads with the step's access pattern.
    Stream,
    /// The twin on one thread.
    Reference,
}

impl Kind {
    /// Whether this is a complete step.
    pub fn is_step(self) -> bool {
        matches!(
            self,
            Self::Fused
                | Self::Controlled
                | Self::Unfused
                | Self::CpuTwin
                | Self::ControlledTwin
                | Self::Reference
        )
    }

    /// Whether it is on a GPU.
    pub fn is_gpu(self) -> bool {
        !matches!(
            self,
            Self::CpuTwin | Self::ControlledTwin | Self::Stream | Self::Reference
        )
    }

    /// The path that no step on the same device can overtake.
    pub fn roof(self) -> Option<Self> {
        match self {
            Self::Fused | Self::Controlled | Self::Unfused => Some(Self::Copy),
            Self::CpuTwin | Self::ControlledTwin | Self::Reference => Some(Self::Stream),
            _ => None,
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(match self {
            Self::Fused => "fused step",
            Self::Controlled => "clipped step",
            Self::Unfused => "unfused chain",
            Self::Copy => "copy kernel",
            Self::UploadGrads => "upload gradients",
            Self::DownloadParams => "download parameters",
            Self::CpuTwin => "CPU twin",
            Self::ControlledTwin => "CPU twin, clipped",
            Self::Stream => "stream",
            Self::Reference => "reference, 1 thread",
        })
    }
}

type Run<'a> = Box<dyn FnMut() -> Result<Sample, Failure> + 'a>;

pub struct Path<'a> {
    pub kind: Kind,
    pub device: String,
    pub bytes_per_elem: u64,
    /// Dispatches of a GPU path.
    pub dispatches: Option<usize>,
    /// Largest error of a step that was checked.
    pub worst_ulp: Option<f64>,
    /// One per copy of the buffers.
    runs: Vec<Run<'a>>,
    /// The copy that was timed last.
    last: usize,
    pub samples: Vec<Sample>,
}

impl Path<'_> {
    /// Rounds until every copy of the buffers has been touched, pages and shaders included.
    pub fn warm_up(&self) -> usize {
        self.runs.len().max(3)
    }

    /// One round: the copy that was timed last once more, untimed, then the next one. So a path finds threads, clocks and
    /// code as its own last run left them, not as another path did, and every copy has its turn.
    pub fn run(&mut self, timed: bool) -> Result<(), Failure> {
        self.runs[self.last]()?;
        self.last = (self.last + 1) % self.runs.len();
        let sample = self.runs[self.last]()?;
        self.samples.extend(timed.then_some(sample));
        Ok(())
    }
}

/// A device, and what all that is timed on it shares.
pub struct Rig {
    pub open: OpenGpu,
    clock: GpuClock,
    pipelines: Pipelines,
}

impl Rig {
    pub fn new(open: OpenGpu) -> Self {
        Self {
            clock: GpuClock::new(&open),
            pipelines: Pipelines::new(&open.gpu.device),
            open,
        }
    }

    /// Takes another device of the adapter, as one that has run out of memory may be lost. Where there is none it goes
    /// on failing.
    pub fn renew(&mut self) {
        if let Ok(open) = self.open.again() {
            *self = Self::new(open);
        }
    }
}

/// The problem and the devices that a set of paths is made for.
pub struct Setup<'a> {
    pub problem: &'a Problem,
    /// Whether the data is in the caches.
    pub hot: bool,
    /// Whether steps under a control are timed, too.
    pub controlled: bool,
}

impl<'a> Setup<'a> {
    fn slots(&self) -> usize {
        self.problem.config().slots().kept().count()
    }

    fn copies(&self) -> usize {
        let bytes = self.problem.stored_bytes() as usize;
        match self.hot {
            true => 1,
            false => CYCLED_BYTES.div_ceil(bytes).min(MAX_COPIES),
        }
    }

    /// The number of optimizers of a copy.
    fn optimizers(&self) -> u64 {
        1 + u64::from(self.controlled)
    }

    /// The memory that [`cpu_paths`](Self::cpu_paths) take.
    fn cpu_bytes(&self) -> u64 {
        let problem = self.problem;
        let stream = problem.stored_bytes();
        let reference = match problem.storage().is_f32() {
            true => OnReference::bytes(problem),
            false => 0,
        };
        let copy = self.optimizers() * OnCpu::bytes(problem) + stream + reference;
        self.copies() as u64 * copy + problem.check_bytes()
    }

    /// The memory that [`gpu_paths`](Self::gpu_paths) take on the host, which is what some adapters have, too.
    fn gpu_bytes(&self, open: &OpenGpu) -> u64 {
        let problem = self.problem;
        let (unfused, objects) = match problem.storage().is_f32() {
            true => Elementwise::unfused_bytes(problem),
            false => (0, 0),
        };
        let on_device = match open.shares_memory() {
            // The copy kernel has arrays of its own.
            true => problem.stored_bytes() + unfused,
            false => 0,
        };
        let copy = self.optimizers() * OnGpu::bytes(open, problem) + objects + on_device;
        // What is uploaded and downloaded lies in buffers on its way.
        let in_transit = problem.stored_bytes();
        self.copies() as u64 * copy + problem.check_bytes() + in_transit
    }

    fn path(&self, kind: Kind, device: &str, bytes_per_elem: u64) -> Path<'a> {
        Path {
            kind,
            device: device.to_owned(),
            bytes_per_elem,
            dispatches: None,
            worst_ulp: None,
            runs: Vec::new(),
            last: 0,
            samples: Vec::new(),
        }
    }

    /// Everything that is timed on the CPU, each step checked first. Refused where there is not the memory for it.
    pub fn cpu_paths(&self) -> Result<Vec<Path<'a>>, Failure> {
        check_memory(self.cpu_bytes())?;
        let (problem, lr) = (self.problem, self.problem.config().lr());
        let path = |kind| self.path(kind, "CPU", problem.bytes_per_elem());
        let mut twin = path(Kind::CpuTwin);
        // What is copied is read once, whatever a rule's sums read before.
        let of_copy = problem.storage().bytes_per_elem();
        let mut stream = self.path(Kind::Stream, "CPU", of_copy);
        let of_norm = problem.storage().grads.bytes();
        let clipped = problem.bytes_per_elem() + of_norm;
        let mut clipped = self.path(Kind::ControlledTwin, "CPU", clipped);
        let mut reference = path(Kind::Reference);
        for copy in 0..self.copies() {
            let mut stepper = OnCpu::new(problem)?;
            if copy == 0 {
                let agreement = problem.check(&mut stepper, Roundoff::NEAREST)?;
                twin.worst_ulp = Some(agreement.worst_ulp);
            }
            let run = move || time(|| stepper.step(lr));
            twin.runs.push(Box::new(run));

            if self.controlled {
                let mut stepper = OnCpu::new(problem)?.controlled()?;
                if copy == 0 {
                    let agreement = problem.check(&mut stepper, Roundoff::NEAREST)?;
                    clipped.worst_ulp = Some(agreement.worst_ulp);
                }
                let run = move || time(|| stepper.step(lr));
                clipped.runs.push(Box::new(run));
            }

            stream.runs.push(self.stream());

            // It knows f32 alone.
            if !problem.storage().is_f32() {
                continue;
            }
            let mut stepper = OnReference::new(problem);
            if copy == 0 {
                let agreement = problem.check(&mut stepper, Roundoff::NEAREST)?;
                reference.worst_ulp = Some(agreement.worst_ulp);
            }
            let run = move || time(|| stepper.step(lr));
            reference.runs.push(Box::new(run));
        }
        let paths = [twin, clipped, stream, reference].into_iter();
        Ok(paths.filter(|path| !path.runs.is_empty()).collect())
    }

    /// A copy of the step's accesses in memory.
    fn stream(&self) -> Run<'a> {
        let (problem, slots, storage) = (self.problem, self.slots(), self.problem.storage());
        let mut run: Box<dyn FnMut()> = if storage.is_f32() {
            let mut arrays = Stream::new(slots, problem.grads());
            Box::new(move || arrays.run())
        } else {
            let mut arrays = WideStream::new(&storage, problem.numel());
            Box::new(move || arrays.run())
        };
        Box::new(move || {
            time(|| {
                run();
                Ok(())
            })
        })
    }

    /// Everything that is timed on one adapter, each step checked first. Refused where there is not the memory for it.
    pub fn gpu_paths(&self, rig: &'a Rig) -> Result<Vec<Path<'a>>, Failure> {
        let (problem, open) = (self.problem, &rig.open);
        check_memory(self.gpu_bytes(open))?;
        let (of_rule, storage) = (problem.bytes_per_elem(), problem.storage());
        let path = |kind, bytes_per_elem| self.path(kind, &open.name(), bytes_per_elem);
        let mut fused = path(Kind::Fused, of_rule);
        let mut clipped = path(Kind::Controlled, of_rule + storage.grads.bytes());
        let mut copy = path(Kind::Copy, storage.bytes_per_elem());
        let mut unfused = path(Kind::Unfused, 0);
        let mut upload = path(Kind::UploadGrads, storage.grads.bytes());
        let mut download = path(Kind::DownloadParams, storage.params.bytes());
        for index in 0..self.copies() {
            let mut stepper = OnGpu::new(open, problem)?;
            if index == 0 {
                let agreement = problem.check(&mut stepper, Roundoff::WGSL)?;
                fused.worst_ulp = Some(agreement.worst_ulp);
                fused.dispatches = Some(stepper.dispatches());
            }
            let arena = stepper.arena().clone();
            let grads: Vec<_> = problem.values().map(|(_, grads)| grads).collect();
            let run = move || {
                time(|| {
                    arena.upload_all_grads(&grads).map_err(Failure::failed)?;
                    open.finish()
                })
            };
            upload.runs.push(Box::new(run));
            let arena = stepper.arena().clone();
            let run = move || {
                time(|| {
                    readback::block_on(&open.gpu.device, arena.download_all_params())
                        .map(drop)
                        .map_err(Failure::failed)
                })
            };
            download.runs.push(Box::new(run));
            fused.runs.push(on_gpu(rig, stepper));
            if self.controlled {
                let mut stepper = OnGpu::new(open, problem)?.controlled()?;
                if index == 0 {
                    let agreement = problem.check(&mut stepper, Roundoff::WGSL)?;
                    clipped.worst_ulp = Some(agreement.worst_ulp);
                    clipped.dispatches = Some(stepper.dispatches());
                }
                clipped.runs.push(on_gpu(rig, stepper));
            }

            if !storage.is_f32() {
                let kernel = WideCopy::new(open, problem).map_err(Failure::Failed)?;
                copy.dispatches = Some(kernel.dispatches());
                copy.runs.push(on_gpu(rig, kernel));
                continue;
            }
            let kernel =
                Elementwise::copy(open, &rig.pipelines, problem).map_err(Failure::Failed)?;
            copy.dispatches = Some(kernel.dispatches());
            copy.runs.push(on_gpu(rig, kernel));

            let chain = Elementwise::unfused(open, &rig.pipelines, problem);
            if let Some(mut chain) = chain.map_err(Failure::Failed)? {
                unfused.bytes_per_elem = chain.bytes_per_elem();
                unfused.dispatches = Some(chain.dispatches());
                if index == 0 {
                    let agreement = problem.check(&mut chain, Roundoff::WGSL)?;
                    unfused.worst_ulp = Some(agreement.worst_ulp);
                }
                unfused.runs.push(on_gpu(rig, chain));
            }
        }
        let paths = [fused, clipped, unfused, copy, upload, download];
        Ok(paths
            .into_iter()
            .filter(|path| !path.runs.is_empty())
            .collect())
    }
}

fn on_gpu<'a>(rig: &'a Rig, mut work: impl GpuWork + 'a) -> Run<'a> {
    Box::new(move || rig.clock.time(&rig.open, &mut work))
}

impl GpuWork for OnGpu<'_> {
    fn prepare(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<(), Failure> {
        let prepared = match self.parts_mut() {
            (optimizer, None) => optimizer.prepare(encoder),
            (optimizer, Some(control)) => {
                // Of the step before, as a program does that never waits.
                control.report(encoder);
                control.read();
                control.prepare(encoder, &mut [optimizer])
            }
        };
        prepared.map_err(|error| Failure::Failed(anyhow!(error)))
    }

    fn record(&mut self, pass: &mut wgpu::ComputePass<'_>) -> Result<(), Failure> {
        let recorded = match self.parts_mut() {
            (optimizer, None) => optimizer.record(pass),
            (optimizer, Some(control)) => control.record(pass, &mut [optimizer]),
        };
        recorded.map_err(|error| Failure::Failed(anyhow!(error)))
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;
    use crate::backend::tests::open_gpu;
    use crate::lab::args::BenchForm;

    #[test]
    fn copies_share_what_does_not_hold_data() {
        let rig = Rig::new(open_gpu());
        let device = &rig.open.gpu.device;
        let config = BenchForm::HeavyBall.config().unwrap();
        let problem = Problem::new(config.into(), vec![4099]);
        // Query sets, pipelines and shader modules while the paths are there.
        let objects = |hot| {
            let problem = &problem;
            let paths = Setup {
                problem,
                hot,
                controlled: false,
            }
            .gpu_paths(&rig)
            .unwrap();
            assert_eq!(paths[0].runs.len(), if hot { 1 } else { MAX_COPIES });
            let counters = device.get_internal_counters().hal;
            [
                counters.query_sets.read(),
                counters.compute_pipelines.read(),
                counters.shader_modules.read(),
            ]
        };
        let of_one = objects(true);
        assert_eq!(objects(false), of_one);
        let timestamps = device.features().contains(wgpu::Features::TIMESTAMP_QUERY);
        assert_eq!(of_one[0], isize::from(timestamps));
    }
}
