//! Shader modules, explicit layouts and pipelines: built once per device, shared by its optimizers.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::error_scope::{LOST, LossWatch, checked, is_lost};
use crate::plan::{DeviceLimits, WORKGROUP_SIZE};
use crate::wgsl::scalars::{CONTROL_BYTES, Uniforms};
use crate::wgsl::{KernelError, KernelVariant, ScalarPath};

/// The name of the kernels in errors, before there is one.
const KERNELS: &str = "wgpu_optim";

/// The kernels of one device: a handle that is cheap to clone and to share between optimizers.
///
/// A pipeline is compiled when the first optimizer that needs it is built, never during a step.
#[derive(Clone, Debug)]
pub struct Kernels {
    inner: Arc<Inner>,
    limits: DeviceLimits,
}

#[derive(Debug)]
struct Inner {
    device: wgpu::Device,
    queue: wgpu::Queue,
    path: ScalarPath,
    loss: LossWatch,
    scalars_layout: Option<wgpu::BindGroupLayout>,
    /// The layout of a control's block.
    control_layout: wgpu::BindGroupLayout,
    /// The layouts of a table of chunks, behind a control's blocks and not, by what lies behind it.
    chunks_layouts: [[wgpu::BindGroupLayout; 3]; 2],
    compiled: Mutex<Compiled>,
}

/// The bindings of a kernel, by number and kind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Bindings {
    tensors: usize,
    has_state: bool,
    in_one_buffer: bool,
}

/// The objects that have been built so far.
#[derive(Debug, Default)]
struct Compiled {
    /// By their source.
    modules: HashMap<String, wgpu::ShaderModule>,
    /// The layouts of bind groups, by what they bind.
    layouts: HashMap<Bindings, wgpu::BindGroupLayout>,
    pipelines: HashMap<KernelVariant, wgpu::ComputePipeline>,
    /// The pipelines of kernels that no rule is part of, by entry point and source.
    of_control: HashMap<(&'static str, String), (wgpu::ComputePipeline, wgpu::BindGroupLayout)>,
}

/// The kind of a binding of a kernel that no rule is part of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BindingKind {
    Uniform,
    Read,
    ReadWrite,
}

/// What kernels in chunks bind behind their table.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum BehindChunks {
    Nothing,
    /// The sums of chunks, to be written.
    Partials,
    /// The sums over tensors.
    Totals,
}

impl BehindChunks {
    const ALL: [Self; 3] = [Self::Nothing, Self::Partials, Self::Totals];

    fn of(variant: &KernelVariant) -> Self {
        match variant.has_sums() {
            true if variant.is_measuring() => Self::Partials,
            true => Self::Totals,
            false => Self::Nothing,
        }
    }
}

impl BindingKind {
    const fn ty(self) -> wgpu::BufferBindingType {
        match self {
            Self::Uniform => wgpu::BufferBindingType::Uniform,
            Self::Read => wgpu::BufferBindingType::Storage { read_only: true },
            Self::ReadWrite => wgpu::BufferBindingType::Storage { read_only: false },
        }
    }
}

