use naga::back::PipelineConstants;
use naga::back::pipeline_constants::process_overrides;
use naga::valid::{Capabilities, ValidationFlags, Validator};

use std::collections::{BTreeSet, HashMap};

use super::scalars::{CONTROL_BYTES, CONTROL_SCALARS, FRAME_SCALARS, Uniforms, WIDE_SCALARS};
use super::*;
use crate::plan::MAX_BATCH_PIECES;
use crate::rules::sgd::{MomentumForm, Terms};
use crate::rules::{
    AdamConfig, AmsGrad, AnyRule, ConfigError, RmsPropConfig, Scalars, SgdConfig, Slot, Slots,
};
use crate::storage::Rounding;

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

/// A configuration for every set of terms of the momentum family, and every rule as every library has it.
fn configs() -> Vec<AnyRule> {
    let mut configs: Vec<AnyRule> = Vec::new();
    for (momentum, form) in [
        (0.0, MomentumForm::HeavyBall),
        (0.9, MomentumForm::HeavyBall),
        (0.9, MomentumForm::LrInside),
    ] {
        for flags in 0..8 {
            let has = |bit: u32| flags >> bit & 1 == 1;
            let config = SgdConfig::builder(0.1)
                .momentum(momentum)
                .form(form)
                .nesterov(has(0) && momentum != 0.0)
                .coupled_weight_decay(if has(1) { 0.01 } else { 0.0 })
                .decoupled_weight_decay(if has(2) { 0.01 } else { 0.0 })
                .build()
                .unwrap();
            if !configs.iter().any(|other| other.terms() == config.terms()) {
                configs.push(config.into());
            }
        }
    }
    assert_eq!(configs.len(), Terms::all().count());
    configs.extend(AnyRule::presets().map(|preset| preset.config(0.1).unwrap()));
    let amsgrad = AdamConfig::adamw(0.1).amsgrad(AmsGrad::OfAverage);
    let rmsprop = RmsPropConfig::builder(0.1).momentum(0.9).centered(true);
    configs.push(amsgrad.build().unwrap().into());
    configs.push(rmsprop.build().unwrap().into());
    configs
}

