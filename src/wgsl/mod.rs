//! The text of the kernels: the WGSL of a rule with the frame around it.
//!
//! It needs no device. For tools, and for hosts other than wgpu: these types change with every version.

mod error;
mod norm;
mod packing;
pub(crate) mod scalars;
pub(crate) mod signature;
mod template;
#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests;

pub use error::KernelError;
pub use norm::NormVariant;
pub use packing::packing;
pub use scalars::ScalarPath;
use template::Scope;

use crate::plan::{Access, BATCH_WORKGROUP_SIZE, WORKGROUP_SIZE};
use crate::rules::{MAX_SCALARS, MAX_SUMS, Rule};
use crate::storage::{Codec, Masters, Precision, Storage, StorageType};

/// The beginning of every entry point's name. Every name of the frame begins with `wo_`, and no name of a rule does.
const PREFIX: &str = "wo_step_";

/// A file of `shaders/`.
macro_rules! shader {
    ($file:literal) => {
        include_str!(concat!("../../shaders/", $file))
    };
}

/// The files in front of the accessors.
const DECLARATIONS: [&str; 5] = [
    shader!("frame/scalars.wgsl"),
    shader!("frame/rule.wgsl"),
    shader!("frame/unit.wgsl"),
    shader!("storage/words.wgsl"),
    shader!("storage/random.wgsl"),
];

/// The files that use the accessors.
const STEP: [&str; 2] = [shader!("storage/theta.wgsl"), shader!("frame/step.wgsl")];

/// The files that load and store the values of a codec.
const CODECS: [(Codec, &[&str]); 4] = [
    (Codec::F32, &[shader!("storage/f32.wgsl")]),
    (
        Codec::Bf16,
        &[shader!("storage/bf16.wgsl"), shader!("storage/half.wgsl")],
    ),
    (
        Codec::F16,
        &[shader!("storage/f16.wgsl"), shader!("storage/half.wgsl")],
    ),
    (Codec::LowBits, &[shader!("storage/rest.wgsl")]),
];

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
    measures: Option<Measures>,
}

/// The pass of a step that takes sums over tensors, before the one that updates them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Measures {
    /// As many invocations as a chunk's sums have parts, none of which waits for another.
    is_software: bool,
}

/// The parts that the sums of a chunk come in: `wo_PARTS` in `step.wgsl`.
pub(crate) const SUM_PARTS: u32 = 8;

/// The changes to gradients that a control may make.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
struct Controls {
    clips_values: bool,
}

/// The properties of a rule that make a difference to its kernels.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct RuleSource {
    stem: &'static str,
    wgsl: String,
    /// Names, and whether they are kept.
    slots: Vec<(&'static str, bool)>,
    terms: Vec<(&'static str, bool)>,
    scalars: &'static [&'static str],
    sums: &'static [&'static str],
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
            sums: rule.sums(),
        }
    }

    /// The slots that are kept, in the order of their sections.
    fn kept(&self) -> impl Iterator<Item = &'static str> {
        let kept = self.slots.iter().filter(|(_, is_kept)| *is_kept);
        kept.map(|(name, _)| *name)
    }
}

/// Makes sure that a rule gives as many scalars as it names, by which the kernels are built.
pub(crate) fn check_scalars(rule: &impl Rule) -> Result<(), KernelError> {
    let expected = rule.scalar_names().len();
    match rule.scalars(rule.phase(0)).as_slice().len() {
        actual if actual == expected && expected <= MAX_SCALARS => match rule.sums().len() {
            sums if sums <= MAX_SUMS => Ok(()),
            sums => Err(KernelError::Sums {
                rule: rule.stem(),
                most: MAX_SUMS,
                actual: sums,
            }),
        },
        actual => Err(KernelError::Scalars {
            rule: rule.stem(),
            expected,
            actual,
        }),
    }
}

impl KernelVariant {
    /// A rule's kernel that reaches its elements by `access`, over so many tensors, each with bindings of its own, in
    /// the order of all parameters, all gradients, all states: more than one in a batch. A rule that takes sums is always in
    /// chunks, of one tensor's bindings.
    #[must_use]
    pub fn new(rule: &impl Rule, access: Access, tensors: usize) -> Self {
        let of = StorageType::F32;
        let (access, tensors) = match rule.sums().is_empty() {
            true => (access, tensors),
            false => (access.in_chunks(), 1),
        };
        Self {
            rule: RuleSource::of(rule),
            access,
            tensors,
            storage: Storage::new(of, of, rule.slots().kept_names(), &Precision::default()),
            in_one_buffer: false,
            in_vec4_pairs: false,
            control: None,
            measures: None,
        }
    }

    /// Returns the kernel over values that are stored like this.
    #[must_use]
    pub fn stored(mut self, storage: Storage) -> Self {
        self.storage = storage;
        self
    }

