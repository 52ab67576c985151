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

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufReader, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use wgpu_optim::files::{Dtype, Header, Index};
use wgpu_optim::{
    OptimizerState, Recorded, Rule as _, SlotEntry, SlotState, StateError, StateFileError,
    StateRecord, TensorState,
};

use crate::error::ShardError;
use crate::optimizer::ShardedOptimizer;
use crate::ranks::Ranks;
use crate::share::Share;

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

/// The elements of a slot that one file has.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    elems: Range<u64>,
    /// Of the whole tensor, where it is all of it.
    whole: Option<Vec<usize>>,
}

impl Part {
    /// What a rank writes of a tensor's slots, if it is the one to write any.
    pub(crate) fn of(elems: Range<u64>, shape: &[usize], rank: usize) -> Option<Self> {
        let numel = shape.iter().map(|size| *size as u64).product();
        // What has no elements is nobody's.
        let is_own = !elems.is_empty() || (numel == 0 && rank == 0);
        is_own.then(|| Self {
            whole: (elems == (0..numel)).then(|| shape.to_owned()),
            elems,
        })
    }

    /// The entry of a slot in a header, whose name there is this if it is whole.
    pub(crate) fn entry(&self, name: String) -> (String, Dtype, Vec<usize>) {
        let Range { start, end } = self.elems;
        match &self.whole {
            Some(shape) => (name, Dtype::F32, shape.clone()),
            None => {
                let shape = vec![(end - start) as usize];
                (format!("{name}[{start}:{end}]"), Dtype::F32, shape)
            }
        }
    }

    /// The name of a slot in a header without the elements, and these.
    fn split(slot: &str) -> (&str, Option<Range<u64>>) {
        let parts = slot.strip_suffix(']').and_then(|slot| {
            let (name, elems) = slot.rsplit_once('[')?;
            let (start, end) = elems.split_once(':')?;
            Some((name, start.parse().ok()?..end.parse().ok()?))
        });
        match parts {
            Some((name, elems)) => (name, Some(elems)),
            None => (slot, None),
        }
    }
}

/// A state in files, of which only the headers have been read.
pub(crate) struct SavedState<R> {
    pub(crate) record: StateRecord<R>,
    files: Vec<SavedFile>,
    /// The file that was read last; a process may not have all of them open.
    open: RefCell<Option<(usize, File)>>,
    /// By tensor and slot.
    parts: BTreeMap<String, BTreeMap<String, Vec<SavedPart>>>,
}

