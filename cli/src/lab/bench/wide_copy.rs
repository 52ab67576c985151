//! The roof of a step where something is stored in 16 bits: a kernel that moves the same bytes, eight elements per
//! invocation, loads before stores.

use std::fmt::Write as _;

use anyhow::{Result, bail};
use wgpu_optim::plan::{Access, Plan, Target};
use wgpu_optim::storage::{Codec, Storage};
use wgpu_optim::{Arena, Masters, Rule as _, TensorSpec, wgpu};

use super::timing::GpuWork;
use crate::Failure;
use crate::backend::OpenGpu;
use crate::lab::problem::Problem;

const NAME: &str = "wgpu_optim.bench.wide_copy";

/// Vec4 that eight values fill.
fn vec4s(of: impl Into<Codec>) -> u32 {
    of.into().elem_bytes() as u32 / 2
}

/// The kernel for a storage.
fn source(storage: &Storage) -> String {
    // Of every array the vec4s of a unit: where each is.
    let unit_of = |array: &str, base: u32, vec4s: u32| -> Vec<String> {
        let at = |vec4| match base {
            0 => format!("{array}[{vec4s}u * unit + {vec4}u]"),
            base => format!("{array}[{base}u * k.section + {vec4s}u * unit + {vec4}u]"),
        };
        (0..vec4s).map(at).collect()
    };
    let grads = unit_of("grads", 0, vec4s(storage.grads));
    let params = unit_of("params", 0, vec4s(storage.params));
    let mut state = Vec::new();
    for codec in &*storage.state {
        // As many lie before it for each unit.
        state.extend(unit_of("state", state.len() as u32, vec4s(*codec)));
    }
    let reads_params = storage.masters != Masters::F32;
    let mut body = String::new();
    let arrays = [
        ("g", &grads, true),
        ("p", &params, reads_params),
        ("s", &state, true),
    ];
    for (name, places, _) in arrays.iter().filter(|(.., reads)| *reads) {
        for (index, place) in places.iter().enumerate() {
            // Writing to a string cannot fail.
            let _ = writeln!(body, "    let {name}{index} = {place};");
        }
    }
    for (name, places, reads) in &arrays[1..] {
        for (index, place) in places.iter().enumerate() {
            let value = match reads {
                true => format!("{name}{index}"),
                false => format!("s{}", state.len() - 1 - index),
            };
            let grad = index % grads.len();
            let _ = writeln!(body, "    {place} = {value} ^ (g{grad} & vec4(k.mask));");
        }
    }
    format!(
        "struct CopyUniforms {{
    count: u32,
    row: u32,
    section: u32,
    // Zero, but only the host knows, so no compiler can leave out a read.
    mask: u32,
}}

@group(0) @binding(0) var<storage, read_write> params: array<vec4<u32>>;
@group(0) @binding(1) var<storage, read> grads: array<vec4<u32>>;
@group(0) @binding(2) var<storage, read_write> state: array<vec4<u32>>;
@group(1) @binding(0) var<uniform> k: CopyUniforms;

@compute @workgroup_size(256)
fn copy(@builtin(global_invocation_id) invocation: vec3<u32>) {{
    let unit = invocation.y * k.row + invocation.x;
    if unit >= k.count {{
        return;
    }}
{body}}}
"
    )
}

/// One dispatch for each piece of one tensor of as many elements as the problem's.
pub struct WideCopy {
    pipeline: wgpu::ComputePipeline,
    dispatches: Vec<([wgpu::BindGroup; 2], [u32; 2])>,
}

