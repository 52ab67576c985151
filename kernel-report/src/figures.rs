//! Figures of a kernel, from its driver and its assembly, as numbers that compare.

use anyhow::{Context as _, Result};
use serde::{Deserialize, Serialize};

use crate::radv::Executable;

/// The figures of one kernel on one GPU family. Latency and inverse throughput are the compiler's own estimates, in
/// clock cycles per wave.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Figures {
    pub instructions: u64,
    pub vgprs: u64,
    pub sgprs: u64,
    pub spills: u64,
    pub loads_16: u64,
    pub stores_16: u64,
    pub loads_4: u64,
    pub stores_4: u64,
    /// Loads and stores of any other width, and atomics.
    pub other_accesses: u64,
    /// Waits for vector memory before the last vector load: zero where all are in flight together.
    pub waits: u64,
    pub latency: u64,
    pub inverse_throughput: u64,
}

/// The meaning of a difference of a figure from the recorded one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Sense {
    /// Less is better.
    Cost,
    /// It is a property of the algorithm: any other number is wrong.
    Exact,
}

impl Figures {
    pub fn new(executable: &Executable) -> Result<Self> {
        let statistic = |name: &str| {
            executable
                .statistics
                .get(name)
                .copied()
                .with_context(|| format!("the driver has no statistic {name:?}"))
        };
        Ok(Self {
            instructions: statistic("Instructions")?,
            vgprs: statistic("VGPRs")?,
            sgprs: statistic("SGPRs")?,
            spills: statistic("Spilled VGPRs")? + statistic("Spilled SGPRs")?,
            latency: statistic("Latency")?,
            inverse_throughput: statistic("Inverse Throughput")?,
            ..Self::of_assembly(&executable.assembly)
        })
    }

    /// The memory accesses, the other figures zero.
    fn of_assembly(assembly: &str) -> Self {
        let mut figures = Self::default();
        let mut waits = 0;
        for line in assembly.lines() {
            match Instruction::of(line) {
                Instruction::Load { bytes } => {
                    figures.waits = waits;
                    match bytes {
                        Some(16) => figures.loads_16 += 1,
                        Some(4) => figures.loads_4 += 1,
                        _ => figures.other_accesses += 1,
                    }
                }
                Instruction::Store { bytes } => match bytes {
                    Some(16) => figures.stores_16 += 1,
                    Some(4) => figures.stores_4 += 1,
                    _ => figures.other_accesses += 1,
                },
                Instruction::Wait => waits += 1,
                Instruction::OtherAccess => figures.other_accesses += 1,
                Instruction::Other => {}
            }
        }
        figures
    }

    /// With the names of the columns.
    pub fn named(&self) -> [(&'static str, u64, Sense); 12] {
        use Sense::{Cost, Exact};
        [
            ("instructions", self.instructions, Cost),
            ("vgprs", self.vgprs, Cost),
            ("sgprs", self.sgprs, Cost),
            ("spills", self.spills, Cost),
            ("loads_16", self.loads_16, Exact),
            ("stores_16", self.stores_16, Exact),
            ("loads_4", self.loads_4, Exact),
            ("stores_4", self.stores_4, Exact),
            ("other_accesses", self.other_accesses, Exact),
            ("waits", self.waits, Cost),
            ("latency", self.latency, Cost),
            ("inverse_throughput", self.inverse_throughput, Cost),
        ]
    }
}

/// An instruction of GCN or RDNA, as far as vector memory is concerned. Scalar loads (`s_load`) fetch descriptors
/// and uniforms, not tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Instruction {
    Load {
        bytes: Option<u32>,
    },
    Store {
        bytes: Option<u32>,
    },
    /// An atomic.
    OtherAccess,
    /// For loads to arrive.
    Wait,
    Other,
}

impl Instruction {
    fn of(line: &str) -> Self {
        // What follows a semicolon is the encoding.
        let code = line.split(';').next().unwrap_or_default();
        let mut words = code.split_whitespace();
        let mnemonic = words.next().unwrap_or_default();
        if mnemonic.starts_with("s_waitcnt") {
            // One instruction waits for several counters; loads count down vmcnt.
            return if mnemonic == "s_waitcnt_vmcnt" || code.contains("vmcnt(") {
                Self::Wait
            } else {
                Self::Other
            };
        }
        let Some(access) = ["buffer_", "global_", "flat_", "scratch_"]
            .iter()
            .find_map(|space| mnemonic.strip_prefix(space))
        else {
            return Self::Other;
        };
        if let Some(width) = access.strip_prefix("load_") {
            let bytes = bytes(width);
            Self::Load { bytes }
        } else if let Some(width) = access.strip_prefix("store_") {
            let bytes = bytes(width);
            Self::Store { bytes }
        } else if access.starts_with("atomic") {
            Self::OtherAccess
        } else {
            // Cache control.
            Self::Other
        }
    }
}