impl Kernels {
    /// Prepares the kernels for `device` and its `queue`, with the scalars on the best path that the device
    /// offers. Submits nothing.
    ///
    /// # Errors
    /// [`KernelError`] if a limit of the device is below what the kernels need, or the device is lost or refuses a
    /// layout.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<Self, KernelError> {
        check_limits(&device.limits())?;
        if is_lost(device) {
            return Err(KernelError::Device {
                kernel: KERNELS.to_owned(),
                message: LOST.to_owned(),
            });
        }
        let path = ScalarPath::of(device);
        let (scalars_layout, control_layout, chunks_layouts) = checked(device, || {
            let layout = |label, bytes| dynamic_uniform_layout(device, label, bytes);
            let scalars = match path {
                ScalarPath::Immediates => None,
                ScalarPath::Uniforms => Some(layout("wgpu_optim.uniforms", Uniforms::MAX_BYTES)),
            };
            let control = layout("wgpu_optim.control", CONTROL_BYTES);
            let chunks = [false, true].map(|is_controlled| {
                BehindChunks::ALL.map(|behind| chunks_layout(device, is_controlled, behind))
            });
            (scalars, control, chunks)
        })
        .map_err(|error| KernelError::Device {
            kernel: KERNELS.to_owned(),
            message: error.to_string(),
        })?;
        Ok(Self {
            inner: Arc::new(Inner {
                device: device.clone(),
                queue: queue.clone(),
                path,
                loss: LossWatch::new(device),
                scalars_layout,
                control_layout,
                chunks_layouts,
                compiled: Mutex::default(),
            }),
            limits: DeviceLimits::of(&device.limits(), device.adapter_info().device_type),
        })
    }

    /// Returns the kernels with another ceiling on the elements of a dispatch, for optimizers built from now on; eight at
    /// least. By default 2^26 on software and integrated adapters and those of browsers, so that no watchdog takes a
    /// long dispatch for a hang, and none on others.
    #[must_use]
    pub fn with_max_dispatch_elems(mut self, max_dispatch_elems: u64) -> Self {
        self.limits.max_dispatch_elems = max_dispatch_elems;
        self
    }

    /// The ceiling on the elements of a dispatch.
    #[must_use]
    pub fn max_dispatch_elems(&self) -> u64 {
        self.limits.max_dispatch_elems
    }

    /// Returns the kernels, for optimizers built from now on, as a software adapter wants them or as a GPU does. By default
    /// that is what the device is; the other is there to be measured.
    #[must_use]
    pub fn as_for_software(mut self, is_software: bool) -> Self {
        self.limits.is_software = is_software;
        self
    }

    /// The limits that optimizers are planned with.
    #[must_use]
    pub fn device_limits(&self) -> &DeviceLimits {
        &self.limits
    }

    /// The device that these kernels were built for.
    #[must_use]
    pub fn device(&self) -> &wgpu::Device {
        &self.inner.device
    }

    /// The queue of the device.
    #[must_use]
    pub fn queue(&self) -> &wgpu::Queue {
        &self.inner.queue
    }

    /// The path that the scalars of a step take on this device.
    #[must_use]
    pub fn scalar_path(&self) -> ScalarPath {
        self.inner.path
    }

    /// Whether the device is lost, as far as can be known without waiting.
    pub(crate) fn is_lost(&self) -> bool {
        self.has_seen_loss() || is_lost(&self.inner.device)
    }

    /// Whether a browser has said so: it throws at what maps a buffer then, and wgpu 30 panics.
    pub(crate) fn has_seen_loss(&self) -> bool {
        self.inner.loss.has_seen_loss()
    }

    pub(crate) fn scalars_layout(&self) -> Option<&wgpu::BindGroupLayout> {
        self.inner.scalars_layout.as_ref()
    }

    pub(crate) fn control_layout(&self) -> &wgpu::BindGroupLayout {
        &self.inner.control_layout
    }

    /// The layout of a table of chunks, behind a control's blocks or not.
    pub(crate) fn chunks_layout(
        &self,
        is_controlled: bool,
        behind: BehindChunks,
    ) -> &wgpu::BindGroupLayout {
        &self.inner.chunks_layouts[usize::from(is_controlled)][behind as usize]
    }

    /// Whether the device binds enough storage buffers for kernels in chunks.
    pub(crate) const fn can_chunk(&self) -> bool {
        self.limits.max_storage_buffers >= 5
    }

    /// Makes sure that the device binds as many storage buffers as a kernel wants.
    pub(crate) fn check_storage_buffers(&self, required: usize) -> Result<(), KernelError> {
        let actual = self.device().limits().max_storage_buffers_per_shader_stage;
        match required <= actual as usize {
            true => Ok(()),
            false => Err(KernelError::LimitTooLow {
                limit: "max_storage_buffers_per_shader_stage",
                required: required as u64,
                actual: actual.into(),
            }),
        }
    }

    /// Whether one is a clone of the other. Devices of two instances cannot be told apart.
    pub(crate) fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.inner, &other.inner)
    }

    /// A pipeline of a control's and the layout of what it binds, and behind that, where it takes some, scalars; compiled
    /// at the first call.
    pub(crate) fn of_control(
        &self,
        entry_point: &'static str,
        source: String,
        bindings: &[BindingKind],
        scalars_bytes: u32,
    ) -> Result<(wgpu::ComputePipeline, wgpu::BindGroupLayout), KernelError> {
        let inner = &self.inner;
        let compiled = &mut *inner.compiled();
        let key = (entry_point, source);
        if let Some(built) = compiled.of_control.get(&key) {
            return Ok(built.clone());
        }
        let label = format!("wgpu_optim.{entry_point}");
        let built = checked(&inner.device, || {
            inner.compile_of_control(&label, &key, bindings, scalars_bytes)
        });
        let built = built.map_err(|error| KernelError::Device {
            kernel: label,
            message: error.to_string(),
        })?;
        compiled.of_control.insert(key, built.clone());
        Ok(built)
    }

    /// The pipeline of a variant and the layout of what it binds; compiled at the first call, shared afterwards.
    pub(crate) fn pipeline(
        &self,
        variant: KernelVariant,
    ) -> Result<(wgpu::ComputePipeline, wgpu::BindGroupLayout), KernelError> {
        let inner = &self.inner;
        let compiled = &mut *inner.compiled();
        checked(&inner.device, || inner.compile(compiled, &variant)).map_err(|error| {
            // Whatever was built with it may be invalid.
            *compiled = Compiled::default();
            KernelError::Device {
                kernel: variant.label(),
                message: error.to_string(),
            }
        })
    }
}