fn constants(variant: &KernelVariant) -> PipelineConstants {
    let constants = variant.constants().into_iter();
    constants
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

/// Every access to one tensor.
fn alone() -> impl Iterator<Item = (Access, usize)> {
    let accesses = Access::ALL.into_iter().chain(Access::CHUNKS);
    accesses.map(|access| (access, 1))
}

#[test]
fn every_variant_that_the_host_can_ask_for_is_valid() {
    let alone = alone();
    let batches = (2..=MAX_BATCH_PIECES as usize)
        .flat_map(|tensors| [Access::Vec4, Access::Scalar].map(|access| (access, tensors)));
    let accesses: Vec<_> = alone.chain(batches).collect();
    for path in PATHS {
        let mut parsed = HashMap::new();
        for config in configs() {
            let flags = [(false, false), (true, false), (false, true), (true, true)];
            let placed = accesses
                .iter()
                .flat_map(|at| flags.map(|flags| (at, flags)));
            for ((access, tensors), (in_one_buffer, in_pairs)) in placed {
                let variant = KernelVariant::new(&config, *access, *tensors);
                let variant = variant.in_one_buffer(in_one_buffer);
                let variant = variant.in_vec4_pairs(*tensors == 1 && in_pairs);
                let source = variant.source(path);
                let (module, info) = parsed
                    .entry(source)
                    .or_insert_with_key(|source| parse(path, source));
                let entry_point = variant.entry_point();
                let entry_point = Some((naga::ShaderStage::Compute, entry_point.as_str()));
                // Resolves the overrides and validates what comes out.
                process_overrides(module, info, entry_point, &constants(&variant)).unwrap();
            }
        }
    }
}

/// Bytes that one invocation moves between the tensor bindings and itself.
fn bytes_moved(variant: &KernelVariant, path: ScalarPath) -> u64 {
    let (module, info) = parse(path, &variant.source(path));
    let entry_point = variant.entry_point();
    let entry_point = Some((naga::ShaderStage::Compute, entry_point.as_str()));
    // What comes out has this entry point alone.
    let (module, info) =
        process_overrides(&module, &info, entry_point, &constants(variant)).unwrap();
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
                // One round.
                Statement::Loop {
                    ref body,
                    ref continuing,
                    ..
                } => nested(body) + nested(continuing),
                Statement::Return { .. } | Statement::Break | Statement::ControlBarrier(_) => 0,
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
    for path in PATHS {
        for config in elementwise(configs()) {
            let alone = Access::ALL.map(|access| (access, 1));
            let batched = [Access::Vec4, Access::Scalar];
            let batched = batched.map(|access| (access, MAX_BATCH_PIECES as usize));
            for (access, tensors) in alone.into_iter().chain(batched) {
                let variant = KernelVariant::new(&config, access, tensors);
                let elems = u64::from(access.unit_elems(&Storage::default())) * tensors as u64;
                assert_eq!(
                    bytes_moved(&variant, path),
                    config.bytes_per_elem() * elems,
                    "{path:?} {variant:?}"
                );
                if tensors == 1 && access != Access::Scalar {
                    let pairs = variant.in_vec4_pairs(true);
                    let bytes = 2 * config.bytes_per_elem() * elems;
                    assert_eq!(bytes_moved(&pairs, path), bytes, "{path:?} {pairs:?}");
                }
            }
        }
    }
}

/// The rules whose step is one pass.
fn elementwise(mut rules: Vec<AnyRule>) -> Vec<AnyRule> {
    rules.retain(|rule| rule.sums().is_empty());
    rules
}

/// A workgroup looks up its chunk, and writes the sums of it or reads those over the tensor.
#[test]
fn sums_move_the_bytes_of_both_passes() {
    let rules = configs().into_iter().filter(|rule| !rule.sums().is_empty());
    for (rule, path) in rules.flat_map(|rule| PATHS.map(|path| (rule.clone(), path))) {
        for access in Access::CHUNKS {
            let update = KernelVariant::new(&rule, access, 1);
            let elems = u64::from(access.unit_elems(&Storage::default()));
            let updated = bytes_moved(&update, path) - 16 - 32;
            for is_software in [false, true] {
                let measuring = update.clone().measuring(is_software);
                let measured = bytes_moved(&measuring, path) - 16 - 16;
                let slots = rule.slots().kept().count() as u64;
                assert_eq!(measured, 4 * (2 + slots) * elems, "{measuring:?}");
                assert_eq!(measured + updated, rule.bytes_per_elem() * elems);
            }
        }
    }
}

/// Both passes over every way to store, under a control and without.
#[test]
fn sums_over_every_way_to_store_are_valid() {
    let rules = kinds().into_iter().filter(|rule| !rule.sums().is_empty());
    for (rule, path) in rules.flat_map(|rule| PATHS.map(|path| (rule.clone(), path))) {
        for storage in storages(&rule.slots()) {
            for (access, is_software) in Access::CHUNKS.into_iter().zip([false, true]) {
                let update = KernelVariant::new(&rule, access, 1).stored(storage);
                for variant in [update.clone(), update.clone().controlled(true)] {
                    parse(path, &variant.source(path));
                    parse(path, &variant.measuring(is_software).source(path));
                }
            }
        }
    }
}

#[test]
fn chunks_move_the_bytes_of_the_step_and_an_entry_of_their_table() {
    let configs = configs();
    let slots = configs[0].slots();
    for storage in [all_f32(&slots)].into_iter().chain(storages(&slots)) {
        for access in Access::CHUNKS {
            let variant = KernelVariant::new(&configs[0], access, 1).stored(storage);
            // What is written by the word is read before.
            if storage.is_stochastic || (access.is_scalar() && !storage.is_f32()) {
                continue;
            }
            let elems = u64::from(access.unit_elems(&storage));
            let expected = most_bytes(&storage) * elems + 16;
            assert_eq!(bytes_moved(&variant, PATHS[0]), expected, "{variant:?}");
        }
    }
}

/// Everything as f32.
fn all_f32(slots: &Slots) -> Storage {
    let of = StorageType::F32;
    Storage::new(of, of, slots.kept_names(), &Precision::default())
}

/// Every way to store a tensor whose rule has these slots, but for that all of f32; of two slots the second is also of
/// another type than the first.
fn storages(slots: &Slots) -> BTreeSet<Storage> {
    let mut storages = BTreeSet::new();
    let types = StorageType::ALL;
    let pairs = types.into_iter().flat_map(|p| types.map(|g| (p, g)));
    for (params, grads) in pairs {
        for (state, masters) in types
            .into_iter()
            .flat_map(|s| [Masters::None, Masters::F32, Masters::LowBits].map(|m| (s, m)))
        {
            for rounding in [Rounding::Nearest, Rounding::Stochastic { seed: 0 }] {
                let precision = Precision {
                    state,
                    masters,
                    rounding,
                    ..Precision::default()
                };
                let storage = Storage::new(params, grads, slots.kept_names(), &precision);
                storages.insert(storage);
                if let ([first, _], true) = (storage.slots(), params == grads) {
                    let mixed = types.map(|second| {
                        [*first, second.into()]
                            .into_iter()
                            .chain(storage.masters.codec())
                    });
                    storages.extend(mixed.map(|state| Storage {
                        state: state.collect(),
                        ..storage
                    }));
                }
            }
        }
    }
    storages.retain(|storage| !storage.is_f32());
    storages
}

/// One configuration of each rule.
fn kinds() -> Vec<AnyRule> {
    let mut kinds: Vec<AnyRule> = Vec::new();
    for config in configs() {
        if kinds.iter().all(|other| other.stem() != config.stem()) {
            kinds.push(config);
        }
    }
    kinds
}

/// Bytes that a step moves per element where every master is zero: it then reads the parameters.
fn most_bytes(storage: &Storage) -> u64 {
    let params = match storage.masters {
        Masters::F32 => storage.params.bytes(),
        _ => 0,
    };
    storage.bytes_per_elem() + params
}

#[test]
fn every_way_to_store_is_valid_and_moves_the_bytes_that_it_says() {
    for config in elementwise(kinds()) {
        let slots = config.slots();
        for storage in storages(&slots) {
            let all = [
                (Access::Vec4, 1),
                (Access::Vec4Offset, 1),
                (Access::Scalar, 1),
                (Access::Vec4, 3),
                (Access::Scalar, 3),
            ];
            // Rules differ in what is around four elements, and the frame knows of that their slots alone.
            let all = if slots.kept().count() == 2 {
                &all[..]
            } else {
                &all[..1]
            };
            for (access, tensors) in all.iter().copied() {
                let variant = KernelVariant::new(&config, access, tensors).stored(storage);
                let path = PATHS[tensors % 2];
                let bytes = bytes_moved(&variant, path);
                // The ends read words that they write half of.
                if access != Access::Scalar {
                    let elems = u64::from(storage.unit_elems()) * tensors as u64;
                    assert_eq!(bytes, most_bytes(&storage) * elems, "{variant:?}");
                }
                let shared = variant.in_one_buffer(true);
                parse(path, &shared.source(path));
            }
        }
    }
}

#[test]
fn the_uniforms_of_sixteen_bits_lie_in_rust_as_in_wgsl() {
    let config = &configs()[0];
    let storage = storages(&config.slots()).pop_first().unwrap();
    let variant = KernelVariant::new(config, Access::Vec4, 1).stored(storage);
    let (module, _) = parse(PATHS[0], &variant.source(PATHS[0]));
    let mut types = module.types.iter();
    let uniforms = types.find(|(_, ty)| ty.name.as_deref() == Some("wo_Uniforms"));
    let naga::TypeInner::Struct { members, span } = &uniforms.unwrap().1.inner else {
        unreachable!("wo_Uniforms is a struct")
    };
    assert_eq!(*span, Uniforms::bytes(variant.scalars(), true));
    let names = members.iter().skip(variant.scalars());
    let names = names.map(|member| member.name.clone().unwrap());
    let frame = FRAME_SCALARS.iter().chain(&WIDE_SCALARS);
    assert!(names.eq(frame.map(|name| (*name).to_owned())));
}

#[test]
fn a_control_moves_no_tensors_bytes_and_lies_in_rust_as_in_wgsl() {
    for (config, path) in elementwise(kinds())
        .iter()
        .flat_map(|config| PATHS.map(|path| (config, path)))
    {
        let slots = config.slots();
        let storages = storages(&slots)
            .into_iter()
            .step_by(13)
            .chain([all_f32(&slots)]);
        for (index, storage) in storages.enumerate() {
            let tensors = [1, 3][index % 2];
            let variant = KernelVariant::new(config, Access::Vec4, tensors).stored(storage);
            let variant = variant.controlled(index % 2 == 0);
            let elems = u64::from(storage.unit_elems()) * tensors as u64;
            let expected = most_bytes(&storage) * elems;
            assert_eq!(bytes_moved(&variant, path), expected, "{variant:?}");

            let (module, _) = parse(path, &variant.source(path));
            let mut types = module.types.iter();
            let control = types.find(|(_, ty)| ty.name.as_deref() == Some("wo_Control"));
            let naga::TypeInner::Struct { members, span } = &control.unwrap().1.inner else {
                unreachable!("wo_Control is a struct")
            };
            let rules = config
                .scalar_names()
                .iter()
                .map(|name| format!("rule_{name}"));
            let names = CONTROL_SCALARS.map(str::to_owned).into_iter();
            let theirs = members.iter().map(|member| member.name.clone().unwrap());
            assert!(theirs.eq(names.chain(rules)));
            assert!(*span <= CONTROL_BYTES);
        }
    }
}

/// A rule of somebody who knows nothing of the frame: scalars, slots and functions by names that the frame has had, and
/// the builtins that it has shadowed.
#[derive(Clone, Debug, PartialEq)]
struct Unaware;

const UNAWARE: &str = "
const WORKGROUP_SIZE = 3;
override HAS_OFFSET: bool = true;
override HAS_CLIP_VALUE: bool = true;
alias Unit = f32;
struct Eight { x: f32 }
struct Uniforms { x: f32 }
struct Control { x: f32 }
var<private> section: f32 = 0.0;
var<private> params: f32 = 0.0;
var<private> grads: f32 = 0.0;
var<private> c: f32 = 1.0;
fn gradient(x: f32) -> f32 { return x; }
fn packed(x: f32) -> f32 { return gradient(x); }
fn stored(x: Unit) -> Unit { return packed(x) * c; }
fn merged(x: f32) -> f32 { return stored(x) + section; }
fn stepped(x: f32) -> f32 { return merged(x); }
fn random(x: f32) -> f32 { return stepped(x); }
fn rule_scalars() -> f32 { return random(1.0); }
fn is_skipped() -> bool { return rule_scalars() < f32(WORKGROUP_SIZE); }
fn load_vec4(i: u32) -> f32 { return f32(i); }
fn unit_of(i: u32) -> u32 { return i; }
fn unaware(x: f32) -> f32 { return x; }
fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
let mask = k;
let average = mix(g, (*state).low, vec4(mask.clip));
(*state).low = average;
(*state).high = clamp(select(average, g, is_skipped()), vec4(-mask.clip_threshold), vec4(k.clip_threshold));
return theta - unaware(k.skip + k.fresh + k.key_x + k.key_y) * k.unscale * fma((*state).high, vec4(k.clip_value), k.first * g);
}";

