//! The GPU optimizer: tensors, state, `step(encoder)`.

use std::fmt;

use crate::binding::{TensorBinding, check_bindings};
use crate::coefficients::{Coefficients, Terms};
use crate::error::{BuildError, ConfigError, StateError, StepError};
use crate::error_scope::checked;
use crate::kernel::{Kernels, SCALARS_GROUP, TENSORS_GROUP};
use crate::plan::{Access, DeviceLimits, ELEM_BYTES, Piece, Plan, TensorLayout, Window};
use crate::readback;
use crate::scalars::{SgdUniforms, UniformRing};
use crate::sgd::SgdConfig;
use crate::state::{OptimizerState, Tensors, UnknownTensor};

/// The momentum update over tensors on the GPU, recorded into the caller's encoder.
///
/// Holds the velocity and the applied-step counts. [`step`](Self::step) records; it never submits, polls,
/// maps, compiles, or allocates GPU memory after the first step. A host-side step count moves when a step is
/// recorded, so an encoder that holds a step has to be submitted.
///
/// ```
/// use wgpu_optim::{AdapterRequest, Gpu, GpuOptimizer, Kernels, SgdConfig, TensorBinding, readback};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let Gpu { device, queue, .. } = Gpu::open_blocking(&AdapterRequest::default())?;
/// // Your own buffers, or:
/// let params = readback::storage_buffer(&device, &queue, "params", &[1.0, 2.0, 3.0])?;
/// let grads = readback::storage_buffer(&device, &queue, "grads", &[1.0, 0.0, -1.0])?;
///
/// let kernels = Kernels::new(&device, &queue)?; // once per device
/// let config = SgdConfig::builder(0.5).momentum(0.9).build()?;
/// let mut optimizer = GpuOptimizer::new(&kernels, config, &[TensorBinding {
///     name: "weight",
///     params: &params,
///     params_offset_bytes: 0,
///     grads: &grads,
///     grads_offset_bytes: 0,
///     numel: 3,
/// }])?;
///
/// let mut encoder = device.create_command_encoder(&Default::default());
/// optimizer.step(&mut encoder)?;
/// queue.submit([encoder.finish()]);
///
/// let weight = readback::download_blocking(&device, &queue, &params, 0, 3)?;
/// assert_eq!(weight, [0.5, 2.0, 3.5]);
/// # Ok(())
/// # }
/// ```
pub struct GpuOptimizer {
    kernels: Kernels,
    config: SgdConfig,
    terms: Terms,
    tensors: Tensors,
    plan: Plan,
    velocity: Vec<wgpu::Buffer>,
    /// One per piece of the plan.
    bind_groups: Vec<wgpu::BindGroup>,
    /// One per access that the plan uses.
    pipelines: Vec<(Access, wgpu::ComputePipeline)>,
    /// On the uniform path only.
    ring: Option<UniformRing>,
}

