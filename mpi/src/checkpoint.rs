//! Sharded states in files: one for each rank, and an index.
//!
//! The index is laid out as that of a model in several files, and names the file of every tensor. A file's tensors are
//! those of a [state file](OptimizerState::to_safetensors) where a rank has all of a slot, `TENSOR.SLOT`; of a part it is
//! `TENSOR.SLOT[START:END]`, with the elements as Python counts them, in one dimension. So the state of one rank is one
//! that everybody can read.
//!
//! Files are written under names that no earlier index has, and the index is replaced when all of them are on disk: whatever
//! happens, there is one whole state.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::fs::{self, File};
use std::io::{self, BufReader, Write as _};
use std::ops::Range;
use std::path::{Path, PathBuf};

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
    /// Writes what all ranks remember: each its own file, and the first one the index, which is named `index` and lies on a
    /// disk that all ranks see, in a folder that there is. Replaces what an earlier call has written there. Collective.
    ///
    /// # Errors
    /// [`ShardError`]; then what was there before still is.
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
        let replaced = ranks
            .all_well(written)
            .and_then(|header| names.replace_index(ranks, index, &header));
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
    files: Vec<(PathBuf, File)>,
    /// By tensor and slot.
    parts: BTreeMap<String, BTreeMap<String, Vec<SavedPart>>>,
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
        let is_index = path
            .extension()
            .is_some_and(|e| e.eq_ignore_ascii_case("json"));
        let index = is_index.then(|| read_index(path)).transpose()?;
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
        let metadata = index.as_ref().map(|index| {
            let own = index.metadata.iter().filter(|(key, _)| key != GENERATION);
            own.cloned().collect()
        });
        // One that somebody else has written need not say anything.
        let mut metadata = metadata.filter(|metadata: &Vec<_>| !metadata.is_empty());
        let mut saved = (Vec::new(), BTreeMap::<_, BTreeMap<_, Vec<_>>>::new());
        for (index, path) in paths.iter().enumerate() {
            let file = File::open(path).map_err(io_error("read", path))?;
            let bytes = file.metadata().map_err(io_error("read", path))?.len();
            let header = Header::read(&mut BufReader::new(&file), bytes);
            let header = header.map_err(|source| ShardError::Header {
                path: path.clone(),
                source,
            })?;
            check_same(&mut metadata, &header.metadata, path)?;
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
            saved.0.push((path.clone(), file));
        }
        let (files, mut parts) = saved;
        for parts in parts.values_mut().flat_map(BTreeMap::values_mut) {
            parts.sort_by_key(|saved| (saved.part.elems.start, saved.part.elems.end));
        }
        let record = Header::new(metadata.unwrap_or_default(), []);
        let record = record.map_err(|source| ShardError::Header {
            path: path.to_owned(),
            source,
        })?;
        let record = StateRecord::of(&record).map_err(|source| ShardError::StateFile {
            path: path.to_owned(),
            source,
        })?;
        Ok(Self {
            record,
            files,
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
            let (path, file) = &self.files[*file];
            let offset = offset + (start - part.elems.start) * 4;
            read_exact_at(file, bytemuck::cast_slice_mut(&mut values[own]), offset)
                .map_err(io_error("read", path))?;
        }
        Ok(())
    }
}

/// Makes sure that files are of one state: they say the same of it.
fn check_same(
    first: &mut Option<Vec<(String, String)>>,
    other: &[(String, String)],
    path: &Path,
) -> Result<(), ShardError> {
    let Some(first) = first else {
        *first = Some(other.to_vec());
        return Ok(());
    };
    let differs = |(key, value): &&(String, String)| {
        let same = other.iter().find(|(known, _)| known == key);
        same.is_none_or(|(_, other)| other != value)
    };
    match first.iter().find(differs) {
        None => Ok(()),
        Some((key, _)) => Err(ShardError::Mixed {
            path: path.to_owned(),
            key: key.clone(),
        }),
    }
}

/// The names of the files of a sharded state.
pub(crate) struct Names {
    stem: String,
    generation: u64,
    ranks: usize,
}

impl Names {
    /// Names that the index of before does not have, the same on all ranks. Collective.
    pub(crate) fn agreed(ranks: &Ranks, index: &Path) -> Result<Self, ShardError> {
        let last = match ranks.rank() {
            0 => generation(index),
            _ => Ok(0),
        };
        let last = ranks.all_well(last)?;
        let first = ranks.gather(last.to_le_bytes())[0];
        let name = index.file_name().unwrap_or_default().to_string_lossy();
        let stem = [".safetensors.index.json", ".index.json", ".json"]
            .iter()
            .find_map(|ending| name.strip_suffix(ending));
        Ok(Self {
            stem: stem.unwrap_or(&name).to_owned(),
            generation: u64::from_le_bytes(first).saturating_add(1),
            ranks: ranks.size(),
        })
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

    /// Puts an index of all ranks' files in place of the one before, and removes the files of that. Collective; every
    /// rank's file is on disk.
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
                self.write_index(path, weight_map.collect(), &own.metadata, total)
            }
            _ => Ok(()),
        };
        ranks.all_well(replaced)?;
        if ranks.rank() == 0 {
            self.remove_others(path);
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

    /// Removes what earlier generations have left beside the index, those that were never finished included.
    fn remove_others(&self, index: &Path) {
        let folder = folder_of(index);
        let of_stem = format!("{}-", self.stem);
        let own: HashSet<_> = (0..self.ranks).map(|rank| self.of(rank)).collect();
        let is_other = |name: &str| {
            let rest = name.strip_prefix(&of_stem);
            let rest = rest.and_then(|rest| rest.strip_suffix(".safetensors"));
            let [generation, rank, "of", ranks] =
                rest.unwrap_or_default().split('-').collect::<Vec<_>>()[..]
            else {
                return false;
            };
            let is_number = |text: &str, digits| {
                text.len() >= digits && text.bytes().all(|byte| byte.is_ascii_digit())
            };
            let ours = is_number(generation, 6) && is_number(rank, 5) && is_number(ranks, 5);
            ours && !own.contains(name)
        };
        // What is left is in nobody's way.
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            if entry.file_name().to_str().is_some_and(is_other) {
                let _ = fs::remove_file(entry.path());
            }
        }
    }
}

/// How often an index has been written; 0 if it is not there, or not one of ours.
fn generation(index: &Path) -> Result<u64, ShardError> {
    if !fs::exists(index).map_err(io_error("read", index))? {
        return Ok(0);
    }
    let index = read_index(index)?;
    let mut metadata = index.metadata.iter();
    let generation = metadata.find(|(key, _)| key == GENERATION);
    Ok(generation
        .and_then(|(_, value)| value.parse().ok())
        .unwrap_or(0))
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
