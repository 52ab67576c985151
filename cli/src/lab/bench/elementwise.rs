//! The kernels that the fused step is measured against on the same device: a copy kernel with its access pattern, and the chain
//! of separate kernels that a tensor library would run instead.

use std::collections::HashMap;
use std::fmt::Write as _;

use anyhow::{Context as _, Result, bail, ensure};
use std::iter::repeat_n;
use wgpu_optim::plan::{Access, DeviceLimits, Piece, Place, Plan, Target, TensorLayout};
use wgpu_optim::rules::MAX_SLOTS;
use wgpu_optim::rules::sgd::Terms;
use wgpu_optim::storage::{Codec, Storage};
use wgpu_optim::{Arena, Rule as _, SgdConfig, readback, wgpu};

use super::timing::GpuWork;
use crate::Failure;
use crate::backend::OpenGpu;
use crate::lab::problem::{Problem, Results, Stepper, submit_and_wait};

/// The arrays that the kernels work on.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Array {
    Params,
    Grads,
    /// The slots of a rule, as an optimizer lays them out: sections of one buffer.
    State,
    Velocity,
    Scratch,
}

/// The factors of an operation.
#[derive(Clone, Copy, Debug)]
enum Factor {
    None,
    Momentum,
    Lr,
}

/// One kernel over whole tensors.
#[derive(Clone, Copy, Debug)]
struct Op {
    entry_point: &'static str,
    /// The buffers that are bound to x, y and z, as far as the kernel has them.
    arrays: &'static [Array],
    factor: Factor,
    /// Arrays that it reads, and arrays that it writes.
    accesses: u64,
}

/// The copies, by how many slots there are. Each reads the gradients, and reads and writes everything else.
static COPIES: [Op; MAX_SLOTS + 1] = [
    Op {
        entry_point: "copy_one",
        arrays: &[Array::Params, Array::Grads],
        factor: Factor::None,
        accesses: 3,
    },
    copy_with_slots("copy_two", 1),
    copy_with_slots("copy_three", 2),
    copy_with_slots("copy_four", 3),
    copy_with_slots("copy_five", 4),
];

const fn copy_with_slots(entry_point: &'static str, slots: u64) -> Op {
    Op {
        entry_point,
        arrays: &[Array::Params, Array::Grads, Array::State],
        factor: Factor::None,
        accesses: 3 + 2 * slots,
    }
}

/// The operations that are no copies, by entry point.
const OPERATIONS: [(&str, &str); 4] = [
    ("scale", "x[unit] = k.factor * x[unit];"),
    ("scale_into", "x[unit] = k.factor * y[unit];"),
    ("add", "x[unit] = x[unit] + y[unit];"),
    ("subtract", "x[unit] = x[unit] - y[unit];"),
];

/// The loads of a copy from one unit, and its stores: everything moves on by one array.
fn copy_of(slots: usize, unit: &str) -> [String; 2] {
    let slot = |slot| format!("z[{unit} + {slot}u * k.section]");
    let arrays: Vec<_> = std::iter::once(format!("x[{unit}]"))
        .chain((0..slots).map(slot))
        .collect();
    let (mut loads, mut stores) = (format!("let y_{unit} = y[{unit}];\n"), String::new());
    for (index, array) in arrays.iter().enumerate() {
        let from = format!("from_{index}_{unit}");
        let to = &arrays[(index + 1) % arrays.len()];
        let value = match (index == slots, slots) {
            (true, 0) => format!("select({from}, y_{unit}, k.swap == 0u)"),
            (true, _) => format!("select({from}, y_{unit}, k.swap != 0u)"),
            (false, _) => from.clone(),
        };
        // Writing to a string cannot fail.
        let _ = writeln!(loads, "let {from} = {array};");
        let _ = writeln!(stores, "{to} = {value};");
    }
    [loads, stores]
}

