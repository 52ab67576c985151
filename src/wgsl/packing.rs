//! How values of 16 bits lie in words, for shaders of the caller's.

use super::template::Scope;
use crate::storage::StorageType;

/// WGSL by which a shader of the caller's writes gradients, and reads parameters, as they are stored: of
/// [`StorageType::Bf16`] the functions `wo_pack_bf16(values: vec4<f32>) -> vec2<u32>` and
/// `wo_values_bf16(words: vec2<u32>) -> vec4<f32>` with what they need, of [`StorageType::F16`] those that end in `f16`. `f32`
/// needs none, and its text is empty. All its names begin with `wo_`.
///
/// The first of four values is in the lower half of the first word. They are rounded to the nearest, ties to even, in integers:
/// to the bits that the kernels and their twins have, whatever the device does to a `pack2x16float`. No device feature is
/// needed.
///
/// ```
/// use wgpu_optim::StorageType;
/// use wgpu_optim::wgsl::packing;
///
/// let backward = packing(StorageType::Bf16) + "
/// @group(0) @binding(0) var<storage, read> errors: array<vec4<f32>>;
/// @group(0) @binding(1) var<storage, read_write> grads: array<vec2<u32>>; // bound as `grads_type(StorageType::Bf16)`
///
/// @compute @workgroup_size(64)
/// fn backward(@builtin(global_invocation_id) id: vec3<u32>) {
///     if id.x < arrayLength(&grads) {
///         grads[id.x] = wo_pack_bf16(2.0 * errors[id.x]);
///     }
/// }
/// ";
/// # assert!(backward.contains("fn wo_pack_bf16("));
/// ```
#[must_use]
pub fn packing(of: StorageType) -> String {
    let codec = match of {
        StorageType::F32 => return String::new(),
        StorageType::Bf16 => include_str!("../../shaders/storage/bf16.wgsl"),
        StorageType::F16 => include_str!("../../shaders/storage/f16.wgsl"),
    };
    let functions = include_str!("../../shaders/storage/packing.wgsl");
    let scope = Scope::default().word("CODEC", of.name());
    [codec, functions].map(|file| scope.render(file)).concat()
}
