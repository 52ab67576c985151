//! A sharded state in files, as far as one is read: headers first, then the elements that a rank needs.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufReader};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use wgpu_optim::files::{Dtype, Header};
use wgpu_optim::{Recorded, SlotEntry, StateError, StateFileError, StateRecord};

use super::{GENERATION, io_error, is_index, read_index, said};
use crate::error::ShardError;

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
