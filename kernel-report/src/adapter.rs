//! Times the candidates on this process's wgpu adapter, each beside the copy kernel.

use std::collections::BTreeMap;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};
use statrs::statistics::{Data, OrderStatistics as _};
use wgpu_optim::wgpu::util::DeviceExt as _;
use wgpu_optim::wgsl::ScalarPath;
use wgpu_optim::{AdapterRequest, Gpu, readback, wgpu};

use crate::candidates::{self, Candidate};
use crate::kernels::Kernel;

/// The argument that makes this program answer [`measure`].
pub const CHILD: &str = "adapter-child";

/// Elements of the tensors that are stepped.
pub const NUMELS: [usize; 2] = [1 << 20, 1 << 24];

/// How long each size is measured, unless that is less than [`MIN_ROUNDS`].
const BUDGET: Duration = Duration::from_secs(15);
const MIN_ROUNDS: usize = 7;

/// Elements of the check: whole workgroups of the largest candidate.
const CHECKED_ELEMS: usize = 1 << 16;

/// The measurement of the candidates on one adapter.
#[derive(Debug, Serialize, Deserialize)]
pub struct Measured {
    pub adapter: String,
    pub driver: String,
    /// Rounds for each of [`NUMELS`].
    pub rounds: Vec<usize>,
    /// Milliseconds of the copy kernel for each of [`NUMELS`].
    pub copy_millis: Vec<f64>,
    /// Time of the copy kernel over that of the candidate for each of [`NUMELS`]: medians over the rounds. Without
    /// those that the adapter cannot run.
    pub shares: BTreeMap<String, Vec<f64>>,
}

/// Times the candidates on the best adapter of this machine, or on that of a Vulkan driver, in another process:
/// which drivers there are is decided when the Vulkan loader is loaded.
///
/// `only` is a part of the names of those to time.
pub fn measure(driver_file: Option<&Path>, only: &str) -> Result<Measured> {
    let mut command = Command::new(std::env::current_exe()?);
    command.args([CHILD, only]).stdout(Stdio::piped());
    command.env("NODEVICE_SELECT", "1");
    if let Some(file) = driver_file {
        command.env("VK_DRIVER_FILES", file);
        command.env("VK_ICD_FILENAMES", file);
    }
    let output = command.spawn()?.wait_with_output()?;
    ensure!(output.status.success(), "no adapter was measured");
    Ok(serde_json::from_slice(&output.stdout)?)
}

pub fn run_child(only: &str) -> Result<()> {
    let gpu = Gpu::open_blocking(&AdapterRequest::default())?;
    let info = gpu.adapter.get_info();
    let mut measured = Measured {
        adapter: info.name,
        driver: format!("{} {}", info.driver, info.driver_info),
        rounds: Vec::new(),
        copy_millis: Vec::new(),
        shares: BTreeMap::new(),
    };
    let max_workgroup_size = gpu.device.limits().max_compute_invocations_per_workgroup;
    let candidates: Vec<_> = candidates::containing(only)?
        .into_iter()
        .filter(|candidate| {
            candidate.workgroup_size <= max_workgroup_size
                && (candidate.scalars == ScalarPath::Uniforms
                    || ScalarPath::of(&gpu.device) == ScalarPath::Immediates)
        })
        .collect();
    for candidate in &candidates {
        check(&gpu, candidate).with_context(|| candidate.kernel.name.clone())?;
    }
    for numel in NUMELS {
        time(&gpu, &candidates, numel, &mut measured)?;
    }
    serde_json::to_writer(io::stdout().lock(), &measured)?;
    Ok(())
}

/// The yardstick of `wgpu-optim bench`.
fn copy_kernel() -> Result<Candidate> {
    let kernel = Kernel {
        name: "copy".to_owned(),
        wgsl: include_str!("../../cli/shaders/elementwise.wgsl").to_owned(),
        entry_point: "copy_two".to_owned(),
        constants: Vec::new(),
        bounds_checks: true,
        accesses: [3, 2],
    };
    let module = parse(&kernel.wgsl)?;
    let mut entry_points = module.entry_points.iter();
    let copy = entry_points
        .find(|entry_point| entry_point.name == kernel.entry_point)
        .context("the shader has no copy kernel")?;
    Ok(Candidate {
        workgroup_size: copy.workgroup_size[0],
        kernel,
        scalars: ScalarPath::Uniforms,
        elems_per_invocation: 4,
    })
}

fn parse(wgsl: &str) -> Result<naga::Module> {
    naga::front::wgsl::parse_str(wgsl).map_err(|error| anyhow!(error.emit_to_string(wgsl)))
}

/// Params, grads and velocity, in the order of their bindings.
struct Tensors {
    numel: usize,
    buffers: Vec<wgpu::Buffer>,
}

