//! Shader modules, explicit layouts and pipelines: built once per device, shared by its optimizers.

use std::borrow::Cow;
use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};

use super::error::KernelError;
use super::error_scope::{LOST, checked, is_lost};
use super::scalars::{ScalarPath, SgdUniforms};
use crate::plan::{Access, BATCH_WORKGROUP_SIZE, DeviceLimits, WORKGROUP_SIZE};
use crate::rules::sgd::Terms;

/// Bind group of params, grads and velocity; `@group(0)` in the shaders.
pub(crate) const TENSORS_GROUP: u32 = 0;
/// Bind group of the scalars on the uniform path; `@group(1)` in the shaders.
pub(crate) const SCALARS_GROUP: u32 = 1;

/// The complete WGSL source for a road of the scalars.
const fn source(path: ScalarPath) -> &'static str {
    match path {
        ScalarPath::Immediates => concat!(
            include_str!("../../shaders/scalars_immediate.wgsl"),
            include_str!("../../shaders/sgd.wgsl")
        ),
        ScalarPath::Uniforms => concat!(
            include_str!("../../shaders/scalars_uniform.wgsl"),
            include_str!("../../shaders/sgd.wgsl")
        ),
    }
}

/// The complete WGSL source for batches of so many tensors.
fn batch_source(path: ScalarPath, access: Access, tensors: usize) -> String {
    let unit = match access {
        Access::Vec4 | Access::Vec4Offset => include_str!("../../shaders/unit_vec4.wgsl"),
        Access::Scalar => include_str!("../../shaders/unit_scalar.wgsl"),
    };
    let mut wgsl = format!("{}{unit}const BATCH = {tensors};\n", source(path));
    for tensor in 0..tensors {
        let number = tensor.to_string();
        wgsl += &include_str!("../../shaders/sgd_batch.wgsl").replace("TENSOR", &number);
    }
    for rule in ["sgd", "sgd_plain"] {
        let calls: String = (0..tensors)
            .map(|tensor| format!("    {rule}_{tensor}(invocation.x);\n"))
            .collect();
        wgsl += &format!(
            "@compute @workgroup_size({BATCH_WORKGROUP_SIZE})\n\
             fn {rule}_batch(@builtin(global_invocation_id) invocation: vec3<u32>) {{\n{calls}}}\n"
        );
    }
    wgsl
}

/// One compiled variant of the shader: what [`Kernels`] hands to wgpu, for tools that compile or inspect the WGSL
/// themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct KernelVariant {
    /// The terms that are compiled in.
    pub terms: Terms,
    /// How it reaches its elements.
    pub access: Access,
    /// How many tensors it updates, each with bindings of its own, in the order of all parameters, all gradients, all
    /// velocities: more than one in a batch.
    pub tensors: usize,
}

impl KernelVariant {
    /// The complete WGSL source for a road of the scalars.
    #[must_use]
    pub fn source(self, path: ScalarPath) -> Cow<'static, str> {
        if self.tensors > 1 {
            batch_source(path, self.access, self.tensors).into()
        } else {
            source(path).into()
        }
    }

    /// The entry point.
    #[must_use]
    pub fn entry_point(self) -> &'static str {
        let label = self.label();
        label.strip_prefix("wgpu_optim.").unwrap_or(label)
    }

    /// The pipeline's label.
    #[must_use]
    pub const fn label(self) -> &'static str {
        let is_batch = self.tensors > 1;
        match (self.terms.velocity, is_batch, self.access) {
            (true, true, _) => "wgpu_optim.sgd_batch",
            (true, false, Access::Vec4 | Access::Vec4Offset) => "wgpu_optim.sgd",
            (true, false, Access::Scalar) => "wgpu_optim.sgd_scalar",
            (false, true, _) => "wgpu_optim.sgd_plain_batch",
            (false, false, Access::Vec4 | Access::Vec4Offset) => "wgpu_optim.sgd_plain",
            (false, false, Access::Scalar) => "wgpu_optim.sgd_plain_scalar",
        }
    }

    /// Values of the shader's `override`s.
    #[must_use]
    pub fn constants(self) -> [(&'static str, f64); 5] {
        let flag = |present: bool| if present { 1.0 } else { 0.0 };
        [
            ("HAS_C", flag(self.terms.c)),
            ("HAS_LAMBDA", flag(self.terms.lambda)),
            ("HAS_B", flag(self.terms.b)),
            ("HAS_RHO", flag(self.terms.rho)),
            ("HAS_OFFSET", flag(self.access == Access::Vec4Offset)),
        ]
    }
}

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
    module: wgpu::ShaderModule,
    scalars_layout: Option<wgpu::BindGroupLayout>,
    momentum: Layouts,
    plain: Layouts,
    pipelines: Mutex<HashMap<KernelVariant, wgpu::ComputePipeline>>,
}