impl Inner {
    fn compiled(&self) -> MutexGuard<'_, Compiled> {
        self.compiled.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn compile(
        &self,
        compiled: &mut Compiled,
        variant: &KernelVariant,
    ) -> (wgpu::ComputePipeline, wgpu::BindGroupLayout) {
        let Self { device, path, .. } = self;
        let label = variant.label();
        let bindings = Bindings {
            tensors: variant.tensors(),
            has_state: variant.has_state(),
            in_one_buffer: variant.is_in_one_buffer(),
        };
        let layout = compiled
            .layouts
            .entry(bindings)
            .or_insert_with(|| tensors_layout(device, bindings));
        if let Some(pipeline) = compiled.pipelines.get(variant) {
            return (pipeline.clone(), layout.clone());
        }
        let source = variant.source(*path);
        let module = compiled.modules.entry(source).or_insert_with_key(|source| {
            device.create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some(&label),
                source: wgpu::ShaderSource::Wgsl(source.into()),
            })
        });
        let control = match (variant.is_chunked(), variant.is_controlled()) {
            (true, is_controlled) => {
                let behind = BehindChunks::of(variant);
                Some(&self.chunks_layouts[usize::from(is_controlled)][behind as usize])
            }
            (false, is_controlled) => is_controlled.then_some(&self.control_layout),
        };
        let groups = [Some(&*layout), self.scalars_layout.as_ref(), control];
        let groups: Vec<_> = groups.into_iter().flatten().map(Some).collect();
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(&label),
            bind_group_layouts: &groups,
            immediate_size: match path {
                ScalarPath::Immediates => Uniforms::bytes(variant.scalars(), variant.is_wide()),
                ScalarPath::Uniforms => 0,
            },
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&label),
            layout: Some(&pipeline_layout),
            module,
            entry_point: Some(&variant.entry_point()),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &variant.constants(),
                ..Default::default()
            },
            cache: None,
        });
        compiled.pipelines.insert(variant.clone(), pipeline.clone());
        (pipeline, layout.clone())
    }

    fn compile_of_control(
        &self,
        label: &str,
        (entry_point, source): &(&'static str, String),
        bindings: &[BindingKind],
        scalars_bytes: u32,
    ) -> (wgpu::ComputePipeline, wgpu::BindGroupLayout) {
        let device = &self.device;
        let entry = |(binding, kind): (u32, &BindingKind)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: kind.ty(),
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        };
        let entries: Vec<_> = (0..).zip(bindings).map(entry).collect();
        let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(label),
            entries: &entries,
        });
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some(label),
            source: wgpu::ShaderSource::Wgsl(source.into()),
        });
        let scalars = self.scalars_layout.as_ref().filter(|_| scalars_bytes > 0);
        let groups: Vec<_> = [Some(&layout), scalars]
            .into_iter()
            .flatten()
            .map(Some)
            .collect();
        let pipeline_layout = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(label),
            bind_group_layouts: &groups,
            immediate_size: match self.path {
                ScalarPath::Immediates => scalars_bytes,
                ScalarPath::Uniforms => 0,
            },
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(label),
            layout: Some(&pipeline_layout),
            module: &module,
            entry_point: Some(entry_point),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        (pipeline, layout)
    }
}