/// A kernel of which an invocation takes the unit that this expression says.
fn kernel(name: &str, unit: &str, body: &str) -> String {
    format!(
        "
@compute @workgroup_size(256)
fn {name}(@builtin(global_invocation_id) invocation: vec3<u32>) {{
    let unit = {unit};
    if unit >= k.count {{
        return;
    }}
    {body}
}}
"
    )
}

/// All kernels: the operations, and the copies with one vec4 per invocation and, as the step has them on software adapters, with
/// two: `NAME_pairs`. The last vec4 may be alone.
fn source() -> String {
    let mut source = include_str!("../../../shaders/elementwise.wgsl").to_owned();
    for (name, body) in OPERATIONS {
        source += &kernel(name, "unit_of(invocation)", body);
    }
    for (slots, copy) in COPIES.iter().enumerate() {
        let [[loads, stores], [next_loads, next_stores]] =
            ["unit", "next"].map(|unit| copy_of(slots, unit));
        let name = copy.entry_point;
        source += &kernel(name, "unit_of(invocation)", &(loads.clone() + &stores));
        let pair = format!(
            "let is_pair = unit + 1u < k.count;
let next = select(unit, unit + 1u, is_pair);
{loads}{next_loads}{stores}
if is_pair {{
{next_stores}
}}"
        );
        source += &kernel(&format!("{name}_pairs"), "2u * unit_of(invocation)", &pair);
    }
    source
}

/// `theta <- theta - s`
const SUBTRACT_SCRATCH: Op = Op {
    entry_point: "subtract",
    arrays: &[Array::Params, Array::Scratch],
    factor: Factor::None,
    accesses: 3,
};

/// `v <- alpha*v; v <- v + g; s <- eta*v; theta <- theta - s`
const HEAVY_BALL: &[Op] = &[
    Op {
        entry_point: "scale",
        arrays: &[Array::Velocity],
        factor: Factor::Momentum,
        accesses: 2,
    },
    Op {
        entry_point: "add",
        arrays: &[Array::Velocity, Array::Grads],
        factor: Factor::None,
        accesses: 3,
    },
    Op {
        entry_point: "scale_into",
        arrays: &[Array::Scratch, Array::Velocity],
        factor: Factor::Lr,
        accesses: 2,
    },
    SUBTRACT_SCRATCH,
];

/// `s <- eta*g; theta <- theta - s`
const PLAIN: &[Op] = &[
    Op {
        entry_point: "scale_into",
        arrays: &[Array::Scratch, Array::Grads],
        factor: Factor::Lr,
        accesses: 2,
    },
    SUBTRACT_SCRATCH,
];

/// The separate kernels that make the problem's step, where there are such.
fn chain_of(problem: &Problem) -> Option<&'static [Op]> {
    let config = SgdConfig::try_from(problem.config().clone()).ok()?;
    let has = Terms::of(&config);
    match has.velocity {
        _ if has.c || has.lambda || has.rho || config.maximize() => None,
        true if has.b => None,
        true => Some(HEAVY_BALL),
        false => Some(PLAIN),
    }
}

/// The kernels of all operations, by entry point: once per device.
pub struct Pipelines(HashMap<String, wgpu::ComputePipeline>);

impl Pipelines {
    pub fn new(device: &wgpu::Device) -> Self {
        let module = device.create_shader_module(wgpu::ShaderModuleDescriptor {
            label: Some("wgpu_optim.bench.elementwise"),
            source: wgpu::ShaderSource::Wgsl(source().into()),
        });
        let pipeline = |entry_point: String| {
            let pipeline = device.create_compute_pipeline(&wgpu::ComputePipelineDescriptor {
                label: Some(&entry_point),
                layout: None,
                module: &module,
                entry_point: Some(&entry_point),
                compilation_options: wgpu::PipelineCompilationOptions::default(),
                cache: None,
            });
            (entry_point, pipeline)
        };
        let ops = [&COPIES, HEAVY_BALL, PLAIN].into_iter().flatten();
        let alone = ops.map(|op| op.entry_point.to_owned());
        let pairs = COPIES.iter().map(|op| format!("{}_pairs", op.entry_point));
        Self(alone.chain(pairs).map(pipeline).collect())
    }
}

