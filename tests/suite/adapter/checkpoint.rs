//! Checkpoints of parameters in the caller's buffers.

use wgpu_optim::control::ControlRecord;
use wgpu_optim::gpu::CheckpointError;
use wgpu_optim::state::{Checkpoint, CheckpointMismatch};
use wgpu_optim::storage::{Rounding, SectionValues};
use wgpu_optim::{
    AdamConfig, AnyRule, CpuControl, CpuOptimizer, GpuControl, GpuOptimizer, LossScale, Masters,
    Optimizer, ParamGroups, Precision, SgdConfig, StateError, StepControl, StorageType,
    TensorBinding, TensorSpec, wgpu,
};

use super::{Bench, gpu_test};
use crate::cases::values;

/// Tensors of every type and memory, of odd lengths.
const TENSORS: [(&str, usize, StorageType); 6] = [
    ("a", 37, StorageType::F32),
    ("low.b", 3, StorageType::Bf16),
    ("low.c", 5, StorageType::Bf16),
    ("d", 7, StorageType::F16),
    ("random.e", 9, StorageType::Bf16),
    ("plain.f", 1, StorageType::F32),
];

fn groups() -> ParamGroups<AnyRule> {
    let adam = AdamConfig::adamw(1e-2).build().unwrap();
    let momentum = SgdConfig::builder(0.1).momentum(0.9).dampening(0.3);
    let masters = |masters| Precision {
        masters,
        state: StorageType::Bf16,
        ..Precision::default()
    };
    let random = Precision {
        rounding: Rounding::Stochastic { seed: 3 },
        ..masters(Masters::None)
    };
    ParamGroups::new(AnyRule::from(adam))
        .with("low", momentum.build().unwrap(), |name| {
            name.starts_with("low")
        })
        .unwrap()
        .with("random", adam, |name| name.starts_with("random"))
        .unwrap()
        .with("plain", SgdConfig::builder(0.1).build().unwrap(), |name| {
            name.starts_with("plain")
        })
        .unwrap()
        .with_group_precision("low", masters(Masters::LowBits))
        .unwrap()
        .with_group_precision("random", random)
        .unwrap()
}

fn control() -> StepControl {
    let scale = LossScale {
        initial: 16.0,
        growth_interval: 3,
        ..LossScale::default()
    };
    let control = StepControl::builder().max_norm(1.0).loss_scale(scale);
    control.build().unwrap()
}

/// A run: tensors of one type share buffers of parameters, one behind the other.
struct Run<'b> {
    bench: &'b Bench,
    params: Vec<wgpu::Buffer>,
    grads: Vec<wgpu::Buffer>,
    optimizer: GpuOptimizer<AnyRule>,
    control: GpuControl,
}

impl<'b> Run<'b> {
    /// One whose tensors have so many elements before them that are nobody's.
    fn new(bench: &'b Bench, before: u64) -> Self {
        let mut ends = [before; 3];
        let places = TENSORS.map(|(_, numel, of)| {
            let start = ends[of as usize];
            ends[of as usize] += numel as u64;
            start * of.bytes()
        });
        let canaries =
            |words: u64| bench.buffer_of(&vec![f32::from_bits(0x7654_7654); words as usize]);
        let params =
            StorageType::ALL.map(|of| canaries((ends[of as usize] * of.bytes()).div_ceil(4) + 1));
        let grads = TENSORS.map(|(_, numel, _)| bench.buffer(numel));
        let tensors = TENSORS.iter().zip(places).zip(&grads);
        let tensors: Vec<_> = tensors
            .map(|(((name, numel, of), place), grads)| {
                TensorBinding::new(name, &params[*of as usize], grads, [*numel])
                    .params_type(*of)
                    .params_at(place)
            })
            .collect();
        let optimizer = GpuOptimizer::with_groups(&bench.kernels, &groups(), &tensors);
        Self {
            optimizer: optimizer.unwrap(),
            control: GpuControl::new(&bench.kernels, control()).unwrap(),
            bench,
            params: params.into(),
            grads: grads.into(),
        }
    }

    /// The steps of these numbers; the gradients of some are not finite.
    fn steps(&mut self, steps: std::ops::Range<u64>) {
        for step in steps {
            for (index, grads) in self.grads.iter().enumerate() {
                let mut values = values(100 * step + index as u64, grads.size() as usize / 4);
                if step % 4 == 2 {
                    values[0] = f32::INFINITY;
                }
                self.bench.upload(grads, &values);
            }
            self.optimizer.set_frozen("d", step % 3 == 0).unwrap();
            let mut encoder = self.bench.encoder();
            let control = &mut self.control;
            self.optimizer.step_with(&mut encoder, control).unwrap();
            self.bench.queue.submit([encoder.finish()]);
        }
    }

