//! The kernels that are looked at: every entry point, as the real forms compile it.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use wgpu_optim::plan::Access;
use wgpu_optim::rules::sgd::MomentumForm;
use wgpu_optim::rules::{AmsGrad, SgdConfigBuilder};
use wgpu_optim::storage::{Rounding, Storage};
use wgpu_optim::wgsl::{KernelVariant, NormVariant, ScalarPath};
use wgpu_optim::{
    AdamConfig, AnyRule, Masters, Precision, RmsPropConfig, Rule, SgdConfig, StorageType,
};

/// A shader with one of its entry points: what a compiler gets.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Kernel {
    pub name: String,
    pub wgsl: String,
    pub entry_point: String,
    pub constants: Vec<(String, f64)>,
    /// As `wgpu::ShaderRuntimeChecks` has it.
    pub bounds_checks: bool,
    /// Loads and stores of a tensor, of 16 bytes but for the ends.
    pub accesses: [u64; 2],
}

impl Kernel {
    /// A kernel as the library compiles it.
    pub fn new(name: String, variant: KernelVariant, path: ScalarPath) -> Self {
        Self {
            name,
            accesses: accesses(variant.storage()),
            wgsl: variant.source(path),
            entry_point: variant.entry_point(),
            constants: variant
                .constants()
                .into_iter()
                .map(|(name, value)| (name.to_owned(), value))
                .collect(),
            bounds_checks: true,
        }
    }
}

/// The kernels that add up the squares of gradients.
fn norms() -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for of in StorageType::ALL {
        let piece = NormVariant::new(of);
        let batch = |access| piece.over_batch(BATCH, access);
        for (variant, access) in [
            (piece, "vec4"),
            (batch(Access::Vec4), "batch_vec4"),
            (batch(Access::Scalar), "batch_scalar"),
        ] {
            for (path, path_name) in PATHS {
                kernels.push(Kernel {
                    name: format!("norm_{}.{access}.{path_name}", of.name()),
                    wgsl: variant.source(path),
                    entry_point: NormVariant::ENTRY_POINT.to_owned(),
                    constants: Vec::new(),
                    bounds_checks: true,
                    accesses: [1, 0],
                });
            }
        }
    }
    kernels
}

/// The gradient is loaded, parameters, slots and masters are loaded and stored.
fn accesses(storage: &Storage) -> [u64; 2] {
    let vec4s = |elem_bytes: u64| u64::from(storage.unit_elems()) * elem_bytes / 16;
    let stored = vec4s(storage.params.bytes() + storage.state_bytes());
    [vec4s(storage.grads.bytes()) + stored, stored]
}

/// A configuration for every set of terms that the forms make in practice.
fn forms() -> Result<Vec<(&'static str, SgdConfig)>> {
    let plain = || SgdConfig::builder(0.1);
    let momentum = || plain().momentum(0.9);
    let decayed = |config: SgdConfigBuilder| config.coupled_weight_decay(0.01);
    let decoupled = |config: SgdConfigBuilder| config.decoupled_weight_decay(0.01);
    let all = momentum().nesterov(true).form(MomentumForm::LrInside);
    [
        ("heavy_ball", momentum()),
        ("nesterov", momentum().nesterov(true)),
        ("weight_decay", decayed(momentum())),
        // The same terms as dampened.
        ("ema", momentum().form(MomentumForm::Ema)),
        ("decoupled", decoupled(momentum())),
        ("all", decoupled(decayed(all))),
        ("plain", plain()),
        ("plain_weight_decay", decayed(plain())),
        ("plain_decoupled", decoupled(plain())),
        ("plain_all", decoupled(decayed(plain()))),
    ]
    .into_iter()
    .map(|(name, config)| Ok((name, config.build()?)))
    .collect()
}

/// Tensors in the batches that are looked at: as many as a default device binds with momentum (eight storage buffers).
pub const BATCH: usize = 2;

const CHUNKS: [(&str, Access, usize); 2] = [
    ("chunks", Access::Vec4Chunks, 1),
    ("chunks_scalar", Access::ScalarChunks, 1),
];

