//! The outputs of a step, byte by byte: files that are laid out as the inputs are, and the windows that fill them.

use std::collections::{BTreeMap, HashMap};
use std::path::Path;

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use wgpu_optim::Rule as _;
use wgpu_optim::files::{Dtype, Header, Index, is_content_hash};
use wgpu_optim::state::{SlotEntry, StateRecord};
use wgpu_optim::storage::Codec;
use wgpu_optim_files::window::{ELEM_BYTES, Slice};
use wgpu_optim_files::{At, FileError, Layout, NewFile, Outputs, Part, is_index, round};

use super::fingerprint;
use super::inputs::{Content, Inputs, Pairing, Updated};
use crate::groups::Groups;

/// The files that a step writes, and what goes where in them.
#[derive(Debug)]
pub struct Plan<'i> {
    files: Vec<(Content, NewFile)>,
    pub groups: &'i Groups,
    pub updates: Vec<Update<'i>>,
    pub copies: Vec<Copy>,
    /// Keys of the parameter files' metadata that are left out.
    pub dropped_metadata: Vec<String>,
    /// The layout of the parameters' output.
    out_params: Layout,
    /// The state files by their number, with what they start with.
    states: Vec<(usize, StateStart)>,
}

/// The header of a state file, but for the fingerprints of its parameters: those are known when they have been written.
#[derive(Debug)]
struct StateStart {
    header: Header,
    /// The tensors that have slots in the file.
    tensors: Vec<String>,
}

/// The record and the slots that a state file is going to hold.
#[derive(Clone)]
struct StateContent {
    record: StateRecord,
    entries: Vec<(String, Dtype, Vec<usize>)>,
    /// The tensors that have slots in the file.
    tensors: Vec<String>,
}

impl StateContent {
    fn new(record: StateRecord) -> Self {
        Self {
            record,
            entries: Vec::new(),
            tensors: Vec::new(),
        }
    }
}

/// A tensor whose elements are updated.
#[derive(Debug)]
pub struct Update<'i> {
    pub tensor: &'i Updated,
    pub out_params: Part,
    /// One for each of its group's slots and, behind them, its masters.
    pub out_state: Vec<Part>,
    /// [`Rule::phase`](wgpu_optim::Rule::phase) of its next step, by its group's rule.
    pub phase: u64,
}

/// Bytes of an input that are written as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    pub from: At,
    pub to: At,
    pub bytes: u64,
}

/// The slots of each tensor by name, with their places in the outputs.
type OutSlots = BTreeMap<String, Vec<(String, At)>>;

/// The work that is read, computed and written at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Window {
    /// Elements of the plan's updates, all of them of one group and in one phase of its rule.
    Update {
        slices: Vec<Slice>,
        elems: u64,
        group: usize,
        phase: u64,
    },
    Copy(Copy),
}

/// The paths of the outputs.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    pub params: &'a Path,
    pub state: &'a Path,
    /// How many rounds the parameters are of, where they are a global model.
    pub outer_steps: Option<u64>,
}

impl<'i> Plan<'i> {
    /// Lays out the outputs: parameter files as they were read, and a state of `record`.
    pub fn new(
        inputs: &Inputs,
        pairing: &'i Pairing,
        record: &StateRecord,
        targets: Targets<'_>,
        groups: &'i Groups,
    ) -> Result<Self> {
        let mut plan = Self {
            files: Vec::new(),
            groups,
            updates: Vec::new(),
            copies: Vec::new(),
            dropped_metadata: Vec::new(),
            out_params: Layout::default(),
            states: Vec::new(),
        };
        plan.params_files(inputs, targets)?;
        let slots = plan.state_files(inputs, pairing, record, targets)?;
        for (place, named) in inputs.params.in_files() {
            let name = place.entry.name.as_str();
            let out_params = plan.out_params.at(place);
            let Some(tensor) = pairing.updated.get(name) else {
                plan.copy(place.at(inputs.state_files()), out_params, place.bytes());
                continue;
            };
            ensure!(
                named,
                "tensor {name:?} is in two files of {}, and {} is not where the index says it is: only one of the two \
                 would be updated, and programs differ in which they read; remove one",
                inputs.flags.of(Content::Params),
                inputs.params.shards()[place.shard].source.path().display()
            );
            let out_state = slots.get(name).into_iter().flatten();
            plan.updates.push(Update {
                tensor,
                out_params: Part::whole(tensor.numel, out_params, tensor.storage.params),
                out_state: out_state
                    .map(|(_, at)| Part::whole(tensor.numel, *at, Codec::F32))
                    .collect(),
                phase: groups
                    .get(tensor.group)
                    .config
                    .phase(tensor.saved.applied_steps),
            });
        }
        // The slots of tensors that are not updated.
        for (tensor, slots) in &slots {
            let (Some(state), None) = (&inputs.state, pairing.updated.get(tensor)) else {
                continue;
            };
            for (slot, to) in slots {
                for part in state.saved.parts(tensor, slot) {
                    let to = to.plus(part.elems.start * part.codec.elem_bytes());
                    plan.copy(part.at, to, part.bytes());
                }
            }
        }
        Ok(plan)
    }

