//! The WGSL of a rule with the frame around it.

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests;

use super::error::KernelError;
use super::scalars::{CONTROL_SCALARS, FRAME_SCALARS, ScalarPath, WIDE_SCALARS};
use super::wide::{self, Arrays};
use crate::plan::{Access, BATCH_WORKGROUP_SIZE};
use crate::rules::{MAX_SCALARS, Rule};
use crate::storage::Storage;

/// The beginning of every entry point's name. Every name of the frame begins with `wo_`, and no name of a rule does.
const PREFIX: &str = "wo_step_";

/// One compiled variant of a rule's shader: what [`Kernels`](crate::Kernels) hands to wgpu, for tools that compile or
/// inspect the WGSL themselves.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct KernelVariant {
    rule: RuleSource,
    access: Access,
    tensors: usize,
    storage: Storage,
    in_one_buffer: bool,
    in_vec4_pairs: bool,
    control: Option<Controls>,
}

/// What a control may do to gradients.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Controls {
    clips_values: bool,
}

/// What of a rule makes a difference to its kernels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RuleSource {
    stem: &'static str,
    wgsl: String,
    /// Names, and whether they are kept.
    slots: Vec<(&'static str, bool)>,
    terms: Vec<(&'static str, bool)>,
    scalars: &'static [&'static str],
}

impl RuleSource {
    fn of(rule: &impl Rule) -> Self {
        let slots = rule.slots();
        Self {
            stem: rule.stem(),
            wgsl: rule.wgsl(),
            slots: slots.iter().map(|slot| (slot.name, slot.is_kept)).collect(),
            terms: rule.terms(),
            scalars: rule.scalar_names(),
        }
    }