impl Rule for Unaware {
    fn stem(&self) -> &'static str {
        "unaware"
    }

    fn slots(&self) -> Slots {
        ["low", "high", "s", "at"].map(Slot::new).into()
    }

    fn terms(&self) -> Vec<(&'static str, bool)> {
        vec![("HAS_OFFSET", false), ("HAS_CLIP_VALUE", true)]
    }

    fn wgsl(&self) -> String {
        UNAWARE.into()
    }

    fn scalar_names(&self) -> &'static [&'static str] {
        &[
            "clip",
            "unscale",
            "clip_value",
            "clip_threshold",
            "skip",
            "fresh",
            "key_x",
            "key_y",
            "first",
        ]
    }

    fn scalars(&self, _phase: u64) -> Scalars {
        [1.0; 9].into()
    }

    fn lr(&self) -> f64 {
        1.0
    }

    fn with_lr(&self, _lr: f64) -> Result<Self, ConfigError> {
        Ok(self.clone())
    }
}

/// The names that a module declares.
fn names(module: &naga::Module) -> BTreeSet<String> {
    let functions = module
        .functions
        .iter()
        .map(|(_, function)| function.name.clone());
    let entry_points = module
        .entry_points
        .iter()
        .map(|entry| Some(entry.name.clone()));
    let globals = module
        .global_variables
        .iter()
        .map(|(_, global)| global.name.clone());
    let constants = module
        .constants
        .iter()
        .map(|(_, constant)| constant.name.clone());
    let overrides = module.overrides.iter().map(|(_, value)| value.name.clone());
    let types = module.types.iter().map(|(_, ty)| ty.name.clone());
    let all = functions.chain(entry_points).chain(globals);
    all.chain(constants)
        .chain(overrides)
        .chain(types)
        .flatten()
        .collect()
}