    async fn checkpoint(&self) -> Checkpoint<AnyRule> {
        let checkpoint = self.optimizer.checkpoint(Some(&self.control));
        self.bench.wait(checkpoint).await.unwrap()
    }

    async fn load(&mut self, checkpoint: &Checkpoint<AnyRule>) -> Result<(), CheckpointError> {
        let load = self
            .optimizer
            .load_checkpoint(checkpoint, Some(&mut self.control));
        self.bench.wait(load).await
    }

    fn records(&mut self) -> Vec<ControlRecord> {
        self.control.read()
    }
}

#[gpu_test]
async fn a_run_goes_on_from_a_file_bit_for_bit_with_its_numbers() {
    for bench in Bench::both().await {
        for stop in [0, 1, 5, 6] {
            let mut whole = Run::new(bench, 0);
            whole.steps(0..stop);
            let saved = whole.checkpoint().await;
            whole.records();
            let file = saved.to_safetensors().unwrap();
            whole.steps(stop..11);
            let expected = whole.checkpoint().await;

            let loaded = Checkpoint::from_safetensors(&file).unwrap();
            assert_eq!(loaded.to_safetensors().unwrap(), file);
            // Elsewhere, and with half a word of somebody's before.
            let mut resumed = Run::new(bench, 1);
            // What it has done so far does not matter.
            resumed.steps(20..22);
            resumed.checkpoint().await;
            resumed.records();
            resumed.load(&loaded).await.unwrap();
            assert_eq!(resumed.checkpoint().await, saved, "{stop}");
            assert_eq!(
                (resumed.optimizer.steps(), resumed.control.steps()),
                (stop, stop)
            );
            resumed.steps(stop..11);
            assert_eq!(resumed.checkpoint().await, expected, "{stop}");
            let (records, expected) = (resumed.records(), whole.records());
            assert_eq!(format!("{records:?}"), format!("{expected:?}"));
            assert_eq!(records.first().map(|record| record.step), Some(stop + 1));
            for params in &resumed.params {
                let bytes = bench.bytes(params).await;
                assert_eq!(bytes[..2], [0x54, 0x76], "what lies before is somebody's");
                assert_eq!(bytes[bytes.len() - 4..], [0x54, 0x76, 0x54, 0x76]);
            }
        }
    }
}

/// A checkpoint of the device goes on in memory.
#[gpu_test]
async fn the_twin_takes_over() {
    let bench = Bench::best().await;
    let mut run = Run::new(bench, 0);
    run.steps(0..4);
    let checkpoint = run.checkpoint().await;
    let specs = TENSORS.map(|(name, numel, of)| TensorSpec::new(name, [numel]).params_type(of));
    let mut twin = CpuOptimizer::with_groups(&groups(), specs).unwrap();
    let mut control = CpuControl::new(control());
    let mut params: Vec<_> = TENSORS
        .iter()
        .map(|(_, numel, of)| wgpu_optim::cpu::TensorValues::new(*of, &vec![0.0; *numel]))
        .collect();
    let mut slices: Vec<_> = params.iter_mut().map(|params| params.slice_mut()).collect();
    twin.load_checkpoint(&checkpoint, &mut slices, Some(&mut control))
        .unwrap();
    let slices: Vec<_> = params.iter().map(|params| params.slice()).collect();
    assert_eq!(
        twin.checkpoint(&slices, Some(&control)).unwrap(),
        checkpoint
    );
    assert_eq!((twin.steps(), control.state().steps), (4, 4));
}