/// A sequence of kernels over a problem's tensors, with arrays of its own.
pub struct Elementwise<'a> {
    open: &'a OpenGpu,
    ops: &'static [Op],
    /// Parameters and gradients.
    model: Arena,
    /// Velocity and scratch, in the places of parameters and gradients.
    chained: Option<Arena>,
    /// How many slots the state has.
    slots: usize,
    momentum: f64,
    dispatches: Vec<Dispatch>,
}

/// Words of `ElementwiseUniforms` in WGSL, in whole rows of 16 bytes, as OpenGL binds uniforms.
const UNIFORM_WORDS: usize = 8;

/// One recorded dispatch of an operation.
struct Dispatch {
    pipeline: wgpu::ComputePipeline,
    arrays: wgpu::BindGroup,
    scalars: wgpu::BindGroup,
    uniforms: wgpu::Buffer,
    factor: Factor,
    count: u32,
    row: u32,
    section: u32,
    workgroups: [u32; 2],
}

impl<'a> Elementwise<'a> {
    /// A copy with the access pattern of the problem's step, over as many elements in one tensor: the roof.
    pub fn copy(open: &'a OpenGpu, pipelines: &Pipelines, problem: &Problem) -> Result<Self> {
        let slots = problem.config().slots().kept().count();
        let ops = std::slice::from_ref(&COPIES[slots]);
        Self::new(open, pipelines, problem, ops, &[problem.numel()])
    }

    /// Bytes that the separate kernels of a problem take of the device's memory, and of the host's for the objects of each
    /// tensor, about.
    pub fn unfused_bytes(problem: &Problem) -> (u64, u64) {
        const TENSOR_BYTES: u64 = 40 << 10;
        match chain_of(problem) {
            // Parameters, gradients, velocity and scratch.
            Some(_) => (
                4 * size_of::<f32>() as u64 * problem.numel() as u64,
                TENSOR_BYTES * problem.sizes().len() as u64,
            ),
            None => (0, 0),
        }
    }

    /// The problem's step in separate kernels, tensor by tensor, for the forms that are a chain of scale and add:
    /// plain descent and the heavy ball.
    pub fn unfused(
        open: &'a OpenGpu,
        pipelines: &Pipelines,
        problem: &Problem,
    ) -> Result<Option<Self>> {
        let Some(ops) = chain_of(problem) else {
            return Ok(None);
        };
        let chain = Self::new(open, pipelines, problem, ops, problem.sizes())?;
        for (index, (start, grads)) in problem.values().enumerate() {
            chain.model.upload_params(&index.to_string(), start)?;
            chain.model.upload_grads(&index.to_string(), grads)?;
        }
        Ok(Some(chain))
    }

    fn new(
        open: &'a OpenGpu,
        pipelines: &Pipelines,
        problem: &Problem,
        ops: &'static [Op],
        sizes: &[usize],
    ) -> Result<Self> {
        let (device, queue) = (&open.gpu.device, &open.gpu.queue);
        let arena = || {
            let tensors = sizes.iter().enumerate();
            let tensors = tensors.map(|(index, numel)| (index.to_string(), vec![*numel]));
            Arena::new(device, queue, tensors)
        };
        let model = arena()?;
        let uses = |array| ops.iter().any(|op| op.arrays.contains(&array));
        let is_chain = uses(Array::Velocity) || uses(Array::Scratch);
        let slots = match uses(Array::State) {
            true => problem.config().slots().kept().count(),
            false => 0,
        };
        let mut chain = Self {
            open,
            ops,
            model,
            chained: is_chain.then(arena).transpose()?,
            slots,
            momentum: problem.config().momentum().unwrap_or_default(),
            dispatches: Vec::new(),
        };
        chain.dispatches = chain.plan(pipelines)?;
        chain.set_lr(problem.config().lr());
        Ok(chain)
    }