/// A file of a state, as it was when its header was read.
struct SavedFile {
    path: PathBuf,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl SavedFile {
    fn open(path: &Path) -> io::Result<(Self, File)> {
        let file = File::open(path)?;
        let metadata = file.metadata()?;
        let saved = Self {
            path: path.to_owned(),
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
        };
        Ok((saved, file))
    }

    /// Once more, if it is still the same.
    fn open_again(&self) -> io::Result<File> {
        let (now, file) = Self::open(&self.path)?;
        match (now.bytes, now.modified) == (self.bytes, self.modified) {
            true => Ok(file),
            false => Err(io::Error::other("it was changed meanwhile")),
        }
    }
}

struct SavedPart {
    part: Part,
    file: usize,
    /// Of its first byte in the file.
    offset: u64,
}

impl<R: Recorded> SavedState<R> {
    /// Opens the files of an index (a path that ends in `.json`), or one file.
    pub(crate) fn open(path: &Path) -> Result<Self, ShardError> {
        let index = is_index(path).then(|| read_index(path)).transpose()?;
        let paths: Vec<_> = match &index {
            Some(index) => {
                let shards = index.shards().iter();
                shards.map(|name| path.with_file_name(name)).collect()
            }
            None => vec![path.to_owned()],
        };
        let named: Option<HashMap<&str, &str>> = index.as_ref().map(|index| {
            let tensors = index.tensors().iter();
            tensors.map(|(tensor, file)| (&**tensor, &**file)).collect()
        });
        let mut said = Said::default();
        if let Some(index) = &index {
            let own = index.metadata.iter().filter(|(key, _)| key != GENERATION);
            let own: Vec<_> = own.cloned().collect();
            // One that somebody else has written need not say anything.
            if !own.is_empty() {
                said.add(path, &own)?;
            }
        }
        let mut saved = (Vec::new(), BTreeMap::<_, BTreeMap<_, Vec<_>>>::new());
        for (index, path) in paths.iter().enumerate() {
            let (file, content) = SavedFile::open(path).map_err(io_error("read", path))?;
            let header = Header::read(&mut BufReader::new(content), file.bytes);
            let header = header.map_err(|source| ShardError::Header {
                path: path.clone(),
                source,
            })?;
            said.add(path, &header.metadata)?;
            let name = path.file_name().and_then(|name| name.to_str());
            for SlotEntry {
                tensor,
                slot,
                entry,
            } in SlotEntry::all_in(&header)
            {
                let is_named = named.as_ref().is_none_or(|named| {
                    named
                        .get(&*entry.name)
                        .is_some_and(|file| Some(*file) == name)
                });
                if !is_named {
                    continue;
                }
                let (slot, elems) = Part::split(slot);
                let numel = entry.numel();
                let fits = elems
                    .as_ref()
                    .is_none_or(|elems| elems.end.checked_sub(elems.start) == Some(numel));
                if entry.dtype != Dtype::F32 || !fits {
                    let source = StateFileError::Dtype {
                        tensor: tensor.to_owned(),
                        slot: slot.to_owned(),
                        actual: format!("{} of {:?}", entry.dtype, entry.shape),
                    };
                    let path = path.clone();
                    return Err(ShardError::StateFile { path, source });
                }
                let part = SavedPart {
                    part: Part {
                        whole: elems.is_none().then(|| entry.shape.clone()),
                        elems: elems.unwrap_or(0..numel),
                    },
                    file: index,
                    offset: header.data_start() + entry.data_bytes.start,
                };
                let slots = saved.1.entry(tensor.to_owned()).or_default();
                slots.entry(slot.to_owned()).or_default().push(part);
            }
            saved.0.push(file);
        }
        let (files, mut parts) = saved;
        for parts in parts.values_mut().flat_map(BTreeMap::values_mut) {
            parts.sort_by_key(|saved| (saved.part.elems.start, saved.part.elems.end));
        }
        Ok(Self {
            record: said.record.map_or_else(|| record_of(path, &[]), Ok)?,
            files,
            open: RefCell::default(),
            parts,
        })
    }

    /// The slots that there are of a tensor.
    pub(crate) fn slots_of(&self, tensor: &str) -> impl Iterator<Item = &str> {
        let slots = self.parts.get(tensor).into_iter().flat_map(BTreeMap::keys);
        slots.map(String::as_str)
    }

    /// Every tensor that there are slots of.
    pub(crate) fn tensors(&self) -> impl Iterator<Item = &str> {
        self.parts.keys().map(String::as_str)
    }

    fn parts_of(&self, tensor: &str, slot: &str) -> &[SavedPart] {
        let slots = self.parts.get(tensor);
        let parts = slots.and_then(|slots| slots.get(slot));
        parts.map_or(&[], Vec::as_slice)
    }

    /// Makes sure that a slot is there for every element of a tensor of this shape, once.
    pub(crate) fn check(
        &self,
        tensor: &str,
        slot: &str,
        shape: &[usize],
    ) -> Result<(), ShardError> {
        let numel = shape.iter().map(|size| *size as u64).product();
        let coverage = |elem, files| {
            Err(ShardError::Coverage {
                tensor: tensor.to_owned(),
                slot: slot.to_owned(),
                elem,
                files,
            })
        };
        let mut end = 0;
        for SavedPart { part, .. } in self.parts_of(tensor, slot) {
            match &part.whole {
                // A flat shape fits any: it is what older files hold.
                Some(whole) if whole != shape && *whole != [numel as usize] => {
                    return Err(StateError::Shape {
                        tensor: tensor.to_owned(),
                        expected: shape.to_owned(),
                        actual: whole.clone(),
                    }
                    .into());
                }
                _ if part.elems.start > end => return coverage(end, 0),
                _ if part.elems.start < end => return coverage(part.elems.start, 2),
                _ => end = part.elems.end,
            }
        }
        match end == numel {
            true => Ok(()),
            false if end < numel => coverage(end, 0),
            false => Err(StateError::Length {
                tensor: tensor.to_owned(),
                slot: slot.to_owned(),
                expected: numel,
                actual: end,
            }
            .into()),
        }
    }