impl Tensors {
    /// Whole numbers, so that a step by halves and quarters rounds nothing.
    fn values(numel: usize) -> [Vec<f32>; 3] {
        [1021, 251, 509].map(|period| {
            let middle = period / 2;
            (0..numel)
                .map(|index| (index % period) as f32 - middle as f32)
                .collect()
        })
    }

    fn new(gpu: &Gpu, numel: usize) -> Result<Self> {
        let buffers = Self::values(numel)
            .iter()
            .map(|values| readback::storage_buffer(&gpu.device, &gpu.queue, "tensor", values))
            .collect::<Result<_, _>>()?;
        Ok(Self { numel, buffers })
    }
}

/// One step with the candidate comes out exactly as it should.
fn check(gpu: &Gpu, candidate: &Candidate) -> Result<()> {
    let tensors = Tensors::new(gpu, CHECKED_ELEMS)?;
    Runner::new(gpu, candidate, &tensors)?.run(gpu)?;
    let [params, grads, velocity] = Tensors::values(CHECKED_ELEMS);
    let download = |index: usize| {
        let buffer: &wgpu::Buffer = &tensors.buffers[index];
        readback::download_blocking(&gpu.device, &gpu.queue, buffer, 0, CHECKED_ELEMS as u64)
    };
    let (actual_params, actual_velocity) = (download(0)?, download(2)?);
    for index in 0..CHECKED_ELEMS {
        let v = ALPHA * velocity[index] + grads[index];
        let theta = params[index] - A * v;
        let actual = (actual_params[index], actual_velocity[index]);
        ensure!(
            actual == (theta, v),
            "element {index}: expected {:?}, actual {actual:?}",
            (theta, v)
        );
    }
    Ok(())
}

/// Adds the medians for one size.
fn time(gpu: &Gpu, candidates: &[Candidate], numel: usize, measured: &mut Measured) -> Result<()> {
    let tensors = Tensors::new(gpu, numel)?;
    let copy = Runner::new(gpu, &copy_kernel()?, &tensors)?;
    let runners = candidates
        .iter()
        .map(|candidate| Runner::new(gpu, candidate, &tensors))
        .collect::<Result<Vec<_>>>()?;
    // Compiles what is compiled late, and touches every page.
    copy.run(gpu)?;
    for runner in &runners {
        runner.run(gpu)?;
    }
    let mut copies = Vec::new();
    let mut shares = vec![Vec::new(); runners.len()];
    let start = Instant::now();
    let mut rounds = 0;
    while rounds < MIN_ROUNDS || start.elapsed() < BUDGET {
        // Every candidate has its own copy beside it, because the bandwidth of a shared machine drifts, and another
        // one begins each round.
        for turn in 0..runners.len() {
            let index = (turn + rounds) % runners.len();
            let copy_seconds = copy.run(gpu)?;
            shares[index].push(copy_seconds / runners[index].run(gpu)?);
            copies.push(copy_seconds * 1e3);
        }
        rounds += 1;
    }
    measured.rounds.push(rounds);
    measured.copy_millis.push(Data::new(copies).median());
    for (candidate, shares) in candidates.iter().zip(shares) {
        let medians = measured.shares.entry(candidate.kernel.name.clone());
        medians.or_default().push(Data::new(shares).median());
    }
    Ok(())
}

/// A kernel with its bindings and grid.
struct Runner {
    pipeline: wgpu::ComputePipeline,
    tensors: wgpu::BindGroup,
    scalars: Vec<u8>,
    uniforms: Option<wgpu::BindGroup>,
    workgroups: [u32; 2],
}

