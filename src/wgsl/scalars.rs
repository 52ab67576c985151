//! The scalars of a step as the kernels read them: names, order and bytes.

use crate::plan::Dispatch;
use crate::rules::{MAX_SCALARS, Scalars};
use crate::storage::Key;

/// Bind group of params, grads and state; `@group(0)` in the shaders.
pub(crate) const TENSORS_GROUP: u32 = 0;
/// Bind group of the scalars on the uniform path; `@group(1)` in the shaders.
pub(crate) const SCALARS_GROUP: u32 = 1;

/// The path that the scalars of a step take to the kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ScalarPath {
    /// `var<immediate>`, set in the compute pass: costs nothing, needs `Features::IMMEDIATES`.
    Immediates,
    /// A uniform buffer, filled by a copy from a ring of staging buffers that is recorded into the encoder
    /// before the pass.
    Uniforms,
}

impl ScalarPath {
    /// The bind group of a control's block: behind that of the scalars, if they have one.
    pub(crate) const fn control_group(self) -> u32 {
        match self {
            Self::Immediates => SCALARS_GROUP,
            Self::Uniforms => SCALARS_GROUP + 1,
        }
    }
}

/// The scalars that the frame takes beside a rule's, in their order in WGSL.
pub(crate) const FRAME_SCALARS: [&str; 8] = [
    "first",
    "grads_shift",
    "count",
    "row",
    "head",
    "gap",
    "tensor_mask",
    "section",
];

/// The scalars that it takes besides where something is stored in 16 bits.
pub(crate) const WIDE_SCALARS: [&str; 5] = ["begin", "end", "index", "key_x", "key_y"];

/// The words of a control's block: its decision for a class of tensors, and what only the device knows of their next step; a rule's scalars come
/// behind it.
pub(crate) const CONTROL_SCALARS: [&str; 6] =
    ["skip", "unscale", "clip", "clip_value", "key_x", "key_y"];

/// Most bytes of what a control says.
pub(crate) const CONTROL_BYTES: u32 =
    ((CONTROL_SCALARS.len() + MAX_SCALARS) * size_of::<u32>()) as u32;

/// Most words of `k`.
const MAX_WORDS: usize = MAX_SCALARS + FRAME_SCALARS.len() + WIDE_SCALARS.len();

/// The tensor of a dispatch over values of 16 bits.
#[derive(Clone, Copy, Debug)]
pub(crate) struct WideScalars {
    /// The tensor's element at the start of the window, modulo 2^32.
    pub(crate) index: u32,
    pub(crate) key: Key,
}

/// Twin of the WGSL struct of the same name: a rule's scalars, and behind them those of the frame.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Uniforms {
    words: [u32; MAX_WORDS],
    len: usize,
}

impl Uniforms {
    /// With as many scalars as any rule may have.
    pub(crate) const MAX_BYTES: u32 = Self::bytes(MAX_SCALARS, true);

    /// With so many scalars of a rule, over values of 16 bits or not.
    pub(crate) const fn bytes(scalars: usize, is_wide: bool) -> u32 {
        let wide = if is_wide { WIDE_SCALARS.len() } else { 0 };
        ((scalars + FRAME_SCALARS.len() + wide) * size_of::<u32>()) as u32
    }

    pub(crate) fn new(
        scalars: &Scalars,
        dispatch: &Dispatch,
        tensor_mask: u32,
        wide: Option<WideScalars>,
    ) -> Self {
        let frame = [
            dispatch.first,
            dispatch.grads_shift,
            dispatch.count,
            dispatch.row(),
            dispatch.head,
            dispatch.gap,
            tensor_mask,
            dispatch.section,
        ];
        let mut uniforms = Self {
            words: [0; MAX_WORDS],
            len: 0,
        };
        uniforms.push(bytemuck::cast_slice(scalars.as_slice()));
        uniforms.push(&frame);
        if let Some(wide) = wide {
            let ([begin, end], Key([x, y])) = (dispatch.elems, wide.key);
            uniforms.push(&[begin, end, wide.index, x, y]);
        }
        uniforms
    }

    fn push(&mut self, words: &[u32]) {
        let end = self.len + words.len();
        self.words[self.len..end].copy_from_slice(words);
        self.len = end;
    }
}

impl AsRef<[u8]> for Uniforms {
    fn as_ref(&self) -> &[u8] {
        bytemuck::cast_slice(&self.words[..self.len])
    }
}