impl WideCopy {
    pub fn new(open: &OpenGpu, problem: &Problem) -> Result<Self> {
        let (device, queue) = (&open.gpu.device, &open.gpu.queue);
        let storage = problem.storage();
        let all = TensorSpec::new("all", [problem.numel().next_multiple_of(8)]);
        let all = all.params_type(storage.params).grads_type(storage.grads);
        let arena = Arena::new(device, queue, [all])?;
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some(NAME),
            source: wgpu::ShaderSource::Wgsl(source(&storage).into()),
        });
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(NAME),
            layout: None,
            module: &module,
            entry_point: Some("copy"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let layouts = arena.layouts(&problem.config().slots(), problem.precision());
        let plan = Plan::new(&layouts, open.kernels.device_limits())?;
        let buffer = |label, size, usage| {
            device.create_buffer(&wgpu::BufferDescriptor {
                label: Some(label),
                size,
                usage,
                mapped_at_creation: false,
            })
        };
        let mut dispatches = Vec::new();
        for (part, ()) in plan.dispatches(|_| Some(())) {
            let (Target::Piece(piece), Access::Vec4) = (part.target, part.access) else {
                bail!("an arena's tensors start with their bindings");
            };
            let piece = &plan.pieces[piece];
            let window = |buffer, window: wgpu_optim::plan::Window| {
                wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                    buffer,
                    offset: window.offset_bytes,
                    size: wgpu::BufferSize::new(window.size_bytes),
                })
            };
            let state = piece
                .state
                .map(|state| buffer(NAME, state.size_bytes(), wgpu::BufferUsages::STORAGE));
            let resources = [
                Some(window(&arena.params()[0], piece.params)),
                Some(window(&arena.grads()[0], piece.grads)),
                state.as_ref().map(wgpu::Buffer::as_entire_binding),
            ];
            let entries: Vec<_> = (0..)
                .zip(resources.into_iter().flatten())
                .map(|(binding, resource)| wgpu::BindGroupEntry { binding, resource })
                .collect();
            let usage = wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST;
            let uniforms = buffer(NAME, 16, usage);
            let scalars = [part.count, part.row(), part.section, 0];
            queue.write_buffer(&uniforms, 0, bytemuck::cast_slice(&scalars));
            let scalars = [wgpu::BindGroupEntry {
                binding: 0,
                resource: uniforms.as_entire_binding(),
            }];
            let bind = |group, entries: &[wgpu::BindGroupEntry<'_>]| {
                device.create_bind_group(&wgpu::BindGroupDescriptor {
                    label: Some(NAME),
                    layout: &pipeline.get_bind_group_layout(group),
                    entries,
                })
            };
            dispatches.push(([bind(0, &entries), bind(1, &scalars)], part.workgroups));
        }
        Ok(Self {
            pipeline,
            dispatches,
        })
    }

    pub fn dispatches(&self) -> usize {
        self.dispatches.len()
    }
}

impl GpuWork for WideCopy {
    fn record(&mut self, pass: &mut wgpu::ComputePass<'_>) -> Result<(), Failure> {
        pass.set_pipeline(&self.pipeline);
        for (groups, [x, y]) in &self.dispatches {
            for (index, group) in (0..).zip(groups) {
                pass.set_bind_group(index, group, &[]);
            }
            pass.dispatch_workgroups(*x, *y, 1);
        }
        Ok(())
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use wgpu_optim::StorageType;

    use super::*;

    /// A vec4 of 16 bytes for each time that the step moves as many.
    #[test]
    fn the_roof_moves_the_bytes_of_the_step() {
        for (params, grads, state) in StorageType::ALL
            .into_iter()
            .flat_map(|p| StorageType::ALL.map(|g| (p, g)))
            .flat_map(|(p, g)| StorageType::ALL.map(|s| (p, g, s)))
        {
            for (masters, slots) in [Masters::None, Masters::F32, Masters::LowBits]
                .into_iter()
                .flat_map(|masters| [0, 1, 2, 4].map(|slots| (masters, slots)))
            {
                let precision = wgpu_optim::Precision {
                    state,
                    masters,
                    ..Default::default()
                };
                let slots = std::iter::repeat_n("slot", slots);
                let storage = Storage::new(params, grads, slots, &precision);
                let source = source(&storage);
                naga::front::wgsl::parse_str(&source).unwrap();
                let body = source.split_once("return;").unwrap().1;
                let accesses = body.matches("* unit +").count() as u64;
                assert_eq!(16 * accesses, 8 * storage.bytes_per_elem());
            }
        }
    }
}