/// Bytes of an access, by its name in GCN and RDNA 1 and 2, or in RDNA 3.
fn bytes(width: &str) -> Option<u32> {
    match width {
        "dword" | "b32" => Some(4),
        "dwordx2" | "b64" => Some(8),
        "dwordx3" | "b96" => Some(12),
        "dwordx4" | "b128" => Some(16),
        _ => None,
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn accesses_are_told_apart_by_width_and_kind() {
        let load = |bytes| Instruction::Load { bytes: Some(bytes) };
        let store = |bytes| Instruction::Store { bytes: Some(bytes) };
        for (line, expected) in [
            (
                "\tbuffer_load_dwordx4 v[4:7], v0, s[8:11], 0 offen ; e0381000 80020400",
                load(16),
            ),
            ("buffer_load_b128 v[4:7], v0, s[8:11], 0 offen", load(16)),
            ("global_load_dword v1, v[2:3], off", load(4)),
            ("flat_load_b32 v1, v[2:3]", load(4)),
            ("buffer_load_dwordx2 v[4:5], v0, s[8:11], 0", load(8)),
            ("buffer_load_dwordx3 v[4:6], v0, s[8:11], 0", load(12)),
            (
                "buffer_load_ubyte v4, v0, s[8:11], 0",
                Instruction::Load { bytes: None },
            ),
            ("buffer_store_dwordx4 v[4:7], v0, s[8:11], 0", store(16)),
            ("buffer_store_b128 v[4:7], v0, s[8:11], 0", store(16)),
            ("scratch_store_dword off, v1, s0", store(4)),
            (
                "buffer_atomic_add v0, v1, s[8:11], 0",
                Instruction::OtherAccess,
            ),
            // Scalar memory, cache control, arithmetic, labels, nothing.
            ("s_load_dwordx4 s[8:11], s[2:3], null", Instruction::Other),
            ("buffer_gl0_inv", Instruction::Other),
            ("v_fmac_f32_e32 v8, s5, v12", Instruction::Other),
            ("BB1:", Instruction::Other),
            ("", Instruction::Other),
        ] {
            assert_eq!(Instruction::of(line), expected, "{line}");
        }
    }

    #[test]
    fn only_waits_for_vector_loads_count() {
        for (line, waits) in [
            ("\ts_waitcnt vmcnt(0)   ; bf8c3f70", true),
            ("s_waitcnt vmcnt(2) lgkmcnt(0)", true),
            ("s_waitcnt lgkmcnt(0)", false),
            ("s_waitcnt_vscnt null, 0x0", false),
            ("s_waitcnt_depctr 0xffe3", false),
        ] {
            assert_eq!(Instruction::of(line) == Instruction::Wait, waits, "{line}");
        }
    }

    #[test]
    fn waits_count_up_to_the_last_load() {
        let together = "buffer_load_dwordx4 a\nbuffer_load_dwordx4 b\ns_waitcnt vmcnt(0)\n\
                        buffer_store_dwordx4 a";
        let figures = Figures::of_assembly(together);
        assert_eq!((figures.loads_16, figures.stores_16), (2, 1));
        assert_eq!(figures.waits, 0);

        let apart = "buffer_load_dwordx4 a\ns_waitcnt vmcnt(0)\nbuffer_store_dwordx4 a\n\
                     buffer_load_dword b\ns_waitcnt vmcnt(0)";
        let figures = Figures::of_assembly(apart);
        assert_eq!((figures.loads_16, figures.loads_4), (1, 1));
        assert_eq!(figures.waits, 1);
    }

    #[test]
    fn a_statistic_that_the_driver_does_not_have_is_named() {
        let executable = Executable {
            kernel: "k".to_owned(),
            statistics: [("Instructions".to_owned(), 3)].into(),
            assembly: String::new(),
        };
        let error = Figures::new(&executable).unwrap_err().to_string();
        assert_eq!(error, "the driver has no statistic \"VGPRs\"");
    }
}