    /// The slots that are kept, in the order of their sections.
    fn kept(&self) -> impl Iterator<Item = &'static str> {
        let kept = self.slots.iter().filter(|(_, is_kept)| *is_kept);
        kept.map(|(name, _)| *name)
    }

    /// The rule, and the declarations of its scalars and slots.
    fn declarations(&self, path: ScalarPath, storage: &Storage, is_controlled: bool) -> String {
        let scalars = path.declaration();
        let members = |names: &mut dyn Iterator<Item = (String, &str)>| {
            // A struct of WGSL has a member at least.
            let members = names.map(|(name, kind)| format!("    {name}: {kind},\n"));
            let members: String = members.collect();
            if members.is_empty() {
                "    none: f32,\n".to_owned()
            } else {
                members
            }
        };
        let rules = self.scalars.iter();
        let wide = WIDE_SCALARS.iter().filter(|_| !storage.is_f32());
        let frames = FRAME_SCALARS.iter().chain(wide);
        let frames = frames.map(|name| ((*name).to_owned(), "u32"));
        let of_rule = rules.clone().map(|name| (format!("rule_{name}"), "f32"));
        // A control has them beside what it says.
        let of_control = of_rule.clone().filter(|_| is_controlled);
        let uniforms = of_rule.filter(|_| !is_controlled).chain(frames);
        let structs = [
            (
                "Scalars",
                members(&mut rules.clone().map(|name| ((*name).to_owned(), "f32"))),
            ),
            (
                "State",
                members(
                    &mut self
                        .slots
                        .iter()
                        .map(|(name, _)| ((*name).to_owned(), "vec4<f32>")),
                ),
            ),
            ("wo_Uniforms", members(&mut { uniforms })),
        ];
        let structs = structs.map(|(name, members)| format!("struct {name} {{\n{members}}}\n\n"));
        let control = if is_controlled {
            let of_frame = CONTROL_SCALARS.map(|(name, kind)| (name.to_owned(), kind));
            let members = members(&mut of_frame.into_iter().chain(of_control));
            let group = path.control_group().to_string();
            let hooks = include_str!("../../../shaders/frame/controlled.wgsl");
            format!("struct wo_Control {{\n{members}}}\n\n")
                + &hooks.replace("CONTROL_GROUP", &group)
        } else {
            include_str!("../../../shaders/frame/free.wgsl").to_owned()
        };
        let holder = if is_controlled { "wo_c" } else { "wo_k" };
        let scalars_of_rule = rules.map(|name| format!("{holder}.rule_{name}"));
        let scalars_of_rule: Vec<_> = scalars_of_rule.collect();
        let scalars_of_rule = format!(
            "fn wo_scalars() -> Scalars {{\n    return Scalars({});\n}}\n\n",
            scalars_of_rule.join(", ")
        );
        let key = format!(
            "fn wo_key() -> vec2<u32> {{\n    return vec2({holder}.key_x, {holder}.key_y);\n}}\n\n"
        );
        // The rule first, so that errors in it count its own lines.
        [
            &*self.wgsl,
            "\n",
            scalars,
            &structs.concat(),
            &control,
            &scalars_of_rule,
            if storage.is_stochastic { &key } else { "" },
        ]
        .concat()
    }

    /// The frame around the rule, for a tensor that is alone in its dispatch.
    fn piece(&self, storage: &Storage) -> String {
        if !storage.is_f32() {
            let frame = include_str!("../../../shaders/frame/wide.wgsl").to_owned();
            let slots: Vec<_> = self.kept().collect();
            let arrays = Arrays {
                suffix: "",
                section: "wo_k.section",
                storage: *storage,
                slots: &slots,
            };
            return frame + &wide::conversions(storage) + &arrays.with_ends();
        }
        let frame = include_str!("../../../shaders/frame/piece.wgsl").to_owned();
        let vec4 = self.loads_and_stores("vec4", "wo_state", "wo_k.section", |value| value);
        let element = |value| value + ".x";
        let scalar = self.loads_and_stores("scalar", "wo_state_scalar", "wo_k.section", element);
        frame + &vec4 + &scalar
    }

    /// The same for batches of so many tensors.
    fn batch(&self, access: Access, tensors: usize, storage: &Storage) -> String {
        let unit = match access {
            _ if !storage.is_f32() => "",
            Access::Vec4 | Access::Vec4Offset => {
                include_str!("../../../shaders/frame/unit_vec4.wgsl")
            }
            Access::Scalar => include_str!("../../../shaders/frame/unit_scalar.wgsl"),
        };
        let piece = self.piece(storage);
        let mut wgsl = format!("{piece}{unit}const wo_BATCH = {tensors};\n");
        let mut calls = String::new();
        let slots: Vec<_> = self.kept().collect();
        for tensor in 0..tensors {
            let frame = if storage.is_f32() {
                include_str!("../../../shaders/frame/batch.wgsl")
            } else {
                include_str!("../../../shaders/frame/wide_batch.wgsl")
            };
            wgsl += &frame.replace("TENSOR", &tensor.to_string());
            if storage.is_f32() {
                let section = format!("wo_section_of(arrayLength(&wo_params_{tensor}))");
                let stored = |value| format!("wo_stored({value})");
                let (name, state) = (tensor.to_string(), format!("wo_state_{tensor}"));
                wgsl += &self.loads_and_stores(&name, &state, &section, stored);
            } else {
                let arrays = Arrays {
                    suffix: &format!("_{tensor}"),
                    section: &format!("wo_units_{tensor}()"),
                    storage: *storage,
                    slots: &slots,
                };
                wgsl += &arrays.of_batch();
            }
            calls += &format!("    wo_tensor_{tensor}(invocation.x);\n");
        }
        wgsl + &format!(
            "@compute @workgroup_size({BATCH_WORKGROUP_SIZE})\n\
             fn wo_step_RULE_batch(@builtin(global_invocation_id) invocation: vec3<u32>) {{\n    \
             if wo_is_skipped() {{\n        return;\n    }}\n{calls}}}\n"
        )
    }

    /// The functions `load_NAME` and `store_NAME` for the state at `i` of an array.
    fn loads_and_stores(
        &self,
        name: &str,
        array: &str,
        section: &str,
        stored: impl Fn(String) -> String,
    ) -> String {
        let (mut loads, mut stores) = (String::new(), String::new());
        for (slot, field) in self.kept().enumerate() {
            let place = match slot {
                0 => format!("{array}[i]"),
                slot => format!("{array}[i + {slot}u * {section}]"),
            };
            loads += &format!("    s.{field} = vec4<f32>({place});\n");
            stores += &format!("    {place} = {};\n", stored(format!("s.{field}")));
        }
        format!(
            "fn wo_load_{name}(i: u32) -> State {{\n    var s: State;\n{loads}    return s;\n}}\n\n\
             fn wo_store_{name}(i: u32, s: State) {{\n{stores}}}\n\n"
        )
    }
}

/// Makes sure that a rule gives as many scalars as it names, by which the kernels are built.
pub(super) fn check_scalars(rule: &impl Rule) -> Result<(), KernelError> {
    let expected = rule.scalar_names().len();
    match rule.scalars(rule.phase(0)).as_slice().len() {
        actual if actual == expected && expected <= MAX_SCALARS => Ok(()),
        actual => Err(KernelError::Scalars {
            rule: rule.stem(),
            expected,
            actual,
        }),
    }
}