/// A control's blocks if there is one, a table of chunks, and what lies behind it.
fn chunks_layout(
    device: &wgpu::Device,
    is_controlled: bool,
    behind: BehindChunks,
) -> wgpu::BindGroupLayout {
    let blocks = is_controlled.then_some((0, BindingKind::Read));
    let behind = match behind {
        BehindChunks::Nothing => None,
        BehindChunks::Partials => Some((2, BindingKind::ReadWrite)),
        BehindChunks::Totals => Some((2, BindingKind::Read)),
    };
    let bindings = blocks.into_iter().chain([(1, BindingKind::Read)]);
    let entries: Vec<_> = bindings
        .chain(behind)
        .map(|(binding, kind)| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: kind.ty(),
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        })
        .collect();
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some("wgpu_optim.chunks"),
        entries: &entries,
    })
}

/// All parameters, then all gradients, then all states.
fn tensors_layout(device: &wgpu::Device, bindings: Bindings) -> wgpu::BindGroupLayout {
    let Bindings {
        tensors,
        has_state,
        in_one_buffer,
    } = bindings;
    let storage = |binding: u32, read_only: bool| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage { read_only },
            has_dynamic_offset: false,
            // Vec4 and scalar entry points share the layout, and their minimum sizes differ.
            min_binding_size: None,
        },
        count: None,
    };
    let arrays = if has_state { 3 } else { 2 };
    let bindings = 0..(arrays * tensors) as u32;
    let grads = tensors as u32..2 * tensors as u32;
    let entries: Vec<_> = bindings
        .map(|binding| storage(binding, grads.contains(&binding) && !in_one_buffer))
        .collect();
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some("wgpu_optim.tensors"),
        entries: &entries,
    })
}

/// The layout of a uniform buffer whose slots are bound by dynamic offset.
fn dynamic_uniform_layout(
    device: &wgpu::Device,
    label: &str,
    min_bytes: u32,
) -> wgpu::BindGroupLayout {
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some(label),
        entries: &[wgpu::BindGroupLayoutEntry {
            binding: 0,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Uniform,
                has_dynamic_offset: true,
                min_binding_size: wgpu::BufferSize::new(min_bytes.into()),
            },
            count: None,
        }],
    })
}

fn check_limits(limits: &wgpu::Limits) -> Result<(), KernelError> {
    for (limit, actual, required) in [
        (
            "max_storage_buffers_per_shader_stage",
            limits.max_storage_buffers_per_shader_stage,
            3,
        ),
        (
            "max_compute_invocations_per_workgroup",
            limits.max_compute_invocations_per_workgroup,
            WORKGROUP_SIZE,
        ),
        (
            "max_compute_workgroup_size_x",
            limits.max_compute_workgroup_size_x,
            WORKGROUP_SIZE,
        ),
    ] {
        if actual < required {
            return Err(KernelError::LimitTooLow {
                limit,
                required: required.into(),
                actual: actual.into(),
            });
        }
    }
    Ok(())
}