    /// The parameter files and their index.
    fn params_files(&mut self, inputs: &Inputs, targets: Targets<'_>) -> Result<()> {
        let (role, target) = (inputs.flags.out_params, targets.params);
        let given = inputs.flags.of(Content::Params);
        match inputs.params.index() {
            Some(_) => ensure!(
                is_index(target),
                "{given} is the index of a model in several files, so {role} has to be one, too: expected a name that \
                 ends in .index.json, got {}",
                target.display()
            ),
            None => ensure!(
                !is_index(target),
                "{given} is a single file, so {role} has to be one, too: a name that ends in .json is an index, got {}",
                target.display()
            ),
        }
        let mut dropped: Vec<String> = Vec::new();
        let layout = inputs.params.laid_out_at(target, role, |metadata| {
            metadata.retain(|(key, _)| {
                let drop = is_content_hash(key);
                if drop && !dropped.contains(key) {
                    dropped.push(key.clone());
                }
                !drop
            });
            if let Some(steps) = targets.outer_steps {
                round::set_outer_steps(metadata, steps);
            }
        });
        let mut layout = layout.map_err(with_a_way_out)?;
        let files = std::mem::take(&mut layout.files).into_iter();
        self.files.extend(files.map(|file| (Content::Params, file)));
        (self.dropped_metadata, self.out_params) = (dropped, layout);
        Ok(())
    }

    /// The state file or, for a target that is an index, one for each file of the parameters, and the index. Returns
    /// where the slots of each tensor go: those of the rule and then its masters where it is updated, else those that it
    /// has.
    fn state_files(
        &mut self,
        inputs: &Inputs,
        pairing: &Pairing,
        record: &StateRecord,
        targets: Targets<'_>,
    ) -> Result<OutSlots> {
        let (role, target) = (inputs.flags.out_state, targets.state);
        let is_sharded = is_index(target);
        let shards = match is_sharded {
            true => inputs.params.shards().len(),
            false => 1,
        };
        let empty = StateRecord {
            applied_steps: BTreeMap::new(),
            ..record.clone()
        };
        // An index has a record of its own, the last, for what is in no file that it names: counts without slots.
        let mut contents = vec![StateContent::new(empty); shards + usize::from(is_sharded)];
        let names = self.fill_states(&mut contents, inputs, pairing, record)?;
        let of_index = contents.split_off(shards).pop();
        let (mut places, mut weight_map, mut total_size) = (HashMap::new(), Vec::new(), 0);
        for (shard, content) in contents.into_iter().enumerate() {
            let mut header = Header::new(self.metadata(&content.record)?, content.entries)?;
            // Of a global model the number of the round says more.
            let unknown = content
                .tensors
                .iter()
                .filter(|_| targets.outer_steps.is_none());
            let unknown = unknown.map(|tensor| (tensor.clone(), fingerprint::unknown()));
            fingerprint::put(&mut header, &unknown.collect())?;
            let file = if is_sharded {
                let name = shard_name(target, shard, shards);
                let tensors = header.tensors().iter();
                weight_map.extend(tensors.map(|tensor| (tensor.name.clone(), name.clone())));
                NewFile::beside(target, &name, role, &header)
            } else {
                NewFile::new(target, role, &header)
            };
            let file = file.map_err(with_a_way_out)?;
            for tensor in header.tensors() {
                let place = At {
                    file: self.files.len(),
                    offset: file.start.len() as u64 + tensor.data_bytes.start,
                };
                places.insert(tensor.name.clone(), place);
            }
            total_size += header.data_len();
            let tensors = match targets.outer_steps {
                Some(_) => Vec::new(),
                None => content.tensors,
            };
            self.states
                .push((self.files.len(), StateStart { header, tensors }));
            self.files.push((Content::State, file));
        }
        if let Some(content) = of_index {
            let mut index = Index::new(weight_map)?;
            index.metadata = self.metadata(&content.record)?;
            let file = NewFile {
                role: role.to_owned(),
                path: target.to_owned(),
                start: index.to_bytes(total_size)?,
            };
            self.files.push((Content::State, file));
        }
        let places_of = |(tensor, slots): (String, Vec<(String, String)>)| {
            let place = |(slot, name)| Some((slot, *places.get(&name)?));
            (tensor, slots.into_iter().filter_map(place).collect())
        };
        Ok(names.into_iter().map(places_of).collect())
    }

