//! WGSL -> SPIR-V, as wgpu-hal 30 hands it to a Vulkan driver (`vulkan/adapter.rs` and `vulkan/device.rs` there).

use anyhow::{Context as _, Result, anyhow};
use naga::back::pipeline_constants::process_overrides;
use naga::back::spv;
use naga::proc::{BoundsCheckPolicies, BoundsCheckPolicy};
use naga::valid::{Capabilities, ValidationFlags, Validator};
use naga::{AddressSpace, ResourceBinding, ShaderStage};

use crate::kernels::Kernel;

/// Whether a binding is a uniform buffer, bound by dynamic offset.
type IsUniform = bool;

pub struct Spirv {
    pub words: Vec<u32>,
    /// The bindings of each group, by number; those that are no uniform buffers are storage buffers.
    pub groups: Vec<Vec<(u32, IsUniform)>>,
    /// Bytes of immediates.
    pub immediate_bytes: u32,
}

impl Spirv {
    /// `robust_buffer_access2` says whether the driver checks bounds itself.
    pub fn new(kernel: &Kernel, robust_buffer_access2: bool) -> Result<Self> {
        let module = naga::front::wgsl::parse_str(&kernel.wgsl)
            .map_err(|error| anyhow!(error.emit_to_string(&kernel.wgsl)))?;
        let info = Validator::new(ValidationFlags::all(), Capabilities::IMMEDIATES)
            .validate(&module)
            .context(kernel.name.clone())?;
        let constants = kernel.constants.iter().cloned().collect();
        let entry_point = Some((ShaderStage::Compute, kernel.entry_point.as_str()));
        let (module, info) = process_overrides(&module, &info, entry_point, &constants)?;

        let mut spirv = Self {
            words: Vec::new(),
            groups: Vec::new(),
            immediate_bytes: 0,
        };
        let mut options = options(kernel.bounds_checks, robust_buffer_access2);
        // Overrides leave the module with this entry point alone.
        let used = info.get_entry_point(0);
        for (handle, global) in module.global_variables.iter() {
            if used[handle].is_empty() {
                continue;
            }
            if global.space == AddressSpace::Immediate {
                spirv.immediate_bytes = module.types[global.ty].inner.size(module.to_ctx());
            }
            if let Some(ResourceBinding { group, binding }) = global.binding {
                let groups = spirv.groups.len().max(group as usize + 1);
                spirv.groups.resize(groups, Vec::new());
                let is_uniform = global.space == AddressSpace::Uniform;
                spirv.groups[group as usize].push((binding, is_uniform));
                let info = spv::BindingInfo {
                    descriptor_set: group,
                    binding,
                    binding_array_size: None,
                };
                options
                    .binding_map
                    .insert(ResourceBinding { group, binding }, info);
            }
        }
        let pipeline = spv::PipelineOptions {
            shader_stage: ShaderStage::Compute,
            entry_point: kernel.entry_point.clone(),
        };
        spirv.words = spv::write_vec(&module, &info, &options, Some(&pipeline))?;
        Ok(spirv)
    }
}

fn options(bounds_checks: bool, robust_buffer_access2: bool) -> spv::Options<'static> {
    let checked = |in_shader: bool| {
        if bounds_checks && in_shader {
            BoundsCheckPolicy::Restrict
        } else {
            BoundsCheckPolicy::Unchecked
        }
    };
    spv::Options {
        // Vulkan 1.3.
        lang_version: (1, 6),
        // Without InstanceFlags::DEBUG: release builds.
        flags: spv::WriterFlags::LABEL_VARYINGS | spv::WriterFlags::FORCE_POINT_SIZE,
        bounds_check_policies: BoundsCheckPolicies {
            index: checked(true),
            buffer: checked(!robust_buffer_access2),
            image_load: checked(true),
            binding_array: BoundsCheckPolicy::Unchecked,
        },
        zero_initialize_workgroup_memory: spv::ZeroInitializeWorkgroupMemoryMode::Native,
        ..spv::Options::default()
    }
}