/// Every form and rule x access x path of the scalars, by names such as `heavy_ball.vec4.immediates`.
pub fn all() -> Result<Vec<Kernel>> {
    let mut kernels = Vec::new();
    for (form, config) in forms()? {
        kernels.extend(of_rule(form, &config));
    }
    // The first library's version of each rule, and what differs from that the most.
    for preset in AnyRule::presets().filter(|preset| preset.rule != "sgd") {
        let name = preset.rule.replace('-', "_");
        let is_there = |kernel: &Kernel| kernel.name.split('.').next() == Some(&name);
        if kernels.iter().any(is_there) {
            continue;
        }
        let rule = preset.config(0.1)?;
        if rule.sums().is_empty() {
            kernels.extend(of_rule(&name, &rule));
        } else {
            let stored = Stored::default();
            let measuring = |variant: KernelVariant| variant.measuring(false);
            kernels.extend(by_accesses(&name, &rule, &stored, |same| same, &CHUNKS));
            let name = format!("{name}_sums");
            kernels.extend(by_accesses(&name, &rule, &stored, measuring, &CHUNKS));
        }
    }
    let amsgrad = AdamConfig::adamw(0.1).amsgrad(AmsGrad::OfAverage);
    kernels.extend(of_rule("adam_keras", &AdamConfig::keras(0.1).build()?));
    kernels.extend(of_rule("adamw_amsgrad", &amsgrad.build()?));
    let rmsprop = RmsPropConfig::builder(0.1).momentum(0.9).centered(true);
    kernels.extend(of_rule("rmsprop_all", &rmsprop.build()?));
    let heavy_ball = SgdConfig::builder(0.1).momentum(0.9).build()?;
    let same = |variant| variant;
    for (name, stored) in storages() {
        let rule = format!("heavy_ball_{name}");
        kernels.extend(of_variant(&rule, &heavy_ball, &stored, same));
        let adamw = AdamConfig::adamw(0.1).build()?;
        let rule = format!("adamw_{name}");
        kernels.extend(of_variant(&rule, &adamw, &stored, same));
    }
    let adamw = AdamConfig::adamw(0.1).build()?;
    let controlled = |variant: KernelVariant| variant.controlled(false);
    kernels.extend(of_variant(
        "heavy_ball_controlled",
        &heavy_ball,
        &Stored::default(),
        controlled,
    ));
    kernels.extend(of_variant(
        "adamw_controlled",
        &adamw,
        &Stored::default(),
        controlled,
    ));
    for (name, stored) in storages() {
        let rule = format!("adamw_{name}_controlled");
        let kernels_of = of_variant(&rule, &adamw, &stored, controlled);
        kernels.extend(
            kernels_of
                .into_iter()
                .filter(|kernel| kernel.name.contains(".vec4.")),
        );
    }
    let masters = Stored {
        params: StorageType::Bf16,
        grads: StorageType::Bf16,
        ..Stored::default()
    };
    for (name, stored) in [
        ("adamw", Stored::default()),
        ("adamw_bf16_masters", masters),
    ] {
        kernels.extend(by_accesses(name, &adamw, &stored, same, &CHUNKS));
        let name = format!("{name}_controlled");
        kernels.extend(by_accesses(&name, &adamw, &stored, controlled, &CHUNKS));
    }
    kernels.extend(norms());
    Ok(kernels)
}

/// The types of a tensor's parameters and gradients, and how it is remembered; by default `f32`.
#[derive(Default)]
struct Stored {
    params: StorageType,
    grads: StorageType,
    precision: Precision,
}

impl Stored {
    /// The storage of a rule's tensors.
    fn storage(&self, rule: &impl Rule) -> Storage {
        let slots = rule.slots();
        Storage::new(self.params, self.grads, slots.kept_names(), &self.precision)
    }
}

/// Ways to store that people use: gradients alone, parameters with masters, everything in 16 bits.
fn storages() -> Vec<(&'static str, Stored)> {
    use StorageType::{Bf16, F16, F32};
    let with = |params, grads, state, masters, rounding| {
        let precision = Precision {
            state,
            masters,
            rounding,
            ..Precision::default()
        };
        Stored {
            params,
            grads,
            precision,
        }
    };
    let random = Rounding::Stochastic { seed: 0 };
    let nearest = Rounding::Nearest;
    vec![
        ("bf16_grads", with(F32, Bf16, F32, Masters::None, nearest)),
        ("bf16_masters", with(Bf16, Bf16, F32, Masters::F32, nearest)),
        (
            "bf16_rests",
            with(Bf16, Bf16, F32, Masters::LowBits, nearest),
        ),
        ("bf16", with(Bf16, Bf16, Bf16, Masters::None, nearest)),
        ("bf16_random", with(Bf16, Bf16, Bf16, Masters::None, random)),
        ("f16_masters", with(F16, F16, F32, Masters::F32, nearest)),
        ("f16", with(F16, F16, F16, Masters::None, nearest)),
    ]
}

fn of_rule(form: &str, rule: &impl Rule) -> Vec<Kernel> {
    of_variant(form, rule, &Stored::default(), |variant| variant)
}

const PATHS: [(ScalarPath, &str); 2] = [
    (ScalarPath::Immediates, "immediates"),
    (ScalarPath::Uniforms, "uniforms"),
];

fn of_variant(
    form: &str,
    rule: &impl Rule,
    stored: &Stored,
    of: impl Fn(KernelVariant) -> KernelVariant,
) -> Vec<Kernel> {
    let accesses = [
        ("vec4", Access::Vec4, 1),
        ("vec4_offset", Access::Vec4Offset, 1),
        ("scalar", Access::Scalar, 1),
        ("batch_vec4", Access::Vec4, BATCH),
        ("batch_scalar", Access::Scalar, BATCH),
    ];
    // What is rounded by random bits is in no batch.
    let accesses = match stored.storage(rule).is_stochastic {
        true => &accesses[..3],
        false => &accesses[..],
    };
    by_accesses(form, rule, stored, of, accesses)
}

fn by_accesses(
    form: &str,
    rule: &impl Rule,
    stored: &Stored,
    of: impl Fn(KernelVariant) -> KernelVariant,
    accesses: &[(&str, Access, usize)],
) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    let storage = stored.storage(rule);
    for (access_name, access, tensors) in accesses.iter().copied() {
        for (path, path_name) in PATHS {
            let variant = of(KernelVariant::new(rule, access, tensors).stored(storage));
            let name = format!("{form}.{access_name}.{path_name}");
            kernels.push(Kernel::new(name, variant, path));
        }
    }
    kernels
}