    /// Reads some elements of a slot that [`check`](Self::check) has been satisfied with.
    pub(crate) fn read(
        &self,
        tensor: &str,
        slot: &str,
        elems: Range<u64>,
        values: &mut [f32],
    ) -> Result<(), ShardError> {
        let parts = self.parts_of(tensor, slot);
        let first = parts.partition_point(|saved| saved.part.elems.end <= elems.start);
        for SavedPart { part, file, offset } in &parts[first..] {
            let start = part.elems.start.max(elems.start);
            let end = part.elems.end.min(elems.end);
            if start >= end {
                break;
            }
            let own = (start - elems.start) as usize..(end - elems.start) as usize;
            let offset = offset + (start - part.elems.start) * 4;
            let bytes = bytemuck::cast_slice_mut(&mut values[own]);
            self.read_from(*file, bytes, offset)
                .map_err(io_error("read", &self.files[*file].path))?;
        }
        Ok(())
    }

    fn read_from(&self, index: usize, bytes: &mut [u8], offset: u64) -> io::Result<()> {
        let mut open = self.open.borrow_mut();
        let file = match open.take() {
            Some((last, file)) if last == index => file,
            _ => self.files[index].open_again()?,
        };
        read_exact_at(&file, bytes, offset)?;
        *open = Some((index, file));
        Ok(())
    }
}

/// The metadata that the files of a state agree on.
struct Said<R> {
    /// The metadata of the first one.
    metadata: Vec<(String, String)>,
    record: Option<StateRecord<R>>,
}

impl<R> Default for Said<R> {
    fn default() -> Self {
        Self {
            metadata: Vec::new(),
            record: None,
        }
    }
}

/// The metadata that every file has to have alike; the rest may be of its own tensors.
const OF_THE_STATE: [&str; 6] = [
    "format_version",
    "rule",
    "form",
    "config",
    "steps",
    "control",
];

impl<R: Recorded> Said<R> {
    /// Takes what another file says, which has to be of the same state.
    fn add(&mut self, path: &Path, metadata: &[(String, String)]) -> Result<(), ShardError> {
        let other = record_of(path, metadata)?;
        let Some(record) = &mut self.record else {
            self.metadata = metadata.to_vec();
            self.record = Some(other);
            return Ok(());
        };
        let mixed = |key: &str| ShardError::Mixed {
            path: path.to_owned(),
            key: key.to_owned(),
        };
        let differs = |key: &&str| said(&self.metadata, key) != said(metadata, key);
        if let Some(key) = OF_THE_STATE.into_iter().find(differs) {
            return Err(mixed(key));
        }
        for (tensor, steps) in other.applied_steps {
            if *record.applied_steps.entry(tensor).or_insert(steps) != steps {
                return Err(mixed("applied_steps"));
            }
        }
        for (tensor, meaning) in other.meanings {
            let known = record.meanings.entry(tensor).or_insert(meaning.clone());
            if *known != meaning {
                return Err(mixed("meanings"));
            }
        }
        Ok(())
    }
}

fn said<'m>(metadata: &'m [(String, String)], key: &str) -> Option<&'m str> {
    let entry = metadata.iter().find(|(known, _)| known == key);
    entry.map(|(_, value)| value.as_str())
}

fn record_of<R: Recorded>(
    path: &Path,
    metadata: &[(String, String)],
) -> Result<StateRecord<R>, ShardError> {
    let header = Header::new(metadata.to_vec(), []).map_err(|source| ShardError::Header {
        path: path.to_owned(),
        source,
    })?;
    StateRecord::of(&header).map_err(|source| ShardError::StateFile {
        path: path.to_owned(),
        source,
    })
}

