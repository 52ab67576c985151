//! Sharded states in files: one for each rank, and an index.
//!
//! The index is laid out as that of a model in several files, and names the file of every tensor. A file's tensors are
//! those of a [state file](OptimizerState::to_safetensors) where a rank has all of a slot, `TENSOR.SLOT`; of a part it is
//! `TENSOR.SLOT[START:END]`, with the elements as Python counts them, in one dimension. So the state of one rank is one
//! that everybody can read.
//!
//! Files are written under names that no index in their folder has, and the index is replaced when the first rank has seen
//! all of them: whatever happens, there is one whole state. Of several files each says the same, or in its own words what
//! is in it, as those of the command `step` do.

mod names;

use std::collections::{BTreeMap, HashSet};
use std::fs;
use std::ops::Range;
use std::path::Path;

use wgpu_optim::files::{Dtype, Header};
use wgpu_optim::state::{Recorded, SlotEntry, SlotState, StateFileError, StateRecord, TensorState};
use wgpu_optim::storage::Codec;
use wgpu_optim::{OptimizerState, Rule as _, StateError};
use wgpu_optim_files::{FileError, Model, NewFile, Outputs, SavedState, slot_entry};

use crate::error::ShardError;
use crate::optimizer::{ShardedOptimizer, numel};
use crate::share::Share;
pub(crate) use names::Names;

impl<S: Share<Rule: Recorded>> ShardedOptimizer<S> {
    /// Writes what all ranks remember: each its own file, and the first one the index, which is named `index`, ends in
    /// `.json`, and lies on a disk that all ranks see, in a folder that there is. Replaces what an earlier call has written
    /// there, and no file that another index names. Collective.
    ///
    /// # Errors
    /// [`ShardError`]; then what was there before still is. [`ShardError::NotAState`] if that is the index of something else,
    /// [`ShardError::NotShared`] if the first rank does not see the others' files.
    pub fn save(&self, index: &Path) -> Result<(), ShardError> {
        let ranks = &self.ranks;
        let names = Names::agreed(ranks, index)?;
        let file = index.with_file_name(names.of(ranks.rank()));
        let written = self.state().and_then(|state| {
            let (header, slots) = self.own_file(&state).map_err(FileError::content(&file))?;
            let new = NewFile::new(&file, "the file of a rank", &header)?;
            let mut outputs = Outputs::default();
            let output = outputs.stage_new(&new)?;
            let mut end = new.start.len() as u64;
            for values in slots.values() {
                outputs.get(output).write_all_at(values, end)?;
                end += values.len() as u64;
            }
            outputs.replace_targets()?;
            Ok(header)
        });
        let replaced = ranks.all_well(written).and_then(|header| {
            names.check_seen(ranks, index, &file)?;
            names.replace_index(ranks, index, &header)
        });
        if replaced.is_err() {
            let _ = fs::remove_file(file);
        }
        replaced
    }

    /// The header of this rank's file, and what goes behind it: slots lie in the order of their names.
    fn own_file<'s>(
        &self,
        state: &'s OptimizerState<S::Rule>,
    ) -> Result<(Header, BTreeMap<String, &'s [u8]>), StateFileError> {
        let (mut entries, mut values) = (Vec::new(), BTreeMap::new());
        for (index, (tensor, spec)) in state.tensors.iter().zip(&self.tensors).enumerate() {
            let elems = self.buckets.shares.of_tensor(self.ranks.rank(), index);
            for slot in &tensor.slots {
                let name = SlotEntry::name(&spec.name, &slot.name)?;
                let codec = slot.values.codec();
                let entry = own_entry(name, &spec.shape, &elems, codec, self.ranks.rank());
                let Some(entry) = entry else { continue };
                values.insert(entry.0.clone(), slot.values.bytes());
                entries.push(entry);
            }
        }
        let metadata = state.record()?.to_metadata()?;
        Ok((Header::new(metadata, entries)?, values))
    }

    /// Takes over what the ranks of an earlier run remembered, however many there were: `path` is the index that
    /// [`save`](Self::save) has written, or a state file of one process. Collective.
    ///
    /// # Errors
    /// [`ShardError`] on every rank where one cannot read its part or it does not fit; then none has changed.
    pub fn load(&mut self, path: &Path) -> Result<(), ShardError> {
        let saved = Model::open_one_by_one(path).and_then(SavedState::new);
        let state = saved
            .map_err(ShardError::from)
            .and_then(|saved| self.own_state(&saved));
        let state = self.ranks.all_well(state)?;
        let loaded = self.load_own(&state);
        self.ranks.all_well(loaded)
    }

    fn own_state(
        &self,
        saved: &SavedState<S::Rule>,
    ) -> Result<OptimizerState<S::Rule>, ShardError> {
        let StateRecord {
            config,
            steps,
            applied_steps,
            state_kinds,
            control,
        } = &saved.record;
        let known: HashSet<_> = self.tensors.iter().map(|tensor| &tensor.name).collect();
        if let Some(tensor) = applied_steps.keys().find(|tensor| !known.contains(tensor)) {
            return Err(StateError::UnknownTensor {
                tensor: tensor.clone(),
            }
            .into());
        }
        let mut tensors = Vec::with_capacity(self.tensors.len());
        for (index, spec) in self.tensors.iter().enumerate() {
            let name = &spec.name;
            let steps = applied_steps.get(name);
            let steps = steps.ok_or_else(|| StateError::MissingTensor {
                tensor: name.clone(),
            })?;
            let elems = self.buckets.shares.of_tensor(self.ranks.rank(), index);
            let mut slots = Vec::new();
            for slot in saved.slots_of(name) {
                let parts = saved.parts_of(name, slot, &spec.shape).or_else(|error| {
                    // A flat shape fits any: it is what older files hold.
                    let flat = [numel(spec) as usize];
                    saved.parts_of(name, slot, &flat).map_err(|_| error)
                })?;
                slots.push(SlotState {
                    name: slot.to_owned(),
                    values: saved.read(parts, slot, elems.clone())?,
                });
            }
            tensors.push(TensorState {
                name: name.clone(),
                shape: vec![(elems.end - elems.start) as usize],
                applied_steps: *steps,
                state_kind: state_kinds
                    .get(name)
                    .cloned()
                    .unwrap_or_else(|| config.state_kind()),
                slots,
            });
        }
        Ok(OptimizerState {
            config: config.clone(),
            steps: *steps,
            tensors,
            control: *control,
        })
    }
}

/// The entry of a slot in a rank's file, which has these elements of it; none if it has nothing to write.
pub(crate) fn own_entry(
    name: String,
    shape: &[usize],
    elems: &Range<u64>,
    codec: Codec,
    rank: usize,
) -> Option<(String, Dtype, Vec<usize>)> {
    // What has no elements is nobody's.
    let is_own = !elems.is_empty() || (rank == 0 && shape.contains(&0));
    is_own.then(|| slot_entry(name, shape, elems, codec))
}
