//! The yardstick: a plain copy kernel with the access pattern of the momentum step, over buffers of its own.

use anyhow::{Result, ensure};
use wgpu_optim::plan::{Access, DeviceLimits, Plan, Target, TensorLayout};
use wgpu_optim::{readback, wgpu};

pub struct CopyKernel {
    pipeline: wgpu::ComputePipeline,
    /// Bindings, uniforms and grid of each dispatch.
    dispatches: Vec<(wgpu::BindGroup, wgpu::BindGroup, [u32; 2])>,
}

impl CopyKernel {
    /// Copies `data` around; its length is a multiple of four.
    pub fn new(device: &wgpu::Device, queue: &wgpu::Queue, data: &[f32]) -> Result<Self> {
        ensure!(
            data.len().is_multiple_of(4),
            "the copy kernel moves four elements at a time"
        );
        let upload = || readback::storage_buffer(device, queue, "wgpu_optim.copy", data);
        let buffers = [upload()?, upload()?, upload()?];
        let layout = TensorLayout {
            numel: data.len() as u64,
            ..TensorLayout::default()
        };
        let plan = Plan::new(&[layout], &DeviceLimits::from(&device.limits()))?;

        let module = device.create_shader_module(wgpu::include_wgsl!("../shaders/copy.wgsl"));
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some("wgpu_optim.copy"),
            layout: None,
            module: &module,
            entry_point: Some("copy"),
            compilation_options: wgpu::PipelineCompilationOptions::default(),
            cache: None,
        });
        let bind = |group: u32, entries: &[wgpu::BindGroupEntry<'_>]| {
            device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: Some("wgpu_optim.copy"),
                layout: &pipeline.get_bind_group_layout(group),
                entries,
            })
        };
        let dispatches = plan
            .dispatches(|_| Some(()))
            .into_iter()
            .filter(|(dispatch, ())| dispatch.access == Access::Vec4)
            .filter_map(|(dispatch, ())| match dispatch.target {
                Target::Piece(piece) => Some((dispatch, &plan.pieces[piece])),
                Target::Batch { .. } => None,
            })
            .map(|(dispatch, piece)| {
                let entry = |binding: u32, buffer| wgpu::BindGroupEntry {
                    binding,
                    resource: wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                        buffer,
                        offset: piece.params.offset_bytes,
                        size: wgpu::BufferSize::new(piece.params.size_bytes),
                    }),
                };
                let tensors = bind(
                    0,
                    &[
                        entry(0, &buffers[0]),
                        entry(1, &buffers[1]),
                        entry(2, &buffers[2]),
                    ],
                );
                let uniforms = device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("wgpu_optim.copy"),
                    size: 12,
                    usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
                    mapped_at_creation: false,
                });
                let scalars = [dispatch.count, dispatch.row(), 0];
                queue.write_buffer(&uniforms, 0, bytemuck::cast_slice(&scalars));
                let scalars = bind(
                    1,
                    &[wgpu::BindGroupEntry {
                        binding: 0,
                        resource: uniforms.as_entire_binding(),
                    }],
                );
                (tensors, scalars, dispatch.workgroups)
            })
            .collect();
        Ok(Self {
            pipeline,
            dispatches,
        })
    }

    /// Records one copy.
    pub fn record(&self, encoder: &mut wgpu::CommandEncoder) {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("wgpu_optim.copy"),
            timestamp_writes: None,
        });
        pass.set_pipeline(&self.pipeline);
        for (tensors, scalars, [x, y]) in &self.dispatches {
            pass.set_bind_group(0, tensors, &[]);
            pass.set_bind_group(1, scalars, &[]);
            pass.dispatch_workgroups(*x, *y, 1);
        }
    }
}
