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
mod saved;

use std::collections::{BTreeMap, HashSet};
use std::fs::{self, File};
use std::io::{self, Write as _};
use std::path::Path;

use wgpu_optim::files::{Header, Index};
use wgpu_optim::{
    OptimizerState, Recorded, Rule as _, SlotEntry, SlotState, StateError, StateRecord, TensorState,
};

use crate::error::ShardError;
use crate::optimizer::ShardedOptimizer;
use crate::share::Share;
pub(crate) use names::Names;
pub(crate) use saved::{Part, SavedState};

/// The metadata of an index that count how often it has been written.
const GENERATION: &str = "generation";

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
            let (header, slots) = self.own_file(&state, &file)?;
            write(&file, |to| {
                to.write_all(&header.to_bytes().map_err(io::Error::other)?)?;
                let mut slots = slots.values();
                slots.try_for_each(|values| to.write_all(bytemuck::cast_slice(values)))
            })?;
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
        file: &Path,
    ) -> Result<(Header, BTreeMap<String, &'s [f32]>), ShardError> {
        let state_file = |source| ShardError::StateFile {
            path: file.to_owned(),
            source,
        };
        let (mut entries, mut values) = (Vec::new(), BTreeMap::new());
        for (index, (tensor, spec)) in state.tensors.iter().zip(&self.tensors).enumerate() {
            let elems = self.buckets.shares.of_tensor(self.ranks.rank(), index);
            let part = Part::of(elems, &spec.shape, self.ranks.rank());
            let Some(part) = part else { continue };
            for slot in &tensor.slots {
                let name = SlotEntry::name(&spec.name, &slot.name).map_err(state_file)?;
                let entry = part.entry(name);
                values.insert(entry.0.clone(), &*slot.values);
                entries.push(entry);
            }
        }
        let record = state.record().map_err(state_file)?;
        let metadata = record.to_metadata().map_err(state_file)?;
        let header = Header::new(metadata, entries).map_err(|source| ShardError::Header {
            path: file.to_owned(),
            source,
        })?;
        Ok((header, values))
    }

    /// Takes over what the ranks of an earlier run remembered, however many there were: `path` is the index that
    /// [`save`](Self::save) has written, or a state file of one process. Collective.
    ///
    /// # Errors
    /// [`ShardError`] on every rank where one cannot read its part or it does not fit; then none has changed.
    pub fn load(&mut self, path: &Path) -> Result<(), ShardError> {
        let state = SavedState::open(path).and_then(|saved| self.own_state(&saved));
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
            meanings,
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
                saved.check(name, slot, &spec.shape)?;
                let mut values = vec![0.0; (elems.end - elems.start) as usize];
                saved.read(name, slot, elems.clone(), &mut values)?;
                slots.push(SlotState {
                    name: slot.to_owned(),
                    values,
                });
            }
            tensors.push(TensorState {
                name: name.clone(),
                shape: vec![(elems.end - elems.start) as usize],
                applied_steps: *steps,
                meaning: meanings
                    .get(name)
                    .cloned()
                    .unwrap_or_else(|| config.meaning()),
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

/// Whether a path is that of an index, by its name.
fn is_index(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("json"))
}

fn read_index(path: &Path) -> Result<Index, ShardError> {
    let json = fs::read(path).map_err(io_error("read", path))?;
    Index::parse(&json).map_err(|source| ShardError::Index {
        path: path.to_owned(),
        source,
    })
}

fn said<'m>(metadata: &'m [(String, String)], key: &str) -> Option<&'m str> {
    let entry = metadata.iter().find(|(known, _)| known == key);
    entry.map(|(_, value)| value.as_str())
}

/// Replaces a file, or leaves what was there.
fn write(
    path: &Path,
    fill: impl FnOnce(&mut io::BufWriter<&File>) -> io::Result<()>,
) -> Result<(), ShardError> {
    let folder = folder_of(path);
    let replace = || -> io::Result<()> {
        let mut builder = tempfile::Builder::new();
        builder.prefix(".wgpu-optim-");
        // What any new file gets, instead of a temporary file's privacy.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let file = builder.tempfile_in(folder)?;
        let mut to = io::BufWriter::new(file.as_file());
        fill(&mut to)?;
        to.flush()?;
        drop(to);
        file.as_file().sync_all()?;
        file.persist(path).map_err(|error| error.error)?;
        // So that the new name survives a crash, where a folder can be synced.
        let _ = File::open(folder).and_then(|folder| folder.sync_all());
        Ok(())
    };
    replace().map_err(io_error("write", path))
}

fn folder_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

fn io_error(what: &'static str, path: &Path) -> impl FnOnce(io::Error) -> ShardError {
    move |source| ShardError::Io {
        what,
        path: path.to_owned(),
        source,
    }
}