    /// Every operation over every tensor, in the order of the operations within a tensor.
    fn plan(&self, pipelines: &Pipelines) -> Result<Vec<Dispatch>> {
        let device = &self.open.gpu.device;
        let mut dispatches = Vec::new();
        for tensor in self.model.tensors() {
            let place = |buffer| Place {
                buffer,
                offset_bytes: tensor.offset_bytes,
            };
            let layout = TensorLayout {
                // Over the padding, in whole vec4s.
                numel: tensor.numel.next_multiple_of(4),
                params: place(0),
                grads: place(1),
                storage: Storage {
                    state: repeat_n(Codec::F32, self.slots).collect(),
                    ..Storage::default()
                },
                ..TensorLayout::default()
            };
            ensure!(
                layout.numel <= tensor.numel + tensor.padding_elems,
                "an arena pads to whole vec4s"
            );
            let device_limits = self.open.kernels.device_limits();
            let limits = DeviceLimits {
                // Of the chain there is one vec4 per invocation on every device.
                is_software: device_limits.is_software && self.chained.is_none(),
                ..*device_limits
            };
            let plan = Plan::new(&[layout], &limits)?;
            let state = |piece: &Piece| {
                let size = piece.state?.size_bytes();
                Some(device.create_buffer(&wgpu::BufferDescriptor {
                    label: Some("wgpu_optim.bench.state"),
                    size,
                    usage: wgpu::BufferUsages::STORAGE,
                    mapped_at_creation: false,
                }))
            };
            let states: Vec<_> = plan.pieces.iter().map(state).collect();
            let parts = plan.dispatches(|_| Some(()));
            for op in self.ops {
                let pipeline = match limits.is_software {
                    true => &pipelines.0[&format!("{}_pairs", op.entry_point)],
                    false => &pipelines.0[op.entry_point],
                };
                for (part, ()) in &parts {
                    let (Target::Piece(piece), Access::Vec4) = (part.target, part.access) else {
                        bail!("an arena's tensors start with their bindings");
                    };
                    let window = plan.pieces[piece].params;
                    let bind = |group, entries: &[wgpu::BindGroupEntry<'_>]| {
                        device.create_bind_group(&wgpu::BindGroupDescriptor {
                            label: Some(op.entry_point),
                            layout: &pipeline.get_bind_group_layout(group),
                            entries,
                        })
                    };
                    let mut entries = Vec::with_capacity(3);
                    for (binding, array) in op.arrays.iter().enumerate() {
                        let resource = match (array, &states[piece]) {
                            (Array::State, Some(state)) => state.as_entire_binding(),
                            _ => wgpu::BindingResource::Buffer(wgpu::BufferBinding {
                                buffer: self.buffer(*array, tensor.buffer)?,
                                offset: window.offset_bytes,
                                size: wgpu::BufferSize::new(window.size_bytes),
                            }),
                        };
                        entries.push(wgpu::BindGroupEntry {
                            binding: binding as u32,
                            resource,
                        });
                    }
                    let uniforms = device.create_buffer(&wgpu::BufferDescriptor {
                        label: Some(op.entry_point),
                        size: 4 * UNIFORM_WORDS as u64,
                        usage: wgpu::BufferUsages::UNIFORM | wgpu::BufferUsages::COPY_DST,
                        mapped_at_creation: false,
                    });
                    let scalars = [wgpu::BindGroupEntry {
                        binding: 0,
                        resource: uniforms.as_entire_binding(),
                    }];
                    dispatches.push(Dispatch {
                        pipeline: pipeline.clone(),
                        arrays: bind(0, &entries),
                        scalars: bind(1, &scalars),
                        uniforms,
                        factor: op.factor,
                        count: part.count,
                        row: part.row(),
                        section: part.section,
                        workgroups: part.workgroups,
                    });
                }
            }
        }
        Ok(dispatches)
    }

