//! How kernels load and store where something is stored in 16 bits: WGSL by type, for `shaders/frame/wide.wgsl`.

use std::fmt::Write as _;

use crate::storage::{Masters, Storage, StorageType};

/// Functions for the arrays of one tensor. Their names, and those of the arrays, end in `suffix`.
pub(super) struct Arrays<'a> {
    pub(super) suffix: &'a str,
    /// Units from one section of the state to the next.
    pub(super) section: &'a str,
    pub(super) storage: Storage,
    /// The slots that are kept.
    pub(super) slots: &'a [&'static str],
}

/// The functions that unpack and round what is stored like this.
pub(super) fn conversions(storage: &Storage) -> String {
    let types = [storage.params, storage.grads, storage.state];
    let mut wgsl = String::new();
    if types.contains(&StorageType::Bf16) {
        wgsl += include_str!("../../shaders/storage/bf16.wgsl");
    }
    if types.contains(&StorageType::F16) {
        wgsl += include_str!("../../shaders/storage/f16.wgsl");
    }
    if storage.masters == Masters::Rest {
        wgsl += include_str!("../../shaders/storage/rest.wgsl");
    }
    if storage.is_stochastic {
        wgsl += include_str!("../../shaders/storage/random.wgsl");
    }
    wgsl
}

/// A value for every element, in an array of its own or in a section of one.
#[derive(Clone, Copy)]
struct Values<'a> {
    array: &'a str,
    /// How many vec4 its section starts after the array, in sections.
    base: u32,
    of: StorageType,
    /// Which of the tensor's values it is, for random bits.
    number: u32,
}