#[gpu_test]
async fn what_does_not_belong_is_refused_and_nothing_is_written() {
    let bench = Bench::best().await;
    let mut other = Run::new(bench, 0);
    other.steps(0..3);
    let good = other.checkpoint().await;
    let mut run = Run::new(bench, 0);
    run.steps(5..7);
    let before = run.checkpoint().await;
    let edited = |edit: &dyn Fn(&mut Checkpoint<AnyRule>)| {
        let mut checkpoint = good.clone();
        edit(&mut checkpoint);
        checkpoint
    };
    let expectations: [(Checkpoint<AnyRule>, &str); 8] = [
        (
            edited(&|it| drop(it.params.remove(1))),
            "no parameters of tensor \"low.b\"",
        ),
        (
            edited(&|it| it.params[1].name = "x".into()),
            "no parameters of tensor \"low.b\"",
        ),
        (
            edited(&|it| it.params.push(it.params[0].clone())),
            "tensor \"a\" twice",
        ),
        (
            edited(&|it| it.params[0].shape = vec![38]),
            "tensor \"a\": the checkpoint has shape [38], expected [37]",
        ),
        (
            edited(&|it| it.params[3].values = it.params[1].values.clone()),
            "tensor \"d\": the checkpoint has params of bf16, expected f16",
        ),
        (
            edited(&|it| it.params[0].values = SectionValues::from(vec![0.0; 36])),
            "tensor \"a\": the checkpoint has 36 parameters, expected 37",
        ),
        (
            edited(&|it| it.state.control = None),
            "made without a control",
        ),
        (
            edited(&|it| it.state.tensors[0].state_kind = "lion".into()),
            "tensor \"a\": the state is of the lion form",
        ),
    ];
    for (checkpoint, expected) in expectations {
        let error = run.load(&checkpoint).await.unwrap_err();
        assert!(matches!(error, CheckpointError::Mismatch(_)), "{error:?}");
        assert!(error.to_string().contains(expected), "{error}");
        assert_eq!(run.checkpoint().await, before);
    }
    let alone = bench.wait(run.optimizer.load_checkpoint(&good, None)).await;
    assert_eq!(alone, Err(CheckpointMismatch::UnusedControl.into()));
    let missing = edited(&|it| drop(it.state.tensors.remove(2)));
    let expected = StateError::MissingTensor {
        tensor: "low.c".to_owned(),
    };
    let error = run.load(&missing).await;
    assert_eq!(error, Err(CheckpointMismatch::State(expected).into()));
    assert_eq!(run.checkpoint().await, before);
    run.load(&good).await.unwrap();
    assert_eq!(run.checkpoint().await, good);
}

#[gpu_test]
async fn parameters_that_cannot_be_had_are_named() {
    let bench = Bench::best().await;
    let config = SgdConfig::builder(0.1).build().unwrap();
    let params = bench.device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 16,
        usage: wgpu::BufferUsages::STORAGE | wgpu::BufferUsages::COPY_SRC,
        mapped_at_creation: false,
    });
    let grads = bench.buffer_of(&[1.0; 4]);
    let tensor = TensorBinding::new("weight", &params, &grads, [4]);
    let mut optimizer = GpuOptimizer::new(&bench.kernels, config, &[tensor]).unwrap();
    let checkpoint = bench.wait(optimizer.checkpoint(None)).await.unwrap();
    let read_only = bench
        .wait(optimizer.load_checkpoint(&checkpoint, None))
        .await;
    assert!(
        matches!(&read_only, Err(CheckpointError::MissingUsage { tensor, .. }) if tensor == "weight"),
        "{read_only:?}"
    );
    let mut encoder = bench.encoder();
    optimizer.rebind(&mut encoder, &[]).unwrap();
    let unbound = bench.wait(optimizer.checkpoint(None)).await;
    let expected = CheckpointError::Unbound {
        tensor: "weight".to_owned(),
    };
    assert_eq!(unbound, Err(expected));
}

/// The number of steps is set between steps that are recorded, dropped and submitted.
#[gpu_test]
async fn a_number_of_steps_that_is_set_goes_on_with_what_is_submitted() {
    for bench in Bench::both().await {
        let mut theta = bench.follow(SgdConfig::builder(0.1).build().unwrap(), 10);
        bench.step(&mut theta.optimizer);
        let [mut dropped, mut submitted] = [bench.encoder(), bench.encoder()];
        theta.optimizer.step(&mut dropped).unwrap();
        theta.optimizer.step(&mut submitted).unwrap();
        theta.optimizer.set_steps(100);
        drop(dropped);
        bench.queue.submit([submitted.finish()]);
        bench.step(&mut theta.optimizer);
        for _ in 0..3 {
            theta.expect_step();
        }
        theta.check().await;
        // Applied steps are those of the tensor.
        assert_eq!(theta.optimizer.applied_steps("theta"), Some(3));
        let state = bench.wait(theta.optimizer.state()).await.unwrap();
        assert_eq!((state.steps, state.tensors[0].applied_steps), (102, 3));
        bench.step(&mut theta.optimizer);
        assert_eq!(theta.optimizer.steps(), 103);
        assert_eq!(theta.optimizer.names(), ["theta"]);
        theta.optimizer.set_frozen_where(|name| name == "theta");
        let before = bench.download(&theta.params).await;
        bench.step(&mut theta.optimizer);
        assert_eq!(bench.download(&theta.params).await, before);
    }
}