impl Runner {
    fn new(gpu: &Gpu, candidate: &Candidate, tensors: &Tensors) -> Result<Self> {
        let device = &gpu.device;
        let Candidate {
            kernel,
            workgroup_size,
            ..
        } = candidate;
        let invocations = tensors.numel as u32 / candidate.elems_per_invocation;
        let workgroups = invocations / workgroup_size;
        let max_workgroups = device.limits().max_compute_workgroups_per_dimension;
        let rows = workgroups.div_ceil(max_workgroups).next_power_of_two();
        let columns = workgroups / rows;
        ensure!(
            rows * columns * workgroup_size == invocations,
            "the dispatch does not cover whole workgroups"
        );
        let scalars = scalars(&kernel.wgsl, invocations, columns * workgroup_size)?;

        let storage = |binding: u32, read_only: bool| wgpu::BindGroupLayoutEntry {
            binding,
            visibility: wgpu::ShaderStages::COMPUTE,
            ty: wgpu::BindingType::Buffer {
                ty: wgpu::BufferBindingType::Storage { read_only },
                has_dynamic_offset: false,
                min_binding_size: None,
            },
            count: None,
        };
        let bind = |layout: &wgpu::BindGroupLayout, buffers: &[wgpu::Buffer]| {
            let entries: Vec<_> = buffers
                .iter()
                .zip(0..)
                .map(|(buffer, binding)| wgpu::BindGroupEntry {
                    binding,
                    resource: buffer.as_entire_binding(),
                })
                .collect();
            device.create_bind_group(&wgpu::BindGroupDescriptor {
                label: None,
                layout,
                entries: &entries,
            })
        };
        let tensors_layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: None,
            entries: &[storage(0, false), storage(1, true), storage(2, false)],
        });
        let mut uniforms = None;
        let mut groups = vec![Some(&tensors_layout)];
        let scalars_layout = device.create_bind_group_layout(&wgpu::BindGroupLayoutDescriptor {
            label: None,
            entries: &[wgpu::BindGroupLayoutEntry {
                ty: wgpu::BindingType::Buffer {
                    ty: wgpu::BufferBindingType::Uniform,
                    has_dynamic_offset: false,
                    min_binding_size: None,
                },
                ..storage(0, true)
            }],
        });
        let mut immediate_size = scalars.len() as u32;
        if candidate.scalars == ScalarPath::Uniforms {
            let buffer = device.create_buffer_init(&wgpu::util::BufferInitDescriptor {
                label: None,
                contents: &scalars,
                usage: wgpu::BufferUsages::UNIFORM,
            });
            uniforms = Some(bind(&scalars_layout, &[buffer]));
            groups.push(Some(&scalars_layout));
            immediate_size = 0;
        }
        let constants: Vec<_> = kernel
            .constants
            .iter()
            .map(|(name, value)| (name.as_str(), *value))
            .collect();
        let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
            label: Some(&kernel.name),
            layout: Some(
                &device.create_pipeline_layout(&wgpu::PipelineLayoutDescriptor {
                    label: None,
                    bind_group_layouts: &groups,
                    immediate_size,
                }),
            ),
            module: &module(device, kernel),
            entry_point: Some(&kernel.entry_point),
            compilation_options: wgpu::PipelineCompilationOptions {
                constants: &constants,
                ..Default::default()
            },
            cache: None,
        });
        Ok(Self {
            pipeline,
            tensors: bind(&tensors_layout, &tensors.buffers),
            scalars,
            uniforms,
            workgroups: [columns, rows],
        })
    }

    /// Seconds from recording to completion.
    fn run(&self, gpu: &Gpu) -> Result<f64> {
        let start = Instant::now();
        let mut encoder = gpu.device.create_command_encoder(&Default::default());
        let mut pass = encoder.begin_compute_pass(&Default::default());
        pass.set_pipeline(&self.pipeline);
        pass.set_bind_group(0, &self.tensors, &[]);
        match &self.uniforms {
            Some(uniforms) => pass.set_bind_group(1, uniforms, &[]),
            None => pass.set_immediates(0, &self.scalars),
        }
        let [columns, rows] = self.workgroups;
        pass.dispatch_workgroups(columns, rows, 1);
        drop(pass);
        gpu.queue.submit([encoder.finish()]);
        gpu.device.poll(wgpu::PollType::wait_indefinitely())?;
        Ok(start.elapsed().as_secs_f64())
    }
}

#[expect(unsafe_code, reason = "leaving bounds checks out is what is measured")]
fn module(device: &wgpu::Device, kernel: &Kernel) -> wgpu::ShaderModule {
    let descriptor = wgpu::ShaderModuleDescriptor {
        label: Some(&kernel.name),
        source: wgpu::ShaderSource::Wgsl(kernel.wgsl.as_str().into()),
    };
    let checks = wgpu::ShaderRuntimeChecks {
        bounds_checks: kernel.bounds_checks,
        ..wgpu::ShaderRuntimeChecks::checked()
    };
    // SAFETY: the dispatches cover their bindings exactly.
    unsafe { device.create_shader_module_trusted(descriptor, checks) }
}

const ALPHA: f32 = 0.5;
const A: f32 = 0.25;

/// The shader's scalars, laid out as its source declares them.
fn scalars(wgsl: &str, count: u32, row: u32) -> Result<Vec<u8>> {
    let module = parse(wgsl)?;
    let uniforms = module.types.iter().find_map(|(_, ty)| match &ty.inner {
        naga::TypeInner::Struct { members, .. } if ty.name.as_ref()?.ends_with("Uniforms") => {
            Some(members)
        }
        _ => None,
    });
    let mut bytes = Vec::new();
    for member in uniforms.context("the shader has no uniforms")? {
        let value = match member.name.as_deref().unwrap_or_default() {
            "alpha" => ALPHA.to_bits(),
            "a" => A.to_bits(),
            "count" => count,
            "row" => row,
            // Terms that heavy ball does not have, offsets, the copy's switch. The check would show what is missing.
            _ => 0,
        };
        bytes.extend(bytemuck::bytes_of(&value));
    }
    Ok(bytes)
}
