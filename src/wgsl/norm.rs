//! The WGSL of the kernels that add up squares of gradients.

use super::ScalarPath;
use super::template::Scope;
use crate::plan::Access;
use crate::storage::StorageType;

/// A kernel that adds up squares of gradients: what a [`GpuControl`](crate::GpuControl) hands to wgpu, for tools that compile
/// or inspect the WGSL themselves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct NormVariant {
    grads: StorageType,
    /// How many tensors, and how their elements are reached, where there are several.
    batch: Option<(usize, Access)>,
}

impl NormVariant {
    /// Its entry point.
    pub const ENTRY_POINT: &'static str = "norm";

    /// Over a piece whose gradients are stored like this.
    #[must_use]
    pub const fn new(grads: StorageType) -> Self {
        Self { grads, batch: None }
    }

    /// Over a batch of so many tensors, [`Access::Vec4`] or [`Access::Scalar`].
    #[must_use]
    pub const fn over_batch(self, tensors: usize, access: Access) -> Self {
        Self {
            batch: Some((tensors, access)),
            ..self
        }
    }

    /// The complete WGSL source for a path of the scalars.
    #[must_use]
    pub fn source(&self, path: ScalarPath) -> String {
        let is_half = self.grads != StorageType::F32;
        let (tensors, access) = self.batch.unwrap_or((0, Access::Vec4));
        let tensor = |tensor| Scope::default().word("TENSOR", tensor);
        let is_in_words = access == Access::Scalar;
        // A word alone holds two of four.
        let parts: &[&str] = match is_half && !is_in_words {
            true => &["low", "high"],
            false => &["low"],
        };
        let part = |part: &&str| Scope::default().word("PART", part);
        let scope = Scope::default()
            .flag("IMMEDIATES", path == ScalarPath::Immediates)
            .flag("HALF", is_half)
            .flag("BATCH", self.batch.is_some())
            .flag("VECTORS", !is_in_words)
            .flag("HALVES", is_half && is_in_words)
            .word("CODEC", self.grads.name())
            .word("ELEMS", 16 / self.grads.bytes())
            .word("PARTIALS", tensors)
            .list("PARTS", parts.iter().map(part))
            .list("TENSORS", (0..tensors).map(tensor));
        let conversion = match self.grads {
            StorageType::F32 => "",
            StorageType::Bf16 => include_str!("../../shaders/storage/bf16.wgsl"),
            StorageType::F16 => include_str!("../../shaders/storage/f16.wgsl"),
        };
        let files = [
            include_str!("../../shaders/frame/scalars.wgsl"),
            include_str!("../../shaders/control/sums.wgsl"),
            conversion,
            include_str!("../../shaders/control/norm.wgsl"),
        ];
        files.map(|file| scope.render(file)).concat()
    }
}