#[derive(Debug)]
struct Layouts {
    tensors: wgpu::BindGroupLayout,
    pipeline: wgpu::PipelineLayout,
}

impl Kernels {
    /// Prepares the kernels for `device` and its `queue`, with the scalars on the best road that the device
    /// offers. Submits nothing.
    ///
    /// # Errors
    /// [`KernelError`] if a limit of the device is below what the kernels need, or the device refuses the
    /// shader or its layouts.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue) -> Result<Self, KernelError> {
        check_limits(&device.limits())?;
        if is_lost(device) {
            return Err(KernelError::Device {
                kernel: "wgpu_optim.sgd",
                message: LOST.to_owned(),
            });
        }
        let path = ScalarPath::of(device);
        let inner = checked(device, || {
            let scalars_layout = match path {
                ScalarPath::Immediates => None,
                ScalarPath::Uniforms => Some(scalars_layout(device)),
            };
            Inner {
                device: device.clone(),
                queue: queue.clone(),
                path,
                module: device.create_shader_module(wgpu::ShaderModuleDescriptor {
                    label: Some("wgpu_optim.sgd"),
                    source: wgpu::ShaderSource::Wgsl(source(path).into()),
                }),
                momentum: Layouts::new(device, true, 1, scalars_layout.as_ref()),
                plain: Layouts::new(device, false, 1, scalars_layout.as_ref()),
                scalars_layout,
                pipelines: Mutex::default(),
            }
        })
        .map_err(|error| KernelError::Device {
            kernel: "wgpu_optim.sgd",
            message: error.to_string(),
        })?;
        Ok(Self {
            inner: Arc::new(inner),
            limits: DeviceLimits::of(&device.limits(), device.adapter_info().device_type),
        })
    }

    /// The same kernels with another ceiling on the elements of a dispatch, for optimizers built from now on; eight at
    /// least. By default 2^26 on software and integrated adapters, so that no watchdog takes a long dispatch for a
    /// hang, and none on others.
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

    /// What optimizers are planned with.
    #[must_use]
    pub fn device_limits(&self) -> &DeviceLimits {
        &self.limits
    }

    /// The device that these kernels were built for.
    #[must_use]
    pub fn device(&self) -> &wgpu::Device {
        &self.inner.device
    }

    /// Its queue.
    #[must_use]
    pub fn queue(&self) -> &wgpu::Queue {
        &self.inner.queue
    }

    /// The road that the scalars of a step take on this device.
    #[must_use]
    pub fn scalar_path(&self) -> ScalarPath {
        self.inner.path
    }

    pub(crate) fn scalars_layout(&self) -> Option<&wgpu::BindGroupLayout> {
        self.inner.scalars_layout.as_ref()
    }

    pub(crate) fn tensors_layout(&self, velocity: bool) -> &wgpu::BindGroupLayout {
        &self.inner.layouts(velocity).tensors
    }

    /// The pipeline for a config's terms over so many tensors, each with bindings of its own, in the order of all
    /// parameters, all gradients, all velocities; compiled at the first call, shared afterwards.
    pub(crate) fn pipeline(
        &self,
        terms: Terms,
        access: Access,
        tensors: usize,
    ) -> Result<wgpu::ComputePipeline, KernelError> {
        let variant = KernelVariant {
            terms,
            access,
            tensors,
        };
        let inner = &self.inner;
        let mut pipelines = inner
            .pipelines
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        if let Some(pipeline) = pipelines.get(&variant) {
            return Ok(pipeline.clone());
        }
        let pipeline = checked(&inner.device, || match tensors {
            0..=1 => inner.compile(
                variant,
                &inner.layouts(terms.velocity).pipeline,
                &inner.module,
            ),
            _ => inner.compile_batch(variant),
        })
        .map_err(|error| KernelError::Device {
            kernel: variant.label(),
            message: error.to_string(),
        })?;
        pipelines.insert(variant, pipeline.clone());
        Ok(pipeline)
    }
}

