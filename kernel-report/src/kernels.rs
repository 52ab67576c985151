//! The kernels that are looked at: every entry point, as the real forms compile it.

use anyhow::Result;
use serde::{Deserialize, Serialize};
use wgpu_optim::plan::Access;
use wgpu_optim::{
    AdamConfig, AmsGrad, AnyRule, KernelVariant, MomentumForm, RmsPropConfig, Rule, ScalarPath,
    SgdConfig, SgdConfigBuilder,
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
    /// That its rule keeps.
    pub slots: usize,
}

impl Kernel {
    /// A kernel as the library compiles it.
    pub fn new(name: String, rule: &impl Rule, variant: KernelVariant, path: ScalarPath) -> Self {
        Self {
            name,
            slots: rule.slots().kept().count(),
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

/// A configuration for every set of terms that the forms make in practice.
fn forms() -> Result<Vec<(&'static str, SgdConfig)>> {
    let plain = || SgdConfig::builder(0.1);
    let momentum = || plain().momentum(0.9);
    let decayed = |config: SgdConfigBuilder| config.weight_decay(0.01);
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

/// Every form and rule x access x road of the scalars, by names such as `heavy_ball.vec4.immediates`.
pub fn all() -> Result<Vec<Kernel>> {
    let mut kernels = Vec::new();
    for (form, config) in forms()? {
        kernels.extend(of_rule(form, &config));
    }
    // The first library's version of each rule, and what differs from that the most.
    for preset in AnyRule::presets().filter(|preset| preset.rule != "sgd") {
        let name = preset.rule.replace('-', "_");
        let is_there = |kernel: &Kernel| kernel.name.split('.').next() == Some(&name);
        if !kernels.iter().any(is_there) {
            kernels.extend(of_rule(&name, &(preset.config)(0.1)?));
        }
    }
    let amsgrad = AdamConfig::adamw(0.1).amsgrad(AmsGrad::OfAverage);
    kernels.extend(of_rule("adam_keras", &AdamConfig::keras(0.1).build()?));
    kernels.extend(of_rule("adamw_amsgrad", &amsgrad.build()?));
    let rmsprop = RmsPropConfig::builder(0.1).momentum(0.9).centered(true);
    kernels.extend(of_rule("rmsprop_all", &rmsprop.build()?));
    Ok(kernels)
}

fn of_rule(form: &str, rule: &impl Rule) -> Vec<Kernel> {
    let mut kernels = Vec::new();
    for (access_name, access, tensors) in [
        ("vec4", Access::Vec4, 1),
        ("vec4_offset", Access::Vec4Offset, 1),
        ("scalar", Access::Scalar, 1),
        ("batch_vec4", Access::Vec4, BATCH),
        ("batch_scalar", Access::Scalar, BATCH),
    ] {
        for (path, path_name) in [
            (ScalarPath::Immediates, "immediates"),
            (ScalarPath::Uniforms, "uniforms"),
        ] {
            let variant = KernelVariant::new(rule, access, tensors);
            let name = format!("{form}.{access_name}.{path_name}");
            kernels.push(Kernel::new(name, rule, variant, path));
        }
    }
    kernels
}