/// The names of the files of a sharded state: that of its index, less its ending, and what no other generation has. So no
/// two indices share them.
pub(crate) struct Names {
    stem: String,
    generation: u64,
    ranks: usize,
}

impl Names {
    /// Names that no index in the folder has, the same on all ranks. Collective.
    ///
    /// # Errors
    /// [`ShardError`] if `index` cannot be written: it is the index of something else, or not named as one.
    pub(crate) fn agreed(ranks: &Ranks, index: &Path) -> Result<Self, ShardError> {
        let name = index.file_name().unwrap_or_default().to_string_lossy();
        let stem = name.strip_suffix(".json").filter(|stem| !stem.is_empty());
        let mut names = Self {
            stem: stem.unwrap_or_default().to_owned(),
            generation: 1,
            ranks: ranks.size(),
        };
        let last = match (stem, ranks.rank()) {
            (None, _) => Err(ShardError::IndexName {
                path: index.to_owned(),
            }),
            (Some(_), 0) => LastIndex::read(index),
            _ => Ok(None),
        };
        if let Some(last) = ranks.all_well(last)? {
            names.generation = last.generation.saturating_add(1);
        }
        if ranks.rank() == 0 {
            let taken = named_by_others(index);
            let is_taken =
                |names: &Self| (0..names.ranks).any(|rank| taken.contains(&names.of(rank)));
            while is_taken(&names) {
                names.generation = names.generation.saturating_add(1);
            }
        }
        let first = ranks.gather(names.generation.to_le_bytes())[0];
        names.generation = u64::from_le_bytes(first);
        Ok(names)
    }

    /// The name of a rank's file.
    pub(crate) fn of(&self, rank: usize) -> String {
        let Self {
            stem,
            generation,
            ranks,
        } = self;
        format!(
            "{stem}-{generation:06}-{:05}-of-{ranks:05}.safetensors",
            rank + 1
        )
    }

    /// Makes sure that the first rank sees every rank's file beside the index: an index of files that nobody else can see
    /// would take the place of one whose files are there. Collective; `own` is this rank's file, which is on disk.
    pub(crate) fn check_seen(
        &self,
        ranks: &Ranks,
        index: &Path,
        own: &Path,
    ) -> Result<(), ShardError> {
        let bytes = fs::metadata(own).map(|own| own.len());
        let bytes = ranks.all_well(bytes.map_err(io_error("read", own)))?;
        let sizes = ranks.gather(bytes.to_le_bytes()).into_iter();
        let mut sizes = sizes.map(u64::from_le_bytes).enumerate();
        let seen = match ranks.rank() {
            0 => sizes.try_for_each(|(rank, expected_bytes)| {
                let path = index.with_file_name(self.of(rank));
                match fs::metadata(&path) {
                    Ok(seen) if seen.len() == expected_bytes => Ok(()),
                    _ => Err(ShardError::NotShared { rank, path }),
                }
            }),
            _ => Ok(()),
        };
        ranks.all_well(seen)
    }

    /// Puts an index of all ranks' files in place of the one before, and removes the files of that. Collective; all files
    /// have been [seen](Self::check_seen).
    pub(crate) fn replace_index(
        &self,
        ranks: &Ranks,
        path: &Path,
        own: &Header,
    ) -> Result<(), ShardError> {
        let own_names = own.tensors().iter().map(|tensor| tensor.name.as_str());
        let names = ranks.gather_lists(own_names)?;
        let sizes = ranks.gather(own.data_len().to_le_bytes());
        let replaced = match ranks.rank() {
            0 => {
                let weight_map = names.into_iter().enumerate().flat_map(|(rank, names)| {
                    let named = move |name| (name, self.of(rank));
                    names.into_iter().map(named)
                });
                let total = sizes.into_iter().map(u64::from_le_bytes).sum();
                LastIndex::read(path).and_then(|last| {
                    self.write_index(path, weight_map.collect(), &own.metadata, total)?;
                    Ok(last)
                })
            }
            _ => Ok(None),
        };
        let last = ranks.all_well(replaced)?;
        if ranks.rank() == 0 {
            let last = last.map_or_else(Vec::new, |last| last.files);
            self.remove_others(path, last);
        }
        Ok(())
    }

