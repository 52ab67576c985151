//! Variants of the momentum kernel that could have been the default, made from the real source by substitution.

use anyhow::{Context as _, Result, ensure};
use wgpu_optim::SgdConfig;
use wgpu_optim::plan::{Access, WORKGROUP_SIZE};
use wgpu_optim::wgsl::{KernelVariant, ScalarPath};

use crate::kernels::Kernel;

/// A kernel with its geometry.
#[derive(Clone, Debug)]
pub struct Candidate {
    pub kernel: Kernel,
    pub scalars: ScalarPath,
    pub workgroup_size: u32,
    pub elems_per_invocation: u32,
}

/// Which of several vec4 belong to an invocation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Spread {
    /// Vec4 that follow each other.
    Adjacent,
    /// One in each of as many runs of a workgroup's length, so that neighbours in the workgroup are in memory too.
    Strided,
}

/// The candidates with `part` in their names.
pub fn containing(part: &str) -> Result<Vec<Candidate>> {
    let mut candidates = all()?;
    candidates.retain(|candidate| candidate.kernel.name.contains(part));
    ensure!(
        !candidates.is_empty(),
        "no candidate has {part:?} in its name"
    );
    Ok(candidates)
}

/// The default first. Heavy ball: the terms change the arithmetic, not the memory traffic.
fn all() -> Result<Vec<Candidate>> {
    let default = default_kernel(ScalarPath::Immediates, Access::Vec4)?;
    let mut candidates = vec![default.clone()];
    for workgroup_size in [64, 128, 512] {
        candidates.push(default.with_workgroup_size(workgroup_size)?);
    }
    for spread in [Spread::Adjacent, Spread::Strided] {
        for vec4s in [2, 4] {
            for workgroup_size in [64, 128, 256, 512] {
                candidates.push(
                    default
                        .with_vec4s(vec4s, spread)?
                        .with_workgroup_size(workgroup_size)?,
                );
            }
        }
    }
    let uniforms = default_kernel(ScalarPath::Uniforms, Access::Vec4)?;
    let uniforms = uniforms.named("scalars in a uniform buffer");
    let offset = default_kernel(ScalarPath::Immediates, Access::Vec4Offset)?;
    let offset = offset.named("an offset for each array");

    let mut unchecked = default.named("no bounds checks");
    unchecked.kernel.bounds_checks = false;

    let scalar = default_kernel(ScalarPath::Immediates, Access::Scalar)?;
    let scalar = scalar.named("one element per invocation");

    let stored_early = default
        .named("velocity stored before the parameters are computed")
        .with(
            "    let theta_new = wo_stepped(wo_scalars(), theta, g, &s);\n    wo_store_state_0(at, s);\n",
            "    let k = wo_scalars();\n    let p = bitcast<vec4<f32>>(theta.low);\n    \
             let d = direction(k, p, bitcast<vec4<f32>>(g.low));\n    \
             s.low.momentum_buffer = next_velocity(k, s.low.momentum_buffer, d);\n    \
             wo_store_state_0(at, s);\n    let v = s.low.momentum_buffer;\n    \
             let theta_new = wo_Unit(bitcast<vec4<u32>>(next_params(k, p, v, d)));\n",
        )?;
    let one_row = default
        .named("grid of one row, not folded")
        .with("invocation.y * wo_k.row + invocation.x", "invocation.x")?;
    candidates.extend([uniforms, offset, unchecked, scalar, stored_early, one_row]);
    Ok(candidates)
}

fn default_kernel(scalars: ScalarPath, access: Access) -> Result<Candidate> {
    let config = SgdConfig::builder(0.1).momentum(0.9).build()?;
    let variant = KernelVariant::new(&config, access, 1);
    let name = format!("{WORKGROUP_SIZE} x 1 vec4 (default)");
    Ok(Candidate {
        elems_per_invocation: access.unit_elems(variant.storage()),
        kernel: Kernel::new(name, variant, scalars),
        scalars,
        workgroup_size: WORKGROUP_SIZE,
    })
}

impl Candidate {
    fn named(&self, name: &str) -> Self {
        let mut candidate = self.clone();
        candidate.kernel.name = name.to_owned();
        candidate
    }

    /// With `from`, which is in the source once, replaced.
    fn with(mut self, from: &str, to: &str) -> Result<Self> {
        let found = self.kernel.wgsl.matches(from).count();
        ensure!(found == 1, "{from:?} is in the shader {found} times");
        self.kernel.wgsl = self.kernel.wgsl.replace(from, to);
        Ok(self)
    }

    fn with_workgroup_size(&self, workgroup_size: u32) -> Result<Self> {
        let name = &self.kernel.name;
        let rest = name.split_once(" x ").map_or("", |(_, rest)| rest);
        let rest = rest.trim_end_matches(" (default)");
        let mut candidate = self.named(&format!("{workgroup_size} x {rest}")).with(
            &declaration(self.workgroup_size),
            &declaration(workgroup_size),
        )?;
        candidate.workgroup_size = workgroup_size;
        Ok(candidate)
    }