    /// The metadata of a file of the state.
    fn metadata(&self, record: &StateRecord) -> Result<Vec<(String, String)>> {
        let mut metadata = record.to_metadata()?;
        self.groups.put(&mut metadata)?;
        Ok(metadata)
    }

    /// Shares out the slots of all tensors among files as their parameters are. Returns those of each tensor, by their own
    /// names and by those in a file.
    fn fill_states(
        &self,
        files: &mut [StateContent],
        inputs: &Inputs,
        pairing: &Pairing,
        record: &StateRecord,
    ) -> Result<BTreeMap<String, Vec<(String, String)>>> {
        let mut all = BTreeMap::new();
        for (tensor, steps) in &record.applied_steps {
            let param = inputs.params.get(tensor);
            let param = param.with_context(|| format!("tensor {tensor:?} has no parameter"))?;
            let slots: Vec<_> = if let Some(updated) = pairing.updated.get(tensor) {
                let slots = &self.groups.get(updated.group).slots;
                let kept = slots.iter().map(|slot| slot.name);
                let masters = updated
                    .has_masters()
                    .then(|| updated.storage.masters.slot());
                kept.chain(masters).collect()
            } else {
                let state = inputs.state.iter();
                let slots = state.flat_map(|state| state.saved.slots_of(tensor));
                slots.collect()
            };
            let last = files.len() - 1;
            let file = match slots.is_empty() {
                true => &mut files[last],
                false => &mut files[param.shard.min(last)],
            };
            file.record.applied_steps.insert(tensor.clone(), *steps);
            file.tensors
                .extend((!slots.is_empty()).then(|| tensor.clone()));
            let mut names = Vec::new();
            for slot in slots {
                let name = SlotEntry::name(tensor, slot)?;
                let shape = param.entry.shape.clone();
                // What is not updated stays as it is.
                let state = inputs.state.as_ref();
                let kept = state.filter(|_| !pairing.updated.contains_key(tensor));
                let parts = kept.map_or(&[][..], |state| state.saved.parts(tensor, slot));
                let codec = parts.first().map_or(Codec::F32, |part| part.codec);
                file.entries.push((name.clone(), codec.into(), shape));
                names.push((slot.to_owned(), name));
            }
            all.insert(tensor.clone(), names);
        }
        Ok(all)
    }

    fn copy(&mut self, from: At, to: At, bytes: u64) {
        match self.copies.last_mut() {
            Some(last) if last.from.plus(last.bytes) == from && last.to.plus(last.bytes) == to => {
                last.bytes += bytes;
            }
            _ => self.copies.push(Copy { from, to, bytes }),
        }
    }

    /// Makes the outputs beside their targets and writes what they start with. No two may be one file, none may be an
    /// input of something else than it holds or a file of a model whose index stays as it is, and an input that is
    /// replaced is this run's until it ends.
    pub fn stage(&self, inputs: &Inputs) -> Result<Outputs> {
        let mut outputs = Outputs::default();
        for (_, file) in &self.files {
            outputs.stage_new(file)?;
        }
        for (content, model) in inputs.models() {
            let is_replaced = |path: &Path| -> Result<bool> {
                let Some(output) = outputs.in_place_of(path)? else {
                    return Ok(false);
                };
                let (of, NewFile { role, .. }) = &self.files[output];
                ensure!(
                    *of == content,
                    "{role} and {} are the same file, {}; an output may only take the place of what it goes on from",
                    inputs.flags.of(content),
                    path.display()
                );
                Ok(true)
            };
            let index = model.index().map(|index| index.path.as_path());
            let is_index_replaced = index.map(is_replaced).transpose()?;
            for shard in model.shards() {
                let path = shard.source.path();
                if !is_replaced(path)? {
                    continue;
                }
                if let (Some(index), Some(false)) = (index, is_index_replaced) {
                    bail!(
                        "cannot write {}: it belongs to {}, which would stay as it is; write to another folder, or \
                         replace the index, too",
                        path.display(),
                        index.display()
                    );
                }
                shard.source.claim()?;
            }
        }
        Ok(outputs)
    }