    fn buffer(&self, array: Array, index: usize) -> Result<&wgpu::Buffer> {
        let chained = self.chained.as_ref();
        let buffers = match array {
            Array::Params => Some(self.model.params()),
            Array::Grads => Some(self.model.grads()),
            Array::Velocity => chained.map(Arena::params),
            Array::Scratch => chained.map(Arena::grads),
            Array::State => None,
        };
        let buffer = buffers.and_then(|buffers| buffers.get(index));
        buffer.context("no such array")
    }

    /// Bytes that a run moves per element.
    pub fn bytes_per_elem(&self) -> u64 {
        self.ops.iter().map(|op| 4 * op.accesses).sum()
    }

    pub fn dispatches(&self) -> usize {
        self.dispatches.len()
    }

    /// Takes effect with the next submission.
    fn set_lr(&self, lr: f64) {
        for dispatch in &self.dispatches {
            let factor = match dispatch.factor {
                Factor::None => 0.0,
                Factor::Momentum => self.momentum as f32,
                Factor::Lr => lr as f32,
            };
            let Dispatch {
                count,
                row,
                section,
                ..
            } = *dispatch;
            let scalars: [u32; UNIFORM_WORDS] = [count, row, 0, factor.to_bits(), section, 0, 0, 0];
            let queue = &self.open.gpu.queue;
            queue.write_buffer(&dispatch.uniforms, 0, bytemuck::cast_slice(&scalars));
        }
    }
}

impl GpuWork for Elementwise<'_> {
    fn record(&mut self, pass: &mut wgpu::ComputePass<'_>) -> Result<(), Failure> {
        for dispatch in &self.dispatches {
            pass.set_pipeline(&dispatch.pipeline);
            pass.set_bind_group(0, &dispatch.arrays, &[]);
            pass.set_bind_group(1, &dispatch.scalars, &[]);
            let [x, y] = dispatch.workgroups;
            pass.dispatch_workgroups(x, y, 1);
        }
        Ok(())
    }
}

impl Stepper for Elementwise<'_> {
    fn step(&mut self, lr: f64) -> Result<(), Failure> {
        self.set_lr(lr);
        let open = self.open;
        submit_and_wait(open, |encoder| {
            let mut pass = encoder.begin_compute_pass(&wgpu::ComputePassDescriptor::default());
            self.record(&mut pass)
        })
    }

    fn results(&self) -> Result<Results, Failure> {
        let values = |arena: &Arena| {
            readback::block_on(&self.open.gpu.device, arena.download_all_params())
                .map(|tensors| tensors.concat())
                .map_err(Failure::failed)
        };
        let mut ops = self.ops.iter();
        let has_velocity = ops.any(|op| op.arrays.contains(&Array::Velocity));
        let velocity = self.chained.iter().filter(|_| has_velocity);
        Ok(Results {
            params: values(&self.model)?,
            slots: velocity.map(values).collect::<Result<_, _>>()?,
        })
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]
mod tests {
    use naga::{AddressSpace, Expression, Handle, Module, Statement};
    use wgpu_optim::AnyRule;

    use super::*;
    use crate::backend::tests::open_gpu;
    use crate::lab::args::BenchForm;

