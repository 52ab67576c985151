//! Sections: the arrays that a tensor's state consists of.

use crate::rules::{Slots, Start};
use crate::storage::{Codec, Masters, Storage};

/// One value for each element of a tensor: a slot of its rule, or its masters.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Section {
    /// The section's name in states.
    pub(crate) name: &'static str,
    pub(crate) codec: Codec,
    pub(crate) start: Start,
    pub(crate) is_masters: bool,
}

impl Section {
    /// The sections of a tensor that is stored like this, whose rule has these slots: in the order of [`Storage::state`].
    pub(crate) fn all(slots: &Slots, storage: &Storage) -> impl Iterator<Item = Self> {
        let masters = (storage.masters != Masters::None).then(|| {
            // A master of zero is what its parameter is, and a bf16 has no low bits.
            (storage.masters.slot(), Start::Value(0.0), true)
        });
        let slots = slots.kept().map(|slot| (slot.name, slot.start, false));
        let sections = slots.chain(masters).zip(storage.state.iter().copied());
        sections.map(|((name, start, is_masters), codec)| Self {
            name,
            codec,
            start,
            is_masters,
        })
    }

    /// Whether it is made of the parameters.
    pub(crate) fn is_of_params(&self) -> bool {
        self.is_masters || self.start == Start::Params
    }

    /// Whether a new buffer is what it starts as.
    pub(crate) fn starts_at_zero(&self) -> bool {
        self.start == Start::Value(0.0)
    }
}