    /// Returns the kernel for parameters and gradients in one buffer, which is then bound for writing throughout.
    #[must_use]
    pub fn in_one_buffer(mut self, in_one_buffer: bool) -> Self {
        self.in_one_buffer = in_one_buffer;
        self
    }

    /// Returns the kernel with two vec4 per invocation of the vec4 entry point, or one: of an `f32` piece on a software adapter.
    #[must_use]
    pub fn in_vec4_pairs(mut self, in_vec4_pairs: bool) -> Self {
        self.in_vec4_pairs = in_vec4_pairs;
        self
    }

    /// Returns the kernel under a control, which says whether the step is skipped, what becomes of gradients, and the rule's
    /// scalars, by a uniform buffer; with a largest gradient or without.
    #[must_use]
    pub fn controlled(mut self, clips_values: bool) -> Self {
        self.control = Some(Controls { clips_values });
        self
    }

    /// Returns the kernel that takes the rule's sums and updates nothing: with barriers, or as a software adapter wants it.
    #[must_use]
    pub fn measuring(mut self, is_software: bool) -> Self {
        self.measures = self.has_sums().then_some(Measures { is_software });
        self
    }

    /// Whether the rule takes sums.
    pub(crate) const fn has_sums(&self) -> bool {
        !self.rule.sums.is_empty()
    }

    /// Whether it takes the rule's sums and updates nothing.
    pub(crate) const fn is_measuring(&self) -> bool {
        self.measures.is_some()
    }

    /// The storage of its tensors.
    #[must_use]
    pub const fn storage(&self) -> &Storage {
        &self.storage
    }

    pub(crate) const fn is_controlled(&self) -> bool {
        self.control.is_some()
    }

    pub(crate) const fn is_in_one_buffer(&self) -> bool {
        self.in_one_buffer
    }

    pub(crate) fn has_state(&self) -> bool {
        !self.storage.state.is_empty()
    }

    pub(crate) fn is_wide(&self) -> bool {
        !self.storage.is_f32()
    }

    /// Whether workgroups look up which elements are theirs.
    pub(crate) const fn is_chunked(&self) -> bool {
        self.access.is_chunked()
    }

    const fn is_doubled(&self) -> bool {
        self.in_vec4_pairs && !self.access.is_scalar() && !self.access.is_chunked()
    }

    const fn is_batch(&self) -> bool {
        self.tensors > 1
    }

    pub(crate) const fn tensors(&self) -> usize {
        self.tensors
    }

    /// How many scalars of the rule come with those of the frame.
    pub(crate) const fn scalars(&self) -> usize {
        if self.is_controlled() {
            0
        } else {
            self.rule.scalars.len()
        }
    }

    /// The complete WGSL source for a path of the scalars.
    #[must_use]
    pub fn source(&self, path: ScalarPath) -> String {
        // The rule first, so that errors in it count its own lines.
        let mut wgsl = format!("{}\n", self.rule.wgsl);
        let mut add = |scope: &Scope, files: &[&str]| {
            wgsl.extend(files.iter().map(|file| scope.render(file)));
        };
        let scope = self.scope(path);
        add(&scope, &DECLARATIONS);
        let sections = self.sections();
        for (codec, files) in CODECS {
            let of_codec = sections.iter().filter(|(of, _)| *of == codec);
            let of_codec: Vec<_> = of_codec.map(|(_, section)| section.clone()).collect();
            if !of_codec.is_empty() {
                let scope = scope.clone().word("CODEC", codec.name());
                add(&scope.list("SECTIONS", of_codec), files);
            }
        }
        add(&scope, &STEP);
        wgsl
    }