    /// Every statement of the entry point after its guard as often as there are vec4, each with names of its own: so
    /// all loads still come before the first store. The dispatch has to cover whole workgroups.
    fn with_vec4s(&self, vec4s: u32, spread: Spread) -> Result<Self> {
        let (before, rest) = self
            .kernel
            .wgsl
            .split_once("fn wo_step_sgd(")
            .context("the shader has no entry point wo_step_sgd")?;
        let (body, after) = rest
            .split_once("\n}\n")
            .context("the entry point has no end")?;
        let (guard, statements) = body
            .split_once("        return;\n    }\n")
            .context("the entry point has no guard")?;

        let first = match spread {
            Spread::Adjacent => format!("unit * {vec4s}u"),
            Spread::Strided => {
                format!(
                    "unit / wo_WORKGROUP_SIZE * wo_WORKGROUP_SIZE * {vec4s}u + unit % wo_WORKGROUP_SIZE"
                )
            }
        };
        let stride = match spread {
            Spread::Adjacent => "1u",
            Spread::Strided => "wo_WORKGROUP_SIZE",
        };
        let mut repeated = String::new();
        for j in 0..vec4s {
            repeated += &format!("    let unit_{j} = {first} + {j}u * {stride};\n");
        }
        let mut names = vec!["unit"];
        for statement in statements.lines().filter(|line| !line.trim().is_empty()) {
            let binding = |word| statement.trim().strip_prefix(word);
            if let Some(binding) = binding("let ").or_else(|| binding("var ")) {
                names.extend(binding.split(' ').next());
            }
            for j in 0..vec4s {
                repeated += &with_suffix(statement, &names, &format!("_{j}"));
                repeated.push('\n');
            }
        }
        let spread_name = match spread {
            Spread::Adjacent => "adjacent",
            Spread::Strided => "strided",
        };
        let mut candidate = self.named(&format!(
            "{} x {vec4s} vec4, {spread_name}",
            self.workgroup_size
        ));
        candidate.elems_per_invocation = 4 * vec4s;
        candidate.kernel.wgsl =
            format!("{before}fn wo_step_sgd({guard}        return;\n    }}\n{repeated}}}\n{after}");
        Ok(candidate)
    }
}

fn declaration(workgroup_size: u32) -> String {
    format!("const wo_WORKGROUP_SIZE: u32 = {workgroup_size};")
}

/// Every one of the identifiers `names` in `statement` with `suffix`.
fn with_suffix(statement: &str, names: &[&str], suffix: &str) -> String {
    let in_identifier = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let mut out = String::new();
    let mut rest = statement;
    while let Some(start) = rest.find(in_identifier) {
        let length = rest[start..].find(|c| !in_identifier(c));
        let end = length.map_or(rest.len(), |length| start + length);
        out += &rest[..end];
        if names.contains(&&rest[start..end]) {
            out += suffix;
        }
        rest = &rest[end..];
    }
    out + rest
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use std::collections::HashSet;

    use super::*;
    use crate::spirv::Spirv;

    #[test]
    fn every_candidate_compiles_and_has_a_name_of_its_own() {
        let candidates = all().unwrap();
        let mut names = HashSet::new();
        for candidate in &candidates {
            Spirv::new(&candidate.kernel, true).unwrap();
            assert!(names.insert(&candidate.kernel.name), "{candidate:?}");

            let module = naga::front::wgsl::parse_str(&candidate.kernel.wgsl).unwrap();
            let size = [candidate.workgroup_size, 1, 1];
            for entry_point in &module.entry_points {
                assert_eq!(entry_point.workgroup_size, size, "{candidate:?}");
            }
        }
        assert_eq!(
            candidates[0].kernel.wgsl,
            default_kernel(ScalarPath::Immediates, Access::Vec4)
                .unwrap()
                .kernel
                .wgsl
        );
    }

    #[test]
    fn statements_are_repeated_with_names_of_their_own_and_loads_stay_in_front() {
        let two = default_kernel(ScalarPath::Immediates, Access::Vec4)
            .unwrap()
            .with_vec4s(2, Spread::Adjacent)
            .unwrap();
        let wgsl = two.kernel.wgsl;
        let positions: Vec<_> = [
            "let theta_0 = wo_load_theta_0(at_0);",
            "let theta_1 = wo_load_theta_0(at_1);",
            "var s_1 = wo_load_state_0(at_1);",
            "let theta_new_1 = wo_stepped(wo_scalars(), theta_1, g_1, &s_1);",
            "wo_store_state_0(at_0, s_0);",
            "wo_store_theta_0(at_1, theta_new_1);",
        ]
        .map(|statement| {
            wgsl.find(statement)
                .unwrap_or_else(|| unreachable!("{statement}"))
        })
        .into();
        assert!(positions.is_sorted(), "{positions:?}");
        assert_eq!(two.elems_per_invocation, 8);
    }

    #[test]
    fn a_suffix_goes_to_whole_names_only() {
        let statement = "    v = next_v(v_old, v.x, k.a) + vv;";
        assert_eq!(
            with_suffix(statement, &["v", "k"], "_1"),
            "    v_1 = next_v(v_old, v_1.x, k_1.a) + vv;"
        );
    }

    #[test]
    fn what_the_source_does_not_have_is_not_replaced() {
        let error = default_kernel(ScalarPath::Immediates, Access::Vec4)
            .unwrap()
            .with("no such text", "")
            .unwrap_err();
        assert_eq!(
            error.to_string(),
            "\"no such text\" is in the shader 0 times"
        );
        assert!(containing("no such candidate").is_err());
    }
}