impl Arrays<'_> {
    /// The functions of a tensor that is alone in its dispatch, those of its ends included.
    pub(super) fn with_ends(&self) -> String {
        self.eights() + &self.pairs()
    }

    /// The functions of a tensor in a batch.
    pub(super) fn of_batch(&self) -> String {
        let suffix = self.suffix;
        let per_unit = vec4s(self.storage.params);
        format!(
            "fn wo_units{suffix}() -> u32 {{\n    return arrayLength(&wo_params{suffix}) / {per_unit}u;\n}}\n\n"
        ) + &self.eights()
    }

    fn params(&self) -> Values<'_> {
        Values {
            array: "wo_params",
            base: 0,
            of: self.storage.params,
            number: 0,
        }
    }

    fn grads(&self) -> Values<'_> {
        Values {
            array: "wo_grads",
            base: 0,
            of: self.storage.grads,
            number: 0,
        }
    }

    /// The slots that are kept, by the fields of `State`.
    fn slots(&self) -> impl Iterator<Item = (&'static str, Values<'_>)> {
        (0..).zip(self.slots).map(|(slot, field)| {
            let values = Values {
                array: "wo_state",
                base: slot * vec4s(self.storage.state),
                of: self.storage.state,
                number: slot + 1,
            };
            (*field, values)
        })
    }

    /// The masters, behind the slots: words of which bits are, or the rests, which are as long as bf16.
    fn masters(&self) -> Values<'_> {
        let slots = self.slots.len() as u32;
        Values {
            array: "wo_state",
            base: slots * vec4s(self.storage.state),
            of: match self.storage.masters {
                Masters::Rest => StorageType::Bf16,
                _ => StorageType::F32,
            },
            number: 0,
        }
    }

    /// A vec4 of values at the unit `i`.
    fn vec4_at(&self, values: Values<'_>, offset: u32) -> String {
        let Self {
            suffix, section, ..
        } = self;
        let i = match vec4s(values.of) {
            1 => "i".to_owned(),
            _ => format!("2u * i + {offset}u"),
        };
        match values.base {
            0 => format!("{}{suffix}[{i}]", values.array),
            base => format!("{}{suffix}[{base}u * {section} + {i}]", values.array),
        }
    }

    fn load(&self, values: Values<'_>) -> String {
        match values.of {
            StorageType::F32 => format!(
                "wo_Eight({}, {})",
                self.vec4_at(values, 0),
                self.vec4_at(values, 1)
            ),
            of => format!("wo_eight_{}({})", of.name(), self.vec4_at(values, 0)),
        }
    }

    /// Statements that store `low` and `high`.
    fn store(&self, values: Values<'_>, low: &str, high: &str) -> String {
        match values.of {
            StorageType::F32 => format!(
                "    {} = {low};\n    {} = {high};\n",
                self.vec4_at(values, 0),
                self.vec4_at(values, 1)
            ),
            _ => format!(
                "    {} = wo_packed({}, {});\n",
                self.vec4_at(values, 0),
                self.rounded(values, low, "8u * i"),
                self.rounded(values, high, "8u * i + 4u"),
            ),
        }
    }

    /// Four values from this element of the binding on, in 16 bits each.
    fn rounded(&self, values: Values<'_>, bits: &str, element: &str) -> String {
        let of = values.of.name();
        let is_master = values.number == 0 && self.storage.masters != Masters::None;
        if self.storage.is_stochastic && !is_master {
            let number = values.number;
            format!("wo_stochastic_{of}({bits}, wo_random(wo_k.index + {element}, {number}u))")
        } else {
            format!("wo_nearest_{of}({bits})")
        }
    }

    fn eights(&self) -> String {
        let suffix = self.suffix;
        let [params, grads, masters] = [self.params(), self.grads(), self.masters()];
        let (load_theta, store_theta) = match self.storage.masters {
            Masters::None => (
                format!("    return {};\n", self.load(params)),
                self.store(params, "theta.low", "theta.high"),
            ),
            Masters::F32 => (
                format!(
                    "    let masters = {};\n    let low = masters.low == vec4(0u);\n    \
                     let high = masters.high == vec4(0u);\n    if any(low) || any(high) {{\n        \
                     let params = {};\n        return wo_Eight(select(masters.low, params.low, low), \
                     select(masters.high, params.high, high));\n    }}\n    return masters;\n",
                    self.load(masters),
                    self.load(params)
                ),
                self.store(masters, "theta.low", "theta.high")
                    + &self.store(params, "theta.low", "theta.high"),
            ),
            Masters::Rest => {
                let [words, rests] = [params, masters].map(|values| self.vec4_at(values, 0));
                (
                    format!(
                        "    let words = {words};\n    let rests = {rests};\n    return \
                         wo_Eight(wo_join_bf16(words.xy, rests.xy), wo_join_bf16(words.zw, rests.zw));\n"
                    ),
                    format!(
                        "    {words} = wo_packed(wo_split_bf16(theta.low), wo_split_bf16(theta.high));\n    {rests} = \
                         wo_packed(theta.low & vec4(0xffffu), theta.high & vec4(0xffffu));\n"
                    ),
                )
            }
        };
        let (mut loads, mut stores) = (String::new(), String::new());
        for (field, values) in self.slots() {
            // Writing to a string cannot fail.
            let _ = write!(
                loads,
                "    {{\n        let eight = {};\n        (*low).{field} = bitcast<vec4<f32>>(eight.low);\n        \
                 (*high).{field} = bitcast<vec4<f32>>(eight.high);\n    }}\n",
                self.load(values)
            );
            let [low, high] =
                ["low", "high"].map(|half| format!("bitcast<vec4<u32>>({half}.{field})"));
            stores += &self.store(values, &low, &high);
        }
        format!(
            "fn wo_load_theta{suffix}(i: u32) -> wo_Eight {{\n{load_theta}}}\n\n\
             fn wo_store_theta{suffix}(i: u32, theta: wo_Eight) {{\n{store_theta}}}\n\n\
             fn wo_load_grads{suffix}(i: u32) -> wo_Eight {{\n    return {};\n}}\n\n\
             fn wo_load_state{suffix}(i: u32, low: ptr<function, State>, high: ptr<function, State>) {{\n{loads}}}\n\n\
             fn wo_store_state{suffix}(i: u32, low: State, high: State) {{\n{stores}}}\n\n",
            self.load(grads)
        )
    }

    /// The word of a pair `i`, or of its first element.
    fn word_at(&self, values: Values<'_>, offset: u32) -> String {
        let i = match values.of {
            StorageType::F32 => format!("2u * i + {offset}u"),
            _ => "i".to_owned(),
        };
        // A section is counted in elements here, and four words make a vec4 of eight or four elements.
        match values.base {
            0 => format!("{}_scalar[{i}]", values.array),
            base => format!(
                "{}_scalar[{base}u * (wo_k.section / 2u) + {i}]",
                values.array
            ),
        }
    }

    fn load_pair(&self, values: Values<'_>) -> String {
        let word = self.word_at(values, 0);
        match values.of {
            StorageType::F32 => format!("vec4({word}, {}, 0u, 0u)", self.word_at(values, 1)),
            of => format!("wo_unpack_{}(vec2({word}, 0u))", of.name()),
        }
    }

    fn store_pair(&self, values: Values<'_>, bits: &str) -> String {
        let word = self.word_at(values, 0);
        match values.of {
            StorageType::F32 => format!(
                "    if mine.x {{\n        {word} = {bits}.x;\n    }}\n    if mine.y {{\n        {} = {bits}.y;\n    }}\n",
                self.word_at(values, 1)
            ),
            _ => format!(
                "    {word} = wo_merged({word}, {}, mine);\n",
                self.rounded(values, bits, "2u * i")
            ),
        }
    }

    fn pairs(&self) -> String {
        let [params, grads, masters] = [self.params(), self.grads(), self.masters()];
        let (load_theta, store_theta) = match self.storage.masters {
            Masters::None => (
                format!("    return {};\n", self.load_pair(params)),
                self.store_pair(params, "theta"),
            ),
            Masters::F32 => (
                format!(
                    "    let masters = {};\n    return select(masters, {}, masters == vec4(0u));\n",
                    self.load_pair(masters),
                    self.load_pair(params)
                ),
                self.store_pair(masters, "theta") + &self.store_pair(params, "theta"),
            ),
            Masters::Rest => {
                let [word, rest] = [params, masters].map(|values| self.word_at(values, 0));
                (
                    format!("    return wo_join_bf16(vec2({word}, 0u), vec2({rest}, 0u));\n"),
                    format!(
                        "    {word} = wo_merged({word}, wo_split_bf16(theta), mine);\n    {rest} = \
                         wo_merged({rest}, theta & vec4(0xffffu), mine);\n"
                    ),
                )
            }
        };
        let load_grads = match grads.of {
            StorageType::F32 => {
                "vec4(wo_grads_scalar[element], wo_grads_scalar[element + 1u], 0u, 0u)".to_owned()
            }
            of => {
                let half = |element: &str| {
                    format!("wo_half_of(wo_grads_scalar[({element}) / 2u], {element})")
                };
                format!(
                    "wo_unpack_{}(vec2({} | ({} << 16u), 0u))",
                    of.name(),
                    half("element"),
                    half("element + 1u")
                )
            }
        };
        let (mut loads, mut stores) = (String::new(), String::new());
        for (field, values) in self.slots() {
            let pair = self.load_pair(values);
            let _ = writeln!(loads, "    (*s).{field} = bitcast<vec4<f32>>({pair});");
            let bits = format!("bitcast<vec4<u32>>(s.{field})");
            stores += &self.store_pair(values, &bits);
        }
        format!(
            "fn wo_load_theta_pair(i: u32) -> vec4<u32> {{\n{load_theta}}}\n\n\
             fn wo_store_theta_pair(i: u32, theta: vec4<u32>, mine: vec2<bool>) {{\n{store_theta}}}\n\n\
             fn wo_load_grads_pair(element: u32) -> vec4<u32> {{\n    return {load_grads};\n}}\n\n\
             fn wo_load_state_pair(i: u32, s: ptr<function, State>) {{\n{loads}}}\n\n\
             fn wo_store_state_pair(i: u32, s: State, mine: vec2<bool>) {{\n{stores}}}\n\n"
        )
    }
}

/// Vec4 that eight values fill.
const fn vec4s(of: StorageType) -> u32 {
    match of {
        StorageType::F32 => 2,
        StorageType::Bf16 | StorageType::F16 => 1,
    }
}