    /// The names that the templates know.
    fn scope(&self, path: ScalarPath) -> Scope {
        let named = |word: &'static str| move |name: &str| Scope::default().word(word, name);
        let is_in_words = self.access.is_scalar();
        let in_pairs = self.is_wide() && is_in_words;
        let is_in_halves = self.is_wide() && !is_in_words;
        let parts = ["low"].into_iter().chain(is_in_halves.then_some("high"));
        let clips = self.control.is_some_and(|control| control.clips_values);
        let holder = if self.is_controlled() { "wo_c" } else { "wo_k" };
        let access = match self.in_one_buffer {
            true => "read_write",
            false => "read",
        };
        let lanes = match self.measures {
            _ if self.is_batch() => BATCH_WORKGROUP_SIZE,
            Some(Measures { is_software: true }) => SUM_PARTS,
            _ => WORKGROUP_SIZE,
        };
        let sum = |(index, name): (usize, &&'static str)| {
            Scope::default().word("SUM", name).word("INDEX", index)
        };
        let has_barriers = self.measures == Some(Measures { is_software: false });
        let tensors = self.tensors.max(1);
        let tensor = |tensor| {
            let scope = Scope::default().word("TENSOR", tensor);
            let scope = scope.word("PARAMS", tensor).word("GRADS", tensors + tensor);
            scope.word("STATE", 2 * tensors + tensor)
        };
        let rule = &self.rule;
        let slots = rule.slots.iter().map(|(name, _)| *name);
        Scope::default()
            .flag("IMMEDIATES", path == ScalarPath::Immediates)
            .flag("CONTROLLED", self.is_controlled())
            .flag("CLIPS", clips)
            .flag("WIDE", self.is_wide())
            .flag("VECTORS", !is_in_words)
            .flag("PAIRS", in_pairs)
            .flag("SECTIONED", !in_pairs || self.is_batch())
            .flag("OFFSET", is_in_words || self.access != Access::Vec4)
            .flag("CHUNKS", self.access.is_chunked())
            .flag("BATCH", self.is_batch())
            .flag("DOUBLED", self.is_doubled())
            .flag("MEASURES", self.is_measuring())
            .flag("BARRIERS", has_barriers)
            .flag("STOCHASTIC", self.storage.is_stochastic)
            .flag("MASTERS", self.storage.masters == Masters::F32)
            .flag("RESTS", self.storage.masters == Masters::LowBits)
            .word("ENTRY", self.entry_point())
            .word("HOLDER", holder)
            .word("GROUP", path.control_group())
            .word("ACCESS", access)
            .word("ITEMS", self.items(self.storage.params.into()))
            .word("ELEMS", self.access.unit_elems(&self.storage))
            .word("LANES", lanes)
            .list("PARTS", parts.map(named("PART")))
            .list("SCALARS", rule.scalars.iter().copied().map(named("SCALAR")))
            .list("SLOTS", slots.map(named("SLOT")))
            .list("SUMS", rule.sums.iter().enumerate().map(sum))
            .list("KEPT", rule.kept().map(named("SLOT")))
            .list("TENSORS", (0..tensors).map(tensor))
    }

    /// Items of a unit of values that are stored like this.
    fn items(&self, of: Codec) -> u32 {
        if self.is_wide() && of == Codec::F32 {
            2
        } else {
            1
        }
    }

    /// The arrays that are loaded and stored for every element: codecs, and what their files know of the section.
    fn sections(&self) -> Vec<(Codec, Scope)> {
        let Storage {
            params,
            grads,
            masters,
            is_stochastic,
            ..
        } = self.storage;
        // `first` items of the array lie before the section for each unit; `number` is the value's, for random bits.
        let section = |name: &str, array, codec: Codec, first: u32, number: usize| {
            let start = match first {
                0 => "0u".to_owned(),
                first => format!("wo_start_of({first}, at)"),
            };
            let is_random = is_stochastic && (number > 0 || masters == Masters::None);
            let scope = Scope::default()
                .word("SECTION", name)
                .word("ARRAY", array)
                .word("START", start)
                .word("NUMBER", number)
                .word("ITEMS", self.items(codec))
                .flag("STORED", array != "grads")
                .flag("ALIGNED", array != "grads" || self.is_batch())
                .flag("RANDOM", is_random);
            (codec, scope)
        };
        let mut sections = vec![section("grads", "grads", grads.into(), 0, 0)];
        // Low bits are loaded and stored with the parameters.
        if masters != Masters::LowBits {
            sections.push(section("params", "params", params.into(), 0, 0));
        }
        let slots = self.rule.kept().map(|slot| format!("slot_{slot}"));
        let names = slots.zip(1..).chain([("masters".to_owned(), 0)]);
        let mut first = 0;
        for (codec, (name, number)) in self.storage.state.iter().zip(names) {
            sections.push(section(&name, "state", *codec, first, number));
            first += self.items(*codec);
        }
        sections
    }

    /// The entry point.
    #[must_use]
    pub fn entry_point(&self) -> String {
        let suffix = match self.access {
            _ if self.is_batch() => "_batch",
            Access::Scalar => "_scalar",
            Access::Vec4Chunks => "_chunks",
            Access::ScalarChunks => "_scalar_chunks",
            Access::Vec4 | Access::Vec4Offset if self.in_vec4_pairs => "_vec4_pairs",
            Access::Vec4 | Access::Vec4Offset => "",
        };
        let sums = if self.is_measuring() { "_sums" } else { "" };
        format!("{PREFIX}{}{suffix}{sums}", self.rule.stem)
    }

    /// The pipeline's label.
    #[must_use]
    pub fn label(&self) -> String {
        let entry_point = self.entry_point();
        format!("wgpu_optim.{}", entry_point.trim_start_matches(PREFIX))
    }

    /// Values of the shader's `override`s: the rule's terms.
    #[must_use]
    pub fn constants(&self) -> Vec<(&'static str, f64)> {
        let terms = self.rule.terms.iter();
        terms
            .map(|(name, has)| (*name, f64::from(u8::from(*has))))
            .collect()
    }
}