    /// The global in an address space that an access goes to.
    fn base<'m>(
        module: &'m Module,
        at: &'m naga::Function,
        mut pointer: Handle<Expression>,
    ) -> &'m naga::GlobalVariable {
        loop {
            match at.expressions[pointer] {
                Expression::Access { base, .. } | Expression::AccessIndex { base, .. } => {
                    pointer = base
                }
                Expression::GlobalVariable(global) => return &module.global_variables[global],
                ref other => panic!("{other:?}"),
            }
        }
    }

    #[test]
    fn the_accesses_of_an_operation_are_those_of_its_shader() {
        let module = naga::front::wgsl::parse_str(&source()).unwrap();
        let alone = [&COPIES, HEAVY_BALL, PLAIN].concat().into_iter();
        let alone = alone.map(|op| (op.entry_point.to_owned(), op.accesses));
        let pairs = COPIES.map(|op| (format!("{}_pairs", op.entry_point), 2 * op.accesses));
        for (entry_point, accesses) in alone.chain(pairs) {
            let mut entry_points = module.entry_points.iter();
            let entry = entry_points.find(|e| e.name == entry_point).unwrap();
            let function = &entry.function;
            let is_storage = |pointer| {
                let space = base(&module, function, pointer).space;
                matches!(space, AddressSpace::Storage { .. })
            };
            let loads = function.expressions.iter().filter(|(_, expression)| {
                matches!(expression, Expression::Load { pointer } if is_storage(*pointer))
            });
            // Those of the second of a pair are in a block of their own.
            let statements = function.body.iter().flat_map(|statement| match statement {
                Statement::If { accept, .. } => accept.iter().collect(),
                statement => vec![statement],
            });
            let stores = statements.filter(|statement| {
                matches!(statement, Statement::Store { pointer, .. } if is_storage(*pointer))
            });
            let counted = (loads.count() + stores.count()) as u64;
            assert_eq!(counted, accesses, "{entry_point}");
        }
        // The copies move what the steps move, plain descent to four slots.
        let accesses = COPIES.each_ref().map(|copy| copy.accesses);
        assert_eq!(accesses, [3, 5, 7, 9, 11]);
        for preset in AnyRule::presets() {
            let rule = preset.config(0.1).unwrap();
            let copy = &COPIES[rule.slots().kept().count()];
            if rule.sums().is_empty() {
                assert_eq!(4 * copy.accesses, rule.bytes_per_elem(), "{preset:?}");
            }
        }
        // Ten accesses against the fused step's five, and five against three.
        let sum = |ops: &[Op]| ops.iter().map(|op| op.accesses).sum::<u64>();
        assert_eq!([HEAVY_BALL, PLAIN].map(sum), [10, 5]);
    }

    #[test]
    fn the_uniforms_are_those_of_the_shader() {
        let module = naga::front::wgsl::parse_str(&source()).unwrap();
        let uniforms = module.types.iter().map(|(_, ty)| ty);
        let uniforms = uniforms
            .filter(|ty| ty.name.as_deref() == Some("ElementwiseUniforms"))
            .map(|ty| ty.inner.size(module.to_ctx()).next_multiple_of(16));
        assert_eq!(uniforms.collect::<Vec<_>>(), [4 * UNIFORM_WORDS as u32]);
    }

    #[test]
    fn a_copy_reaches_every_slot() {
        let open = open_gpu();
        let pipelines = Pipelines::new(&open.gpu.device);
        let heavy_ball: AnyRule = BenchForm::HeavyBall.config().unwrap().into();
        let presets = AnyRule::presets().map(|preset| preset.config(0.1).unwrap());
        for rule in presets.chain([heavy_ball]) {
            let slots = rule.slots().kept().count();
            if slots == 0 {
                continue;
            }
            let problem = Problem::new(rule, vec![4099]);
            let mut copy = Elementwise::copy(&open, &pipelines, &problem).unwrap();
            let start = problem.values().next().unwrap().0;
            copy.model.upload_params("0", start).unwrap();
            // Everything moves on by one array, so the parameters are back after as many steps as there are arrays.
            for _ in 0..slots {
                copy.step(0.1).unwrap();
                assert_eq!(copy.results().unwrap().params, vec![0.0; 4099]);
            }
            copy.step(0.1).unwrap();
            assert_eq!(copy.results().unwrap().params, start, "{slots} slots");
        }
    }
}