impl Inner {
    fn layouts(&self, velocity: bool) -> &Layouts {
        if velocity {
            &self.momentum
        } else {
            &self.plain
        }
    }

    fn compile(
        &self,
        variant: KernelVariant,
        layout: &wgpu::PipelineLayout,
        module: &wgpu::ShaderModule,
    ) -> wgpu::ComputePipeline {
        let descriptor = wgpu::ComputePipelineDescriptor {
            label: Some(variant.label()),
            layout: Some(layout),
            module,
            entry_point: Some(variant.entry_point()),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &variant.constants(),
                ..Default::default()
            },
            cache: None,
        };
        self.device.create_compute_pipeline(&descriptor)
    }

    fn compile_batch(&self, variant: KernelVariant) -> wgpu::ComputePipeline {
        let KernelVariant { terms, tensors, .. } = variant;
        let scalars = self.scalars_layout.as_ref();
        let layouts = Layouts::new(&self.device, terms.velocity, tensors, scalars);
        let module = self
            .device
            .create_shader_module(wgpu::ShaderModuleDescriptor {
                label: Some(variant.label()),
                source: wgpu::ShaderSource::Wgsl(variant.source(self.path)),
            });
        self.compile(variant, &layouts.pipeline, &module)
    }
}

impl Layouts {
    fn new(
        device: &wgpu::Device,
        velocity: bool,
        tensors: usize,
        scalars: Option<&wgpu::BindGroupLayout>,
    ) -> Self {
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
        let arrays = if velocity { 3 } else { 2 };
        let bindings = 0..(arrays * tensors) as u32;
        let grads = tensors as u32..2 * tensors as u32;
        let entries: Vec<_> = bindings
            .map(|binding| storage(binding, grads.contains(&binding)))
            .collect();
        let label = if velocity {
            "wgpu_optim.sgd"
        } else {
            "wgpu_optim.sgd_plain"
        };
        let tensors = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: Some(label),
            entries: &entries,
        });
        let groups = [Some(&tensors), scalars];
        let pipeline = device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
            label: Some(label),
            bind_group_layouts: if scalars.is_some() {
                &groups
            } else {
                &groups[..1]
            },
            immediate_size: if scalars.is_some() {
                0
            } else {
                SgdUniforms::BYTES
            },
        });
        Self { tensors, pipeline }
    }
}