impl GpuOptimizer {
    /// Checks every tensor, plans the dispatches, allocates a zero velocity and builds bind groups and
    /// pipelines. Submits nothing.
    ///
    /// # Errors
    /// [`BuildError`] naming the tensor, what was expected and what was given; nothing is left behind.
    pub fn new(
        kernels: &Kernels,
        config: SgdConfig,
        tensors: &[TensorBinding<'_>],
    ) -> Result<Self, BuildError> {
        let host_tensors = Tensors::new(tensors.iter().map(|t| (t.name.to_owned(), t.numel)))?;
        check_bindings(tensors)?;

        let device = kernels.device();
        let terms = Terms::of(&config);
        let layouts: Vec<_> = tensors
            .iter()
            .map(|tensor| TensorLayout {
                numel: tensor.numel,
                params_offset_bytes: tensor.params_offset_bytes,
                grads_offset_bytes: tensor.grads_offset_bytes,
            })
            .collect();
        let plan = Plan::new(&layouts, &DeviceLimits::from(&device.limits()))?;

        let mut pipelines = Vec::new();
        for access in Access::ALL {
            if plan.dispatches.iter().any(|d| d.access == access) {
                pipelines.push((access, kernels.pipeline(terms, access)?));
            }
        }
        let velocity = if terms.velocity {
            allocate_velocity(device, &plan)?
        } else {
            Vec::new()
        };
        let (bind_groups, ring) = checked(device, || {
            let bind_groups = bind_pieces(kernels, terms, tensors, &plan, &velocity);
            let ring = kernels
                .scalars_layout()
                .map(|layout| UniformRing::new(device, layout, plan.dispatches.len()));
            (bind_groups, ring)
        })
        .map_err(|error| BuildError::Device {
            message: error.to_string(),
        })?;

        Ok(Self {
            kernels: kernels.clone(),
            config,
            terms,
            tensors: host_tensors,
            plan,
            velocity,
            bind_groups,
            pipelines,
            ring,
        })
    }

    /// The configuration, with the learning rate of the next step.
    #[must_use]
    pub const fn config(&self) -> &SgdConfig {
        &self.config
    }

    /// Sets the learning rate of the steps recorded from now on.
    ///
    /// # Errors
    /// [`ConfigError`] as [`SgdConfig::with_lr`]; the learning rate stays as it was.
    pub fn set_lr(&mut self, lr: f64) -> Result<(), ConfigError> {
        self.config = self.config.with_lr(lr)?;
        Ok(())
    }

    /// Sets the momentum of the steps recorded from now on.
    ///
    /// # Errors
    /// [`ConfigError`] as [`SgdConfig::with_momentum`]; the momentum stays as it was.
    pub fn set_momentum(&mut self, momentum: f64) -> Result<(), ConfigError> {
        self.config = self.config.with_momentum(momentum)?;
        Ok(())
    }

    /// How many steps have been recorded, whatever was frozen: the position in a schedule.
    #[must_use]
    pub fn steps(&self) -> u64 {
        self.tensors.steps()
    }

    /// Freezes a tensor, or lets it go on: a frozen tensor is left as it is by the steps recorded from now on,
    /// velocity and step count included.
    ///
    /// # Errors
    /// [`UnknownTensor`] if no tensor has this name.
    pub fn set_frozen(&mut self, tensor: &str, frozen: bool) -> Result<(), UnknownTensor> {
        self.tensors.set_frozen(tensor, frozen)
    }

    /// How many steps have been recorded for a tensor.
    #[must_use]
    pub fn applied_steps(&self, tensor: &str) -> Option<u64> {
        self.tensors.get(tensor).map(|tensor| tensor.applied_steps)
    }

    /// The dispatches of a step in which no tensor is frozen.
    #[must_use]
    pub const fn plan(&self) -> &Plan {
        &self.plan
    }

    /// Records one step into `encoder`: one compute pass (and, where the device has no immediates, one copy of
    /// the scalars before it). The caller submits.
    ///
    /// Steps recorded one after the other apply one after the other, each with the learning rate that was set
    /// when it was recorded, in one encoder or in several submitted in that order.
    ///
    /// # Errors
    /// [`StepError::Scalars`] on a device without immediates that is lost or out of memory; then nothing has
    /// been recorded. With immediates a step cannot fail.
    pub fn step(&mut self, encoder: &mut wgpu::CommandEncoder) -> Result<(), StepError> {
        let first = Coefficients::new(&self.config, true).cast();
        let later = Coefficients::new(&self.config, false).cast();
        let tensors = self.tensors.as_slice();
        let pieces = &self.plan.pieces;
        let live = |dispatch: usize| {
            let dispatch = &self.plan.dispatches[dispatch];
            let tensor = &tensors[pieces[dispatch.piece].tensor];
            let k = if tensor.applied_steps == 0 {
                &first
            } else {
                &later
            };
            (!tensor.frozen).then(|| (dispatch, SgdUniforms::new(k, dispatch)))
        };
        let dispatches = 0..self.plan.dispatches.len();

        if let Some(ring) = &mut self.ring {
            for index in dispatches.clone() {
                if let Some((_, scalars)) = live(index) {
                    ring.set(index, &scalars);
                }
            }
            ring.record(self.kernels.device(), encoder)?;
        }

        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("wgpu_optim.step"),
            timestamp_writes: None,
        });
        let mut current = None;
        for index in dispatches {
            let Some((dispatch, scalars)) = live(index) else {
                continue;
            };
            if current != Some(dispatch.access) {
                let pipeline = self.pipelines.iter().find(|(a, _)| *a == dispatch.access);
                if let Some((access, pipeline)) = pipeline {
                    pass.set_pipeline(pipeline);
                    current = Some(*access);
                }
            }
            pass.set_bind_group(TENSORS_GROUP, &self.bind_groups[dispatch.piece], &[]);
            match &self.ring {
                Some(ring) => ring.bind(&mut pass, SCALARS_GROUP, index),
                None => pass.set_immediates(0, bytemuck::bytes_of(&scalars)),
            }
            let [x, y] = dispatch.workgroups;
            pass.dispatch_workgroups(x, y, 1);
        }
        drop(pass);
        self.tensors.count_step();
        Ok(())
    }

    /// Copies what the optimizer remembers off the device, after everything submitted so far. Submits and
    /// waits as [`readback::download`] does; native programs wrap it in [`readback::block_on`].
    ///
    /// # Errors
    /// [`StateError::Transfer`] if the device is lost or out of memory.
    pub async fn state(&self) -> Result<OptimizerState, StateError> {
        let (device, queue) = (self.kernels.device(), self.kernels.queue());
        let mut velocity = Vec::with_capacity(self.velocity.len());
        for buffer in &self.velocity {
            let numel = buffer.size() / ELEM_BYTES;
            velocity.push(readback::download(device, queue, buffer, 0, numel).await?);
        }
        let velocity_of = |tensor: usize| {
            let pieces = self.plan.pieces_of(tensor).iter();
            let values = pieces.flat_map(|piece| {
                let start = (piece.velocity.start_bytes() / ELEM_BYTES) as usize;
                let len = (piece.elems.end - piece.elems.start) as usize;
                &velocity[piece.velocity_buffer][start..start + len]
            });
            values.copied().collect()
        };
        Ok(self.tensors.state(&self.config, velocity_of))
    }

    /// Takes over a saved state of the same tensors. One that comes without a velocity starts fresh. Takes effect
    /// before the commands of the next submission.
    ///
    /// # Errors
    /// [`StateError`] if the state belongs to another form or to other tensors; then nothing has changed.
    /// [`StateError::Transfer`] if the device fails half-way; then the velocity is undefined.
    pub fn load_state(&mut self, state: &OptimizerState) -> Result<(), StateError> {
        let matched = self.tensors.match_state(state, &self.config)?;
        if self.terms.velocity {
            for (tensor, entry) in matched.iter().enumerate() {
                for piece in self.plan.pieces_of(tensor) {
                    let elems = piece.elems.start as usize..piece.elems.end as usize;
                    let zeros;
                    let values = match &entry.velocity {
                        Some(velocity) => &velocity[elems],
                        None => {
                            zeros = vec![0.0; elems.len()];
                            &zeros
                        }
                    };
                    readback::upload(
                        self.kernels.device(),
                        self.kernels.queue(),
                        &self.velocity[piece.velocity_buffer],
                        piece.velocity.start_bytes(),
                        values,
                    )?;
                }
            }
        }
        self.tensors
            .restore_counts(state.steps, &matched, self.terms.velocity);
        Ok(())
    }
}