    /// Says in the state files which parameters they go with: those that have been written.
    pub fn write_fingerprints(&self, inputs: &Inputs, outputs: &Outputs) -> Result<()> {
        for (file, StateStart { header, tensors }) in &self.states {
            let of = |tensor: &String| {
                let place = inputs.params.get(tensor);
                let place = place.with_context(|| format!("tensor {tensor:?} has no parameter"))?;
                let at = self.out_params.at(place);
                Ok((tensor.clone(), fingerprint::of_output(outputs, place, at)?))
            };
            let mut header = header.clone();
            let fingerprints = tensors.iter().map(of).collect::<Result<_>>()?;
            fingerprint::put(&mut header, &fingerprints)?;
            outputs.get(*file).write_all_at(&header.to_bytes()?, 0)?;
        }
        Ok(())
    }

    /// All elements to update, in the order of the tensors' parameters, in windows of `max_elems` of them.
    pub fn in_order(&self, max_elems: u64) -> impl Iterator<Item = (Vec<Slice>, u64)> {
        let numels = self.updates.iter().map(|update| update.tensor.numel);
        fill(numels.enumerate(), max_elems)
    }

    /// Cuts the work into windows of at most `max_elems` elements to update, or as many bytes as those have to copy.
    pub fn windows(&self, max_elems: u64) -> Vec<Window> {
        let mut windows = Vec::new();
        let mut phases: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (index, update) in self.updates.iter().enumerate() {
            let key = (update.tensor.group, update.phase);
            let of_phase = phases.entry(key).or_default();
            of_phase.push((index, update.tensor.numel));
        }
        for ((group, phase), updates) in phases {
            windows.extend(fill(updates.into_iter(), max_elems).map(|(slices, elems)| {
                Window::Update {
                    slices,
                    elems,
                    group,
                    phase,
                }
            }));
        }
        let max_bytes = max_elems * ELEM_BYTES;
        for copy in &self.copies {
            let starts = (0..copy.bytes).step_by(max_bytes as usize);
            windows.extend(starts.map(|start| {
                Window::Copy(Copy {
                    from: copy.from.plus(start),
                    to: copy.to.plus(start),
                    bytes: (copy.bytes - start).min(max_bytes),
                })
            }));
        }
        windows
    }
}

/// Fills windows of `max_elems` elements with tensors of these indices and sizes, cutting them where one is full; the
/// last may be smaller.
fn fill(
    tensors: impl Iterator<Item = (usize, u64)>,
    max_elems: u64,
) -> impl Iterator<Item = (Vec<Slice>, u64)> {
    let mut full = Vec::new();
    let (mut slices, mut elems) = (Vec::new(), 0);
    for (tensor, numel) in tensors {
        let mut done = 0;
        while done < numel {
            let some = (numel - done).min(max_elems - elems);
            slices.push(Slice {
                tensor,
                elems: done..done + some,
            });
            done += some;
            elems += some;
            if elems == max_elems {
                full.push((std::mem::take(&mut slices), std::mem::take(&mut elems)));
            }
        }
    }
    if elems > 0 {
        full.push((slices, elems));
    }
    full.into_iter()
}

/// Says how a file can be had whose header would be too large.
fn with_a_way_out(error: FileError) -> anyhow::Error {
    match error {
        error @ FileError::TooLarge { .. } => {
            anyhow!("{error}; an --out-state that ends in .index.json is split as --params is")
        }
        error => error.into(),
    }
}

/// The name of a file of a model in several files, as Hugging Face's libraries make it from that of the index.
fn shard_name(index: &Path, shard: usize, shards: usize) -> String {
    let name = index.file_name().unwrap_or_default().to_string_lossy();
    let stem = [".safetensors.index.json", ".index.json", ".json"]
        .iter()
        .find_map(|ending| name.strip_suffix(ending))
        .unwrap_or(&name);
    format!("{stem}-{:05}-of-{shards:05}.safetensors", shard + 1)
}