fn scalars_layout(device: &wgpu::Device) -> wgpu::BindGroupLayout {
    device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: Some("wgpu_optim.uniforms"),
        entries: &[wgpu::BindGroupLayoutEntry {
            binding: 0,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Uniform,
                has_dynamic_offset: true,
                min_binding_size: wgpu::BufferSize::new(SgdUniforms::BYTES.into()),
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

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::mem::offset_of;

    use naga::back::PipelineConstants;
    use naga::back::pipeline_constants::process_overrides;
    use naga::valid::{Capabilities, ValidationFlags, Validator};

    use super::*;
    use crate::plan::MAX_BATCH_PIECES;

    fn parse(path: ScalarPath, wgsl: &str) -> (naga::Module, naga::valid::ModuleInfo) {
        let module = naga::front::wgsl::parse_str(wgsl)
            .unwrap_or_else(|error| unreachable!("{}", error.emit_to_string(wgsl)));
        // What a device has with and without Features::IMMEDIATES.
        let capabilities = match path {
            ScalarPath::Immediates => Capabilities::IMMEDIATES,
            ScalarPath::Uniforms => Capabilities::empty(),
        };
        let info = Validator::new(ValidationFlags::all(), capabilities)
            .validate(&module)
            .unwrap();
        (module, info)
    }

    const PATHS: [ScalarPath; 2] = [ScalarPath::Immediates, ScalarPath::Uniforms];

    #[test]
    fn every_variant_that_the_host_can_ask_for_is_valid() {
        let check = |(module, info): &(naga::Module, _), access, tensors| {
            for terms in Terms::all() {
                let variant = KernelVariant {
                    terms,
                    access,
                    tensors,
                };
                let constants: PipelineConstants = variant
                    .constants()
                    .into_iter()
                    .map(|(name, value)| (name.to_owned(), value))
                    .collect();
                let entry_point = Some((naga::ShaderStage::Compute, variant.entry_point()));
                // Resolves the overrides and validates what comes out.
                process_overrides(module, info, entry_point, &constants).unwrap();
                assert_eq!(
                    variant.label(),
                    format!("wgpu_optim.{}", variant.entry_point())
                );
            }
        };
        for path in PATHS {
            let alone = parse(path, source(path));
            for access in Access::ALL {
                check(&alone, access, 1);
            }
            for tensors in 2..=MAX_BATCH_PIECES as usize {
                for access in [Access::Vec4, Access::Scalar] {
                    let batch = parse(path, &batch_source(path, access, tensors));
                    check(&batch, access, tensors);
                }
            }
        }
    }

    /// Bytes that one invocation moves between the tensor bindings and itself.
    fn bytes_moved(variant: KernelVariant, path: ScalarPath) -> u64 {
        let (module, info) = parse(path, &variant.source(path));
        let constants: PipelineConstants = variant
            .constants()
            .into_iter()
            .map(|(name, value)| (name.to_owned(), value))
            .collect();
        let entry_point = Some((naga::ShaderStage::Compute, variant.entry_point()));
        // What comes out has this entry point alone.
        let (module, info) = process_overrides(&module, &info, entry_point, &constants).unwrap();
        let walk = Walk {
            module: &module,
            info: &info,
        };
        let function = &module.entry_points[0].function;
        walk.block(&function.body, function, info.get_entry_point(0))
    }

    /// Adds up loads from storage buffers and stores to them.
    struct Walk<'a> {
        module: &'a naga::Module,
        info: &'a naga::valid::ModuleInfo,
    }

    impl Walk<'_> {
        fn block(
            &self,
            block: &naga::Block,
            function: &naga::Function,
            info: &naga::valid::FunctionInfo,
        ) -> u64 {
            use naga::{Expression, Statement};
            let nested = |block| self.block(block, function, info);
            block
                .iter()
                .map(|statement| match *statement {
                    Statement::Emit(ref range) => range
                        .clone()
                        .map(|handle| match function.expressions[handle] {
                            Expression::Load { pointer } => self.bytes(pointer, info),
                            _ => 0,
                        })
                        .sum(),
                    Statement::Store { pointer, .. } => self.bytes(pointer, info),
                    Statement::Call { function, .. } => {
                        let callee = &self.module.functions[function];
                        self.block(&callee.body, callee, &self.info[function])
                    }
                    Statement::Block(ref block) => nested(block),
                    // The dearer way.
                    Statement::If {
                        ref accept,
                        ref reject,
                        ..
                    } => nested(accept).max(nested(reject)),
                    Statement::Return { .. } => 0,
                    ref other => unreachable!("nobody counts the bytes of {other:?}"),
                })
                .sum()
        }

        /// Size of what a pointer points to, if that is in a storage buffer.
        fn bytes(
            &self,
            pointer: naga::Handle<naga::Expression>,
            info: &naga::valid::FunctionInfo,
        ) -> u64 {
            use naga::{AddressSpace, TypeInner};
            let bytes = match *info[pointer].ty.inner_with(&self.module.types) {
                TypeInner::Pointer {
                    base,
                    space: AddressSpace::Storage { .. },
                } => self.module.types[base].inner.size(self.module.to_ctx()),
                TypeInner::ValuePointer {
                    size,
                    scalar,
                    space: AddressSpace::Storage { .. },
                } => size.map_or(1, |size| size as u32) * u32::from(scalar.width),
                _ => 0,
            };
            bytes.into()
        }
    }

    #[test]
    fn the_bytes_per_element_are_those_that_the_shader_moves() {
        let check = |path, terms: Terms, access: Access, tensors| {
            let variant = KernelVariant {
                terms,
                access,
                tensors,
            };
            assert_eq!(
                bytes_moved(variant, path),
                terms.bytes_per_elem() * u64::from(access.unit_elems()) * tensors as u64,
                "{path:?} {variant:?}"
            );
        };
        for path in PATHS {
            for terms in Terms::all() {
                for access in Access::ALL {
                    check(path, terms, access, 1);
                }
                for access in [Access::Vec4, Access::Scalar] {
                    check(path, terms, access, MAX_BATCH_PIECES as usize);
                }
            }
        }
    }

    #[test]
    fn every_override_is_one_that_the_host_sets() {
        let (module, _) = parse(ScalarPath::Uniforms, source(ScalarPath::Uniforms));
        let mut names: Vec<_> = module
            .overrides
            .iter()
            .map(|(_, value)| value.name.as_deref().unwrap())
            .collect();
        names.sort_unstable();
        let terms = Terms::all().next().unwrap();
        let mut set = KernelVariant {
            terms,
            access: Access::Vec4,
            tensors: 1,
        }
        .constants()
        .map(|(name, _)| name);
        set.sort_unstable();
        assert_eq!(names, set);
    }

    #[test]
    fn the_workgroup_is_as_large_as_the_planner_thinks() {
        // Those of sgd.wgsl come with the batches.
        let batch = batch_source(ScalarPath::Uniforms, Access::Vec4, 2);
        let (module, _) = parse(ScalarPath::Uniforms, &batch);
        assert_eq!(module.entry_points.len(), 6);
        for entry_point in &module.entry_points {
            let expected = if entry_point.name.ends_with("batch") {
                BATCH_WORKGROUP_SIZE
            } else {
                WORKGROUP_SIZE
            };
            assert_eq!(entry_point.workgroup_size, [expected, 1, 1]);
        }
    }

    #[test]
    fn the_uniforms_lie_in_rust_as_in_wgsl() {
        macro_rules! offsets {
            ($($field:ident),*) => {
                [$((stringify!($field), offset_of!(SgdUniforms, $field) as u32)),*]
            };
        }
        let ours = offsets!(
            lambda,
            alpha,
            c,
            a,
            b,
            rho,
            first,
            grads_shift,
            count,
            row,
            head,
            gap,
            tensor_mask
        );
        for path in PATHS {
            let (module, _) = parse(path, source(path));
            let (_, wgsl) = module
                .types
                .iter()
                .find(|(_, ty)| ty.name.as_deref() == Some("SgdUniforms"))
                .unwrap();
            let naga::TypeInner::Struct { members, span } = &wgsl.inner else {
                unreachable!("SgdUniforms is a struct")
            };
            let theirs: Vec<_> = members
                .iter()
                .map(|member| (member.name.as_deref().unwrap(), member.offset))
                .collect();
            assert_eq!(theirs, ours);
            assert_eq!(*span, SgdUniforms::BYTES);
        }
    }
}
