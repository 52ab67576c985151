//! In the steady state a step allocates what wgpu allocates for the same commands, and nothing of its own.

use allocation_counter::measure;
use wgpu_optim::{AnyRule, GpuOptimizer, Kernels, Optimizer, Rule, SgdConfig, TensorBinding, wgpu};

use super::{Apart, STORAGE, device};

/// Heap allocations of recording by hand, as a step does it, `dispatches` dispatches over so many tensors each.
fn by_hand(device: &wgpu::Device, queue: &wgpu::Queue, dispatches: usize, tensors: u32) -> u64 {
    let entry = |binding| wgpu::BindGroupLayoutEntry {
        binding,
        visibility: wgpu::ShaderStages::COMPUTE,
        ty: wgpu::BindingType::Buffer {
            ty: wgpu::BufferBindingType::Storage {
                read_only: (tensors..2 * tensors).contains(&binding),
            },
            has_dynamic_offset: false,
            min_binding_size: None,
        },
        count: None,
    };
    let entries: Vec<_> = (0..3 * tensors).map(entry).collect();
    let layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
        label: None,
        entries: &entries,
    });
    let source = "struct S { v: array<vec4<f32>, 3> } var<immediate> k: S;
        @group(0) @binding(0) var<storage, read_write> a: array<f32>;
        @compute @workgroup_size(1) fn main() { a[0] = k.v[0].x; }";
    let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
        label: None,
        layout: Some(
            &device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                label: None,
                bind_group_layouts: &[Some(&layout)],
                immediate_size: 52,
            }),
        ),
        module: &device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: None,
            source: wgpu::ShaderSource::Wgsl(source.into()),
        }),
        entry_point: None,
        compilation_options: wgpu::PipelineCompilationOptions::default(),
        cache: None,
    });
    let bind_groups: Vec<_> = (0..dispatches)
        .map(|_| {
            let buffers: Vec<_> = (0..3 * tensors)
                .map(|_| {
                    device.create_buffer(&wgpu::BufferDescriptor {
                        label: None,
                        size: 4096,
                        usage: STORAGE,
                        mapped_at_creation: false,
                    })
                })
                .collect();
            let entries: Vec<_> = (0..)
                .zip(&buffers)
                .map(|(binding, buffer)| wgpu::BindGroupEntry {
                    binding,
                    resource: buffer.as_entire_binding(),
                })
                .collect();
            device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout: &layout,
                entries: &entries,
            })
        })
        .collect();
    let record = |encoder: &mut wgpu::CommandEncoder| {
        let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor {
            label: Some("wgpu_optim.step"),
            timestamp_writes: None,
        });
        pass.set_pipeline(&pipeline);
        for bind_group in &bind_groups {
            pass.set_bind_group(0, bind_group, &[]);
            pass.set_immediates(0, &[0; 52]);
            pass.dispatch_workgroups(1, 1, 1);
        }
    };
    steady_state(device, queue, record)
}

/// Heap allocations of the last of some recordings.
fn steady_state(
    device: &wgpu::Device,
    queue: &wgpu::Queue,
    mut record: impl FnMut(&mut wgpu::CommandEncoder),
) -> u64 {
    let mut allocations = 0;
    for _ in 0..8 {
        let mut encoder = device.create_command_encoder(&Default::default());
        allocations = measure(|| record(&mut encoder)).count_total;
        queue.submit([encoder.finish()]);
    }
    allocations
}

/// What tells whether the encoder was submitted: what is shared with the encoder, the closure in it, and wgpu's list of
/// these.
const GUARD: u64 = 3;

#[test]
fn a_step_allocates_no_more_than_its_commands_and_a_guard() {
    let limits = wgpu::Limits {
        max_immediate_size: 128,
        ..Default::default()
    };
    let (device, queue) = device(limits, wgpu::Features::IMMEDIATES);
    let kernels = Kernels::new(&device, &queue).unwrap();
    // Alone, and in pairs, which is what eight bindings allow small tensors.
    for (dispatches, together, numel) in
        [(1, 1, 9000), (300, 1, 9000), (5, 2, 1024), (300, 2, 1024)]
    {
        let tensors = dispatches * together as usize;
        let apart = Apart::new(&kernels, tensors, numel);
        let tensors = apart.bindings();
        let theirs = by_hand(&device, &queue, dispatches, together);
        assert!(theirs > 0, "wgpu has been counted");
        let momentum = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
        let presets = AnyRule::presets().filter(|preset| preset.rule != "sgd");
        let presets = presets.map(|preset| preset.config(0.1).unwrap());
        // A rule that takes sums makes more dispatches, and sends its tables.
        let presets = presets.filter(|rule| rule.sums().is_empty());
        for rule in presets.chain([momentum.into()]) {
            let ours = allocations(&kernels, &rule, &tensors, dispatches);
            // A rule without a slot binds less.
            assert!(
                ours <= theirs + GUARD,
                "{rule:?}, {dispatches} dispatches: {ours} allocations, by hand {theirs}"
            );
        }
    }
}

/// Those of a rule's step in the steady state.
fn allocations(
    kernels: &Kernels,
    rule: &AnyRule,
    tensors: &[TensorBinding<'_>],
    dispatches: usize,
) -> u64 {
    let mut optimizer = GpuOptimizer::new(kernels, rule.clone(), tensors).unwrap();
    let ours = steady_state(kernels.device(), kernels.queue(), |encoder| {
        optimizer.set_lr(0.2).unwrap();
        optimizer.step(encoder).unwrap();
    });
    // Three tensors without state share one where two with it do.
    assert!(optimizer.dispatches() <= dispatches);
    ours
}
