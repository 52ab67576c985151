//! What a step writes, byte by byte: files that are laid out as the inputs are, and the windows that fill them.

use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, anyhow, bail, ensure};
use wgpu_optim::files::{Dtype, Header, HeaderError, Index, is_content_hash};
use wgpu_optim::{AnyRule, Rule as _, Slot, SlotEntry, StateRecord};

use super::fingerprint;
use super::inputs::{Content, Inputs, Pairing, Updated};
use crate::files::{Outputs, Place, Shard, is_index};
use crate::window::ELEM_BYTES;

/// A byte of one of the files that are read, or of one of those that are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    pub file: usize,
    pub offset: u64,
}

impl At {
    pub fn plus(self, bytes: u64) -> Self {
        Self {
            offset: self.offset + bytes,
            ..self
        }
    }
}

/// The files that a step writes, and what goes where in them.
#[derive(Debug)]
pub struct Plan<'i> {
    pub files: Vec<File>,
    /// What the rule keeps of each tensor that is updated.
    pub slots: Vec<Slot>,
    pub updates: Vec<Update<'i>>,
    pub copies: Vec<Copy>,
    /// Keys of the parameter files' metadata that are left out.
    pub dropped_metadata: Vec<String>,
    /// Where the data of each parameter file start.
    data_starts: Vec<u64>,
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

/// A file that is written.
#[derive(Debug)]
pub struct File {
    content: Content,
    /// How the user named it.
    role: String,
    path: PathBuf,
    /// What it starts with: a header, or all of an index.
    start: Vec<u8>,
}

/// A tensor whose elements are updated.
#[derive(Debug)]
pub struct Update<'i> {
    pub tensor: &'i Updated,
    pub params: At,
    pub out_params: At,
    /// One for each of the plan's slots.
    pub out_slots: Vec<At>,
    pub out_masters: Option<At>,
    /// [`Rule::phase`](wgpu_optim::Rule::phase) of its next step.
    pub phase: u64,
}

/// Bytes of an input that are written as they are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Copy {
    pub from: At,
    pub to: At,
    pub bytes: u64,
}

/// A run of elements of one tensor.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Segment {
    /// Index into the plan's updates.
    pub update: usize,
    pub elems: Range<u64>,
}

/// What is read, computed and written at a time.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Window {
    /// Runs of elements side by side, all of them in one phase of the rule.
    Update {
        segments: Vec<Segment>,
        elems: u64,
        phase: u64,
    },
    Copy(Copy),
}

/// Where the outputs go.
#[derive(Clone, Copy, Debug)]
pub struct Targets<'a> {
    pub params: &'a Path,
    pub state: &'a Path,
}

impl<'i> Plan<'i> {
    /// Lays out the outputs: parameter files as they were read, and a state of `record`.
    pub fn new(
        inputs: &Inputs,
        pairing: &'i Pairing,
        record: &StateRecord,
        targets: Targets<'_>,
        config: &AnyRule,
    ) -> Result<Self> {
        let mut plan = Self {
            files: Vec::new(),
            slots: config.slots().kept().copied().collect(),
            updates: Vec::new(),
            copies: Vec::new(),
            dropped_metadata: Vec::new(),
            data_starts: Vec::new(),
            states: Vec::new(),
        };
        plan.params_files(inputs, targets.params)?;
        let slots = plan.state_files(inputs, pairing, record, targets.state)?;
        for (place, named) in inputs.params.in_files() {
            let name = place.entry.name.as_str();
            let params = inputs.at_params(place);
            let out_params = At {
                file: place.shard,
                offset: plan.out_params(place),
            };
            let bytes = place.entry.data_bytes.end - place.entry.data_bytes.start;
            match pairing.updated.get(name) {
                Some(tensor) => {
                    ensure!(
                        named,
                        "tensor {name:?} is in two files of --params, and {} is not where the index says it is: only \
                         one of the two would be updated, and programs differ in which they read; remove one",
                        inputs.params.shards()[place.shard].source.path().display()
                    );
                    let mut out_slots = slots.get(name).into_iter().flatten().copied();
                    plan.updates.push(Update {
                        tensor,
                        params,
                        out_params,
                        out_slots: out_slots.by_ref().take(plan.slots.len()).collect(),
                        out_masters: out_slots.next(),
                        phase: config.phase(tensor.applied_steps),
                    });
                }
                None => plan.copy(params, out_params, bytes),
            }
        }
        // The slots of tensors that are not updated.
        for (tensor, slots) in &slots {
            if !pairing.updated.contains_key(tensor) {
                for (saved, to) in inputs.slots_of(tensor).iter().zip(slots) {
                    plan.copy(saved.at, *to, saved.bytes);
                }
            }
        }
        Ok(plan)
    }