#[test]
fn no_name_of_the_frame_is_one_that_a_rule_may_want() {
    let of_rule = naga::front::wgsl::parse_str(&format!(
        "struct Scalars {{ {}: f32 }} struct State {{ low: vec4<f32>, high: vec4<f32>, s: f32, at: f32 }} {UNAWARE}",
        Unaware.scalar_names().join(": f32, ")
    ));
    let of_rule = names(&of_rule.unwrap());
    let batches = [(Access::Vec4, 3), (Access::Scalar, 2)];
    let placed: Vec<_> = alone().chain(batches).collect();
    let slots = Unaware.slots();
    let storages = storages(&slots).into_iter().chain([all_f32(&slots)]);
    for (index, storage) in storages.enumerate() {
        for (access, tensors) in &placed {
            if access.is_chunked() && storage.is_stochastic {
                continue;
            }
            let path = PATHS[(index + tensors) % 2];
            let variant = KernelVariant::new(&Unaware, *access, *tensors).stored(storage);
            let variant = variant.in_one_buffer(index % 4 < 2);
            let in_pairs = storage.is_f32() && *tensors == 1 && !access.is_scalar();
            for variant in [
                variant.clone(),
                variant.clone().in_vec4_pairs(in_pairs),
                variant.controlled(index % 3 == 0),
            ] {
                let (module, info) = parse(path, &variant.source(path));
                let entry_point = variant.entry_point();
                let entry_point = Some((naga::ShaderStage::Compute, entry_point.as_str()));
                process_overrides(&module, &info, entry_point, &constants(&variant)).unwrap();
                let mut of_frame = names(&module);
                of_frame.retain(|name| !of_rule.contains(name));
                assert!(
                    of_frame.iter().all(|name| name.starts_with("wo_")),
                    "{variant:?} declares {of_frame:?}"
                );
            }
        }
    }
}