    fn write_index(
        &self,
        path: &Path,
        weight_map: Vec<(String, String)>,
        metadata: &[(String, String)],
        total_size: u64,
    ) -> Result<(), ShardError> {
        let index_error = |source| ShardError::Index {
            path: path.to_owned(),
            source,
        };
        let mut index = Index::new(weight_map).map_err(index_error)?;
        index.metadata = metadata.to_vec();
        let generation = self.generation.to_string();
        index.metadata.push((GENERATION.to_owned(), generation));
        let json = index.to_bytes(total_size).map_err(index_error)?;
        write(path, |to| to.write_all(&json))
    }

    /// Removes the files that the index before has named, and what generations have left that were never finished; not
    /// what another index names, too.
    fn remove_others(&self, index: &Path, last: Vec<String>) {
        let entries = fs::read_dir(folder_of(index))
            .into_iter()
            .flatten()
            .flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let unfinished = names.filter(|name| self.is_a_generation(name));
        let mut kept = named_by_others(index);
        kept.extend((0..self.ranks).map(|rank| self.of(rank)));
        for name in last.into_iter().chain(unfinished) {
            // What is left is in nobody's way.
            if !kept.contains(&name) {
                let _ = fs::remove_file(index.with_file_name(name));
            }
        }
    }

    /// Whether a file has the name of a rank's, of this generation or another one.
    fn is_a_generation(&self, name: &str) -> bool {
        let rest = name.strip_prefix(&*self.stem);
        let rest = rest.and_then(|rest| rest.strip_suffix(".safetensors"));
        let parts: Vec<_> = rest.unwrap_or_default().split('-').collect();
        let is_number = |text: &str, digits| {
            text.len() >= digits && text.bytes().all(|byte| byte.is_ascii_digit())
        };
        match parts[..] {
            ["", generation, rank, "of", ranks] => {
                is_number(generation, 6) && is_number(rank, 5) && is_number(ranks, 5)
            }
            _ => false,
        }
    }
}

/// The index of a state that is to be replaced, as far as it reads.
struct LastIndex {
    /// How often it has been written; 0 where nobody has counted.
    generation: u64,
    files: Vec<String>,
}

impl LastIndex {
    /// Reads the index at a path; `None` if there is none.
    fn read(path: &Path) -> Result<Option<Self>, ShardError> {
        if !fs::exists(path).map_err(io_error("read", path))? {
            return Ok(None);
        }
        let index = read_index(path)?;
        // What every state says of itself, and no model.
        let keys = ["format_version", "applied_steps"];
        if keys
            .into_iter()
            .any(|key| said(&index.metadata, key).is_none())
        {
            return Err(ShardError::NotAState {
                path: path.to_owned(),
            });
        }
        let generation = said(&index.metadata, GENERATION);
        let generation = generation.and_then(|generation| generation.parse().ok());
        Ok(Some(Self {
            generation: generation.unwrap_or(0),
            files: index.shards().to_vec(),
        }))
    }
}

/// The files that the other indices in the folder of an index name.
fn named_by_others(index: &Path) -> HashSet<String> {
    let entries = fs::read_dir(folder_of(index))
        .into_iter()
        .flatten()
        .flatten();
    let others = entries.filter(|entry| Some(&*entry.file_name()) != index.file_name());
    let paths = others.map(|entry| entry.path());
    let indices = paths.filter(|path| is_index(path) && path.is_file());
    let indices = indices.filter_map(|path| read_index(&path).ok());
    indices.flat_map(|index| index.shards().to_vec()).collect()
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

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(not(unix))]
fn read_exact_at(mut file: &File, buffer: &mut [u8], offset: u64) -> io::Result<()> {
    use std::io::{Read as _, Seek as _};
    file.seek(io::SeekFrom::Start(offset))?;
    file.read_exact(buffer)
}