impl fmt::Debug for GpuOptimizer {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("GpuOptimizer")
            .field("config", &self.config)
            .field("tensors", &self.tensors.as_slice().len())
            .field("dispatches", &self.plan.dispatches.len())
            .finish_non_exhaustive()
    }
}

fn allocate_velocity(device: &wgpu::Device, plan: &Plan) -> Result<Vec<wgpu::Buffer>, BuildError> {
    checked(device, || {
        let allocate = |size: &u64| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some("wgpu_optim.velocity"),
                size: *size,
                usage: wgpu::BufferUsages::STORAGE
                    | wgpu::BufferUsages::COPY_SRC
                    | wgpu::BufferUsages::COPY_DST,
                mapped_at_creation: false,
            })
        };
        plan.velocity_buffer_bytes.iter().map(allocate).collect()
    })
    .map_err(|error| match error {
        wgpu::Error::OutOfMemory { .. } => BuildError::OutOfMemory {
            bytes: plan.velocity_buffer_bytes.iter().sum(),
        },
        error => BuildError::Device {
            message: error.to_string(),
        },
    })
}

fn bind_pieces(
    kernels: &Kernels,
    terms: Terms,
    tensors: &[TensorBinding<'_>],
    plan: &Plan,
    velocity: &[wgpu::Buffer],
) -> Vec<wgpu::BindGroup> {
    let bind = |binding: u32, buffer, window: &Window| wgpu::BindGroupEntry {
        binding,
        resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
            buffer,
            offset: window.offset_bytes,
            size: wgpu::BufferSize::new(window.size_bytes),
        }),
    };
    let bind_piece = |piece: &Piece| {
        let tensor = &tensors[piece.tensor];
        let mut entries = vec![
            bind(0, tensor.params, &piece.params),
            bind(1, tensor.grads, &piece.grads),
        ];
        if terms.velocity {
            entries.push(bind(2, &velocity[piece.velocity_buffer], &piece.velocity));
        }
        kernels
            .device()
            .create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some(tensor.name),
                layout: kernels.tensors_layout(terms),
                entries: &entries,
            })
    };
    plan.pieces.iter().map(bind_piece).collect()
}