#[test]
fn every_override_is_one_that_the_host_sets() {
    for config in configs() {
        let variant = KernelVariant::new(&config, Access::Vec4, 1);
        let path = ScalarPath::Uniforms;
        let (module, _) = parse(path, &variant.source(path));
        let names = module.overrides.iter();
        let names: BTreeSet<_> = names
            .map(|(_, value)| value.name.clone().unwrap())
            .collect();
        let set: BTreeSet<_> = constants(&variant).into_keys().collect();
        assert_eq!(names, set);
    }
}

#[test]
fn the_workgroup_is_as_large_as_the_planner_thinks() {
    let config = &configs()[0];
    let variants = alone().map(|(access, _)| KernelVariant::new(config, access, 1));
    let alone: Vec<_> = variants.collect();
    let pairs = alone[0].clone().in_vec4_pairs(true);
    let batches =
        [Access::Vec4, Access::Scalar].map(|access| KernelVariant::new(config, access, 2));
    for variant in alone.into_iter().chain([pairs]).chain(batches) {
        let (module, _) = parse(ScalarPath::Uniforms, &variant.source(ScalarPath::Uniforms));
        let [entry_point] = module.entry_points.as_slice() else {
            unreachable!("{variant:?} has an entry point")
        };
        let expected = if entry_point.name.ends_with("batch") {
            BATCH_WORKGROUP_SIZE
        } else {
            WORKGROUP_SIZE
        };
        assert_eq!(entry_point.name, variant.entry_point());
        assert_eq!(entry_point.workgroup_size, [expected, 1, 1]);
    }
}

#[test]
fn the_uniforms_lie_in_rust_as_in_wgsl() {
    let all = configs().into_iter();
    for (config, path) in all.flat_map(|config| PATHS.map(|path| (config.clone(), path))) {
        let variant = KernelVariant::new(&config, Access::Vec4, 1);
        let (module, _) = parse(path, &variant.source(path));
        let mut types = module.types.iter();
        let uniforms = types.find(|(_, ty)| ty.name.as_deref() == Some("wo_Uniforms"));
        let naga::TypeInner::Struct { members, span } = &uniforms.unwrap().1.inner else {
            unreachable!("wo_Uniforms is a struct")
        };
        let rules = config
            .scalar_names()
            .iter()
            .map(|name| format!("rule_{name}"));
        let names: Vec<_> = rules.chain(FRAME_SCALARS.map(str::to_owned)).collect();
        let offsets = (0..).step_by(4);
        let theirs = members
            .iter()
            .map(|member| (member.name.clone().unwrap(), member.offset));
        assert!(theirs.eq(names.into_iter().zip(offsets)));
        assert_eq!(*span, Uniforms::bytes(variant.scalars(), false));
        assert_eq!(config.scalars(0).as_slice().len(), variant.scalars());
    }
}