impl KernelVariant {
    /// A rule's kernel that reaches its elements by `access`, over so many tensors, each with bindings of its own, in
    /// the order of all parameters, all gradients, all states: more than one in a batch.
    #[must_use]
    pub fn new(rule: &impl Rule, access: Access, tensors: usize) -> Self {
        Self {
            rule: RuleSource::of(rule),
            access,
            tensors,
            storage: Storage::F32,
            in_one_buffer: false,
            in_vec4_pairs: false,
            control: None,
        }
    }

    /// The same over values that are stored like this.
    #[must_use]
    pub fn stored(mut self, storage: Storage) -> Self {
        self.storage = storage;
        self
    }

    /// The same for parameters and gradients in one buffer, which is then bound for writing throughout.
    #[must_use]
    pub fn in_one_buffer(mut self, in_one_buffer: bool) -> Self {
        self.in_one_buffer = in_one_buffer;
        self
    }

    /// The same with two vec4 per invocation of the vec4 entry point, or one: of an `f32` piece on a software adapter.
    #[must_use]
    pub fn in_vec4_pairs(mut self, in_vec4_pairs: bool) -> Self {
        self.in_vec4_pairs = in_vec4_pairs;
        self
    }

    /// The same under a control, which says whether the step is skipped, what becomes of gradients, and the rule's
    /// scalars, by a uniform buffer; with a largest gradient or without.
    #[must_use]
    pub fn controlled(mut self, clips_values: bool) -> Self {
        self.control = Some(Controls { clips_values });
        self
    }

    pub(super) const fn is_controlled(&self) -> bool {
        self.control.is_some()
    }

    pub(super) const fn is_in_one_buffer(&self) -> bool {
        self.in_one_buffer
    }

    pub(super) fn has_state(&self) -> bool {
        self.rule.kept().next().is_some() || self.storage.masters_bytes().is_some()
    }

    pub(super) const fn is_wide(&self) -> bool {
        !self.storage.is_f32()
    }

    pub(super) const fn tensors(&self) -> usize {
        self.tensors
    }

    /// How many scalars of the rule come with those of the frame.
    pub(super) const fn scalars(&self) -> usize {
        if self.is_controlled() {
            0
        } else {
            self.rule.scalars.len()
        }
    }

    /// The complete WGSL source for a road of the scalars.
    #[must_use]
    pub fn source(&self, path: ScalarPath) -> String {
        let (rule, storage) = (&self.rule, &self.storage);
        let frame = match self.tensors {
            0..=1 if self.in_vec4_pairs => {
                let state =
                    rule.loads_and_stores("vec4_pairs", "wo_state", "wo_section", |value| value);
                let pairs = include_str!("../../../shaders/frame/vec4_pairs.wgsl");
                rule.piece(storage) + pairs + &state
            }
            0..=1 => rule.piece(storage),
            tensors => rule.batch(self.access, tensors, storage),
        };
        let access = if self.in_one_buffer {
            "read_write"
        } else {
            "read"
        };
        let frame = frame
            .replace("RULE", rule.stem)
            .replace("GRADS_ACCESS", access);
        rule.declarations(path, storage, self.is_controlled()) + &frame
    }

    /// The entry point.
    #[must_use]
    pub fn entry_point(&self) -> String {
        let stem = self.rule.stem;
        match (self.tensors, self.access) {
            (0..=1, Access::Vec4 | Access::Vec4Offset) if self.in_vec4_pairs => {
                format!("{PREFIX}{stem}_vec4_pairs")
            }
            (0..=1, Access::Vec4 | Access::Vec4Offset) => format!("{PREFIX}{stem}"),
            (0..=1, Access::Scalar) => format!("{PREFIX}{stem}_scalar"),
            _ => format!("{PREFIX}{stem}_batch"),
        }
    }

    /// The pipeline's label.
    #[must_use]
    pub fn label(&self) -> String {
        let entry_point = self.entry_point();
        format!("wgpu_optim.{}", entry_point.trim_start_matches(PREFIX))
    }

    /// Values of the shader's `override`s.
    #[must_use]
    pub fn constants(&self) -> Vec<(&'static str, f64)> {
        let has_offset = ("wo_HAS_OFFSET", self.access == Access::Vec4Offset);
        let terms = self.rule.terms.iter().copied().chain([has_offset]);
        let clips = self
            .control
            .map(|control| ("wo_HAS_CLIP_VALUE", control.clips_values));
        let terms = terms.chain(clips);
        terms
            .map(|(name, has)| (name, f64::from(u8::from(has))))
            .collect()
    }
}