    /// The first byte of a tensor in the file that is written in place of the one that it was read from.
    fn out_params(&self, place: Place<'_>) -> u64 {
        self.data_starts[place.shard] + place.entry.data_bytes.start
    }

    /// The parameter files and their index.
    fn params_files(&mut self, inputs: &Inputs, target: &Path) -> Result<()> {
        const ROLE: &str = "--out-params";
        let index = inputs.params.index();
        match index {
            Some(_) => ensure!(
                is_index(target),
                "--params is the index of a model in several files, so --out-params has to be one, too: expected a \
                 name that ends in .index.json, got {}",
                target.display()
            ),
            None => ensure!(
                !is_index(target),
                "--params is a single file, so --out-params has to be one, too: a name that ends in .json is an index, \
                 got {}",
                target.display()
            ),
        }
        for shard in inputs.params.shards() {
            let mut header = shard.header.clone();
            header.metadata.retain(|(key, _)| {
                let drop = is_content_hash(key);
                if drop && !self.dropped_metadata.contains(key) {
                    self.dropped_metadata.push(key.clone());
                }
                !drop
            });
            let (role, path) = match index {
                Some(_) => {
                    let name = file_name(shard);
                    (format!("{ROLE} ({name})"), target.with_file_name(&name))
                }
                None => (ROLE.to_owned(), target.to_owned()),
            };
            let start = start_of_file(&header, &role)?;
            self.data_starts.push(start.len() as u64);
            self.files.push(File {
                content: Content::Params,
                role,
                path,
                start,
            });
        }
        if let Some(index) = index {
            self.files.push(File {
                content: Content::Params,
                role: ROLE.to_owned(),
                path: target.to_owned(),
                start: index.json.clone(),
            });
        }
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
        target: &Path,
    ) -> Result<BTreeMap<String, Vec<At>>> {
        const ROLE: &str = "--out-state";
        let is_sharded = is_index(target);
        let shards = if is_sharded {
            inputs.params.shards().len()
        } else {
            1
        };
        let empty = StateRecord {
            applied_steps: BTreeMap::new(),
            ..record.clone()
        };
        // An index has a record of its own, the last, for what is in no file that it names: counts without slots.
        let mut records = vec![empty; shards + usize::from(is_sharded)];
        let mut entries: Vec<Vec<_>> = vec![Vec::new(); shards];
        let mut tensors: Vec<Vec<_>> = vec![Vec::new(); shards];
        let mut names = BTreeMap::new();
        for (name, steps) in &record.applied_steps {
            let param = inputs.params.get(name);
            let param = param.with_context(|| format!("tensor {name:?} has no parameter"))?;
            let in_file = |slot| SlotEntry::name(name, slot);
            let slots = if let Some(updated) = pairing.updated.get(name) {
                let kept = self.slots.iter().map(|slot| slot.name);
                let masters = updated
                    .has_masters()
                    .then(|| updated.storage.masters.slot());
                kept.chain(masters)
                    .map(in_file)
                    .collect::<Result<Vec<_>, _>>()?
            } else {
                let saved = inputs.slots_of(name).iter();
                saved
                    .map(|slot| in_file(&slot.name))
                    .collect::<Result<_, _>>()?
            };
            let record = match &*slots {
                [] => records.len() - 1,
                _ => {
                    let file = param.shard.min(shards - 1);
                    tensors[file].push(name.clone());
                    file
                }
            };
            records[record].applied_steps.insert(name.clone(), *steps);
            for slot in &slots {
                let shape = param.entry.shape.clone();
                entries[record].push((slot.clone(), Dtype::F32, shape));
            }
            names.insert(name, slots);
        }
        let (mut places, mut weight_map, mut total_size) = (HashMap::new(), Vec::new(), 0);
        let files = records.iter().zip(entries).zip(tensors);
        for (shard, ((record, entries), tensors)) in files.enumerate() {
            let mut header = Header::new(record.to_metadata()?, entries)?;
            let unknown = tensors
                .iter()
                .cloned()
                .map(|tensor| (tensor, fingerprint::unknown()));
            fingerprint::put(&mut header, &unknown.collect())?;
            let (role, path) = if is_sharded {
                let name = shard_name(target, shard, shards);
                let tensors = header.tensors().iter();
                weight_map.extend(tensors.map(|tensor| (tensor.name.clone(), name.clone())));
                (format!("{ROLE} ({name})"), target.with_file_name(name))
            } else {
                (ROLE.to_owned(), target.to_owned())
            };
            let start = start_of_file(&header, &role)?;
            for tensor in header.tensors() {
                let place = At {
                    file: self.files.len(),
                    offset: start.len() as u64 + tensor.data_bytes.start,
                };
                places.insert(tensor.name.clone(), place);
            }
            total_size += header.data_len();
            self.states
                .push((self.files.len(), StateStart { header, tensors }));
            self.files.push(File {
                content: Content::State,
                role,
                path,
                start,
            });
        }
        if is_sharded {
            let mut index = Index::new(weight_map)?;
            index.metadata = records[shards].to_metadata()?;
            self.files.push(File {
                content: Content::State,
                role: ROLE.to_owned(),
                path: target.to_owned(),
                start: index.to_bytes(total_size)?,
            });
        }
        let places_of = |(tensor, slots): (&String, Vec<String>)| {
            let places = slots.iter().filter_map(|slot| places.get(slot).copied());
            (tensor.clone(), places.collect())
        };
        Ok(names.into_iter().map(places_of).collect())
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
        for file in &self.files {
            let index = outputs.stage(&file.role, &file.path)?;
            outputs.get(index).write_all_at(&file.start, 0)?;
        }
        for (content, model) in inputs.models() {
            let is_replaced = |path: &Path| -> Result<bool> {
                let Some(output) = outputs.in_place_of(path)? else {
                    return Ok(false);
                };
                let File {
                    content: of, role, ..
                } = &self.files[output];
                ensure!(
                    *of == content,
                    "{role} and {content} are the same file, {}; an output may only take the place of what it goes on from",
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
                let offset = self.out_params(place);
                let of_output = fingerprint::of_output(outputs, place, offset)?;
                Ok((tensor.clone(), of_output))
            };
            let mut header = header.clone();
            let fingerprints = tensors.iter().map(of).collect::<Result<_>>()?;
            fingerprint::put(&mut header, &fingerprints)?;
            outputs.get(*file).write_all_at(&header.to_bytes()?, 0)?;
        }
        Ok(())
    }

    /// All elements to update, in the order of the tensors' parameters, in windows of `max_elems` of them.
    pub fn in_order(&self, max_elems: u64) -> impl Iterator<Item = (Vec<Segment>, u64)> {
        let numels = self.updates.iter().map(|update| update.tensor.numel);
        fill(numels.enumerate(), max_elems)
    }

    /// Cuts the work into windows of at most `max_elems` elements to update, or as many bytes as those have to copy.
    pub fn windows(&self, max_elems: u64) -> Vec<Window> {
        let mut windows = Vec::new();
        let mut phases: BTreeMap<_, Vec<_>> = BTreeMap::new();
        for (index, update) in self.updates.iter().enumerate() {
            let of_phase = phases.entry(update.phase).or_default();
            of_phase.push((index, update.tensor.numel));
        }
        for (phase, updates) in phases {
            windows.extend(
                fill(updates.into_iter(), max_elems).map(|(segments, elems)| Window::Update {
                    segments,
                    elems,
                    phase,
                }),
            );
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
) -> impl Iterator<Item = (Vec<Segment>, u64)> {
    let mut full = Vec::new();
    let (mut segments, mut elems) = (Vec::new(), 0);
    for (update, numel) in tensors {
        let mut done = 0;
        while done < numel {
            let some = (numel - done).min(max_elems - elems);
            segments.push(Segment {
                update,
                elems: done..done + some,
            });
            done += some;
            elems += some;
            if elems == max_elems {
                full.push((std::mem::take(&mut segments), std::mem::take(&mut elems)));
            }
        }
    }
    if elems > 0 {
        full.push((segments, elems));
    }
    full.into_iter()
}

/// A header as a file starts with it.
fn start_of_file(header: &Header, role: &str) -> Result<Vec<u8>> {
    header.to_bytes().map_err(|error| match error {
        HeaderError::TooLarge {
            header_bytes,
            max_header_bytes,
        } => anyhow!(
            "{role} would have a header of {header_bytes} bytes, expected at most {max_header_bytes}, as many as a \
             safetensors file may have; an --out-state that ends in .index.json is split as --params is"
        ),
        error => error.into(),
    })
}

fn file_name(shard: &Shard) -> String {
    let name = shard.source.path().file_name().unwrap_or_default();
    name.to_string_lossy().into_owned()
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
