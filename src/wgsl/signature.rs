//! The function that a rule's WGSL declares and the frame calls. Where it is missing, naga would blame a line of the frame,
//! which the rule's author has not written.

use super::error::KernelError;
use crate::rules::Rule;

/// The types of what the frame gives to a rule's function, in this order, and of what it takes back.
const PARAMS: [&str; 4] = ["Scalars", "vec4<f32>", "vec4<f32>", "ptr<function,State>"];
const RESULT: &str = "vec4<f32>";

/// Makes sure that a rule's WGSL declares the function that the frame calls.
pub(crate) fn check_signature(rule: &impl Rule) -> Result<(), KernelError> {
    let wgsl = without_comments(&rule.wgsl());
    match declaration(&wgsl) {
        Some(declared) if is_as_called(declared, &wgsl) => Ok(()),
        declared => Err(KernelError::Signature {
            rule: rule.stem(),
            actual: declared.map(|text| text.split_whitespace().collect::<Vec<_>>().join(" ")),
        }),
    }
}

/// From `fn update` to the body.
fn declaration(wgsl: &str) -> Option<&str> {
    let is_of_name = |c: char| c.is_alphanumeric() || c == '_';
    wgsl.match_indices("fn").find_map(|(start, keyword)| {
        let before = wgsl[..start].chars().next_back();
        let rest = &wgsl[start + keyword.len()..];
        let name = rest.trim_start();
        let after = name.strip_prefix("update")?.trim_start();
        let is_keyword = !before.is_some_and(is_of_name) && name.len() < rest.len();
        let declared = &wgsl[start..start + wgsl[start..].find('{')?];
        (is_keyword && after.starts_with('(')).then_some(declared.trim_end())
    })
}

/// Whether the frame's call goes with a declaration. What an alias stands for is naga's to say.
fn is_as_called(declared: &str, wgsl: &str) -> bool {
    let plain: String = declared.split_whitespace().collect();
    let plain = plain.replace("vec4f", "vec4<f32>");
    let Some((params, result)) = plain
        .strip_prefix("fnupdate(")
        .and_then(|rest| rest.rsplit_once(")->"))
    else {
        return false;
    };
    let types: Vec<_> = params
        .trim_end_matches(',')
        .split(',')
        .filter_map(|param| param.split_once(':'))
        .map(|(_, of)| of)
        .collect();
    // The pointer's type has a comma of its own, and what is behind that no name.
    let expected = PARAMS.map(|of| of.split(',').next().unwrap_or_default());
    let behind_the_pointer = params.trim_end_matches(',').ends_with(PARAMS[3]);
    match wgsl.contains("alias") {
        true => types.len() == PARAMS.len(),
        false => types == expected && behind_the_pointer && result == RESULT,
    }
}

/// WGSL with a space for each of its comments; those of blocks may stand in each other.
fn without_comments(wgsl: &str) -> String {
    let (mut code, mut rest, mut depth) = (String::with_capacity(wgsl.len()), wgsl, 0_usize);
    while let Some(c) = rest.chars().next() {
        let mut taken = c.len_utf8();
        if rest.starts_with("/*") {
            (depth, taken) = (depth + 1, 2);
        } else if depth > 0 && rest.starts_with("*/") {
            (depth, taken) = (depth - 1, 2);
            code.push(' ');
        } else if depth == 0 && rest.starts_with("//") {
            taken = rest.find('\n').unwrap_or(rest.len());
        } else if depth == 0 {
            code.push(c);
        }
        rest = &rest[taken..];
    }
    code
}
