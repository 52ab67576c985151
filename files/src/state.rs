//! Saved states: in one file or several, slots as a whole or in parts, as the ranks of `wgpu-optim-mpi` leave them.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::Path;

use wgpu_optim::files::{Dtype, Header};
use wgpu_optim::rules::Slot;
use wgpu_optim::state::{Recorded, SlotEntry, StateFileError, StateRecord};
use wgpu_optim::storage::{Codec, MASTER_PARAMS, PARAMS_REST, SectionValues};
use wgpu_optim::{AnyRule, StorageType};

use crate::at::Part;
use crate::error::{FileError, SlotError};
use crate::model::Model;
use crate::window::{Slice, runs};

/// A state in files, of which only the headers have been read.
///
/// The elements of a slot may be in parts, each a tensor `TENSOR.SLOT[START:END]` of one dimension.
#[derive(Debug)]
pub struct SavedState<R = AnyRule> {
    /// Configuration, step counts and control, as all files together say them.
    pub record: StateRecord<R>,
    /// The files.
    pub files: Model,
    /// By tensor and slot.
    slots: BTreeMap<String, BTreeMap<String, SavedSlot>>,
}

/// The parts of a slot in the order of their elements, and its shape where one of them is the whole.
#[derive(Debug, Default)]
struct SavedSlot {
    parts: Vec<Part>,
    shape: Option<Vec<usize>>,
}

/// Places in the files of a state where the slots of one tensor lie, and the tensor's step count.
#[derive(Debug, Default)]
pub struct SavedTensor {
    /// The rule's slots in its order; none if they start afresh.
    pub slots: Vec<Vec<Part>>,
    /// The parameters as `f32`, where it has them.
    pub masters: Option<Vec<Part>>,
    /// The low bits of the masters, where it has these instead.
    pub rests: Option<Vec<Part>>,
    /// Steps that have been applied; none if its slots start afresh.
    pub applied_steps: u64,
}

impl<R: Recorded> SavedState<R> {
    /// Reads the headers of a state's files.
    ///
    /// # Errors
    /// [`FileError`] if they are not of one state.
    pub fn new(files: Model) -> Result<Self, FileError> {
        let index = files.index().filter(|index| !index.metadata.is_empty());
        let of_index = index.map(|index| (&*index.path, as_header(&index.metadata)));
        let shards = files.shards().iter();
        let of_shards = shards.map(|shard| (shard.source.path(), as_whole(&shard.header)));
        let mut record: Option<StateRecord<R>> = None;
        for (path, header) in of_index.into_iter().chain(of_shards) {
            let header = header.map_err(FileError::content(path))?;
            let own = StateRecord::of(&header).map_err(FileError::content(path))?;
            match &mut record {
                Some(record) => join(record, own, path)?,
                None => record = Some(own),
            }
        }
        let record = match record {
            Some(record) => record,
            // An index of no files.
            None => {
                let path = files.index().map_or(Path::new(""), |index| &index.path);
                let record = as_header(&[]).and_then(|header| StateRecord::of(&header));
                record.map_err(FileError::content(path))?
            }
        };
        let mut state = Self {
            record,
            slots: BTreeMap::new(),
            files,
        };
        state.slots = state.find_slots()?;
        Ok(state)
    }

    fn find_slots(&self) -> Result<BTreeMap<String, BTreeMap<String, SavedSlot>>, FileError> {
        let mut all: BTreeMap<_, BTreeMap<_, SavedSlot>> = BTreeMap::new();
        for (shard, file) in self.files.shards().iter().enumerate() {
            for SlotEntry {
                tensor,
                slot,
                entry,
            } in SlotEntry::all_in(&file.header)
            {
                // An index may leave some out.
                let place = self.files.get(&entry.name);
                let Some(place) = place.filter(|place| place.shard == shard) else {
                    continue;
                };
                let (name, elems) = split(slot);
                let whole = 0..entry.numel();
                if let Some(elems) = &elems
                    && elems.end.checked_sub(elems.start) != Some(whole.end)
                {
                    let source = StateFileError::Dtype {
                        tensor: tensor.to_owned(),
                        slot: slot.to_owned(),
                        expected: "as many elements as its name says",
                        actual: format!("{} of {:?}", entry.dtype, entry.shape),
                    };
                    return Err(FileError::content(file.source.path())(source));
                }
                let slots = all.entry(tensor.to_owned()).or_default();
                let saved: &mut SavedSlot = slots.entry(name.to_owned()).or_default();
                if elems.is_none() {
                    saved.shape = Some(entry.shape.clone());
                }
                let codec = entry.dtype.try_into();
                saved.parts.push(Part {
                    elems: elems.unwrap_or(whole),
                    at: place.at(0),
                    // Another dtype has been refused with the record.
                    codec: codec.unwrap_or_default(),
                });
            }
        }
        for slot in all.values_mut().flat_map(BTreeMap::values_mut) {
            slot.parts
                .sort_by_key(|part| (part.elems.start, part.elems.end));
        }
        Ok(all)
    }

    /// The slots that there are of a tensor.
    pub fn slots_of(&self, tensor: &str) -> impl Iterator<Item = &str> {
        let slots = self.slots.get(tensor).into_iter().flat_map(BTreeMap::keys);
        slots.map(String::as_str)
    }

    /// Every tensor that there are slots of, and its slots.
    pub fn slots(&self) -> impl Iterator<Item = (&str, &str)> {
        let slots = self.slots.iter();
        slots.flat_map(|(tensor, slots)| slots.keys().map(move |slot| (&**tensor, &**slot)))
    }

    fn saved(&self, tensor: &str, slot: &str) -> Option<&SavedSlot> {
        self.slots.get(tensor)?.get(slot)
    }

    /// The places of a slot, as far as its parts are there.
    pub fn parts(&self, tensor: &str, slot: &str) -> &[Part] {
        self.saved(tensor, slot).map_or(&[], |saved| &saved.parts)
    }

    /// The places of a slot of a tensor of this shape: every element of it once, in order.
    ///
    /// # Errors
    /// [`FileError::Slot`] if it does not.
    pub fn parts_of(
        &self,
        tensor: &str,
        slot: &str,
        shape: &[usize],
    ) -> Result<&[Part], FileError> {
        let numel = shape.iter().map(|size| *size as u64).product();
        let wrong = |why| Err(slot_error(tensor, slot, why));
        let other_shape =
            |actual: &[usize]| wrong(SlotError::Shape(shape.to_owned(), actual.to_owned()));
        let coverage = |elem, files| wrong(SlotError::Coverage { elem, files });
        let saved = self.saved(tensor, slot);
        let other = saved.and_then(|saved| saved.shape.as_ref());
        if let Some(actual) = other.filter(|actual| *actual != shape) {
            return other_shape(actual);
        }
        let parts = self.parts(tensor, slot);
        let mut end = 0;
        for Part { elems, .. } in parts {
            match elems.start {
                start if start > end => return coverage(end, 0),
                start if start < end => return coverage(start, 2),
                _ => end = elems.end,
            }
        }
        match end {
            end if end < numel => coverage(end, 0),
            end if end > numel => other_shape(&[end as usize]),
            _ => Ok(parts),
        }
    }

    /// Finds the slots of a tensor of this shape, whose parameters are stored as `of`, for a rule that keeps `slots`.
    ///
    /// # Errors
    /// [`FileError::Slot`] if there are some of the slots but not all, or others.
    pub fn of_tensor(
        &self,
        tensor: &str,
        shape: &[usize],
        of: StorageType,
        slots: &[Slot],
    ) -> Result<SavedTensor, FileError> {
        let (mut saved, mut rule_slots) = (SavedTensor::default(), 0);
        for slot in self.slots_of(tensor) {
            let parts = || Ok::<_, FileError>(self.parts_of(tensor, slot, shape)?.to_vec());
            match (slot, of) {
                (MASTER_PARAMS, StorageType::Bf16 | StorageType::F16) => {
                    saved.masters = Some(parts()?);
                }
                (PARAMS_REST, StorageType::Bf16) => saved.rests = Some(parts()?),
                (MASTER_PARAMS | PARAMS_REST, _) => {
                    return Err(slot_error(tensor, slot, SlotError::NoMasters(of)));
                }
                _ if slots.iter().any(|kept| kept.name == slot) => rule_slots += 1,
                _ => return Err(slot_error(tensor, slot, SlotError::NotKept)),
            }
        }
        // As the library does where both are there.
        saved.rests = saved.rests.filter(|_| saved.masters.is_none());
        if rule_slots > 0 {
            for slot in slots {
                if self.saved(tensor, slot.name).is_none() {
                    return Err(slot_error(tensor, slot.name, SlotError::Missing));
                }
                let parts = self.parts_of(tensor, slot.name, shape)?;
                saved.slots.push(parts.to_vec());
            }
        }
        // Slots that are not there start fresh, so the next step is the first.
        if saved.slots.len() == slots.len() {
            let counted = self.record.applied_steps.get(tensor);
            saved.applied_steps = counted.copied().unwrap_or(0);
        }
        Ok(saved)
    }

    /// Reads some elements of a slot whose [parts](Self::parts_of) are these, all of one codec.
    ///
    /// # Errors
    /// [`FileError`] if a file cannot be read.
    pub fn read(
        &self,
        parts: &[Part],
        slot: &str,
        elems: Range<u64>,
    ) -> Result<SectionValues, FileError> {
        let codec = parts.first().map_or(Codec::F32, |part| part.codec);
        let elem_bytes = codec.elem_bytes() as usize;
        let mut bytes = vec![0; (elems.end - elems.start) as usize * elem_bytes];
        let slice = Slice { tensor: 0, elems };
        for run in runs(&[slice], |_| parts) {
            let source = &self.files.shards()[run.at.file].source;
            let own = run.elems.start * elem_bytes..run.elems.end * elem_bytes;
            source.read_exact_at(&mut bytes[own], run.at.offset)?;
        }
        Ok(SectionValues::from_bytes(codec, bytes).of_slot(slot))
    }
}

/// The entry of a slot in the header of a file that has these elements of it; `name` is its name as a whole.
pub fn slot_entry(
    name: String,
    shape: &[usize],
    elems: &Range<u64>,
    codec: Codec,
) -> (String, Dtype, Vec<usize>) {
    let Range { start, end } = *elems;
    let numel = shape.iter().map(|size| *size as u64).product();
    match *elems == (0..numel) {
        true => (name, codec.into(), shape.to_owned()),
        false => {
            let shape = vec![(end - start) as usize];
            (format!("{name}[{start}:{end}]"), codec.into(), shape)
        }
    }
}

fn slot_error(tensor: &str, slot: &str, why: SlotError) -> FileError {
    FileError::Slot {
        tensor: tensor.to_owned(),
        slot: slot.to_owned(),
        why,
    }
}

/// A header that says of a state what these metadata do.
fn as_header(metadata: &[(String, String)]) -> Result<Header, StateFileError> {
    Ok(Header::new(metadata.to_vec(), [])?)
}

/// The header of a file of a state as if it had all of every slot, for what it says of the state.
fn as_whole(header: &Header) -> Result<Header, StateFileError> {
    let tensors = header.tensors().iter();
    let whole = tensors.map(|entry| {
        // Of the first format a tensor's own name is the last there is.
        let (name, _) = match entry.name.contains('.') {
            true => split(&entry.name),
            false => (&*entry.name, None),
        };
        (name.to_owned(), entry.dtype, entry.shape.clone())
    });
    Ok(Header::new(header.metadata.clone(), whole)?)
}

/// A slot's name in a file without the elements that it has there, and these.
fn split(slot: &str) -> (&str, Option<Range<u64>>) {
    let parts = || {
        let (name, elems) = slot.strip_suffix(']')?.rsplit_once('[')?;
        let (start, end) = elems.split_once(':')?;
        Some((name, start.parse().ok()?..end.parse().ok()?))
    };
    match parts() {
        Some((name, elems)) => (name, Some(elems)),
        None => (slot, None),
    }
}

/// Adds what another file says, which has to be of the same state.
fn join<R: Recorded>(
    record: &mut StateRecord<R>,
    other: StateRecord<R>,
    path: &Path,
) -> Result<(), FileError> {
    let mixed = |key| {
        Err(FileError::Mixed {
            path: path.to_owned(),
            key,
        })
    };
    if record.config != other.config {
        return mixed("rule");
    }
    if record.steps != other.steps {
        return mixed("steps");
    }
    if record.control != other.control {
        return mixed("control");
    }
    // Files of ranks count all tensors each.
    for (tensor, steps) in other.applied_steps {
        if *record.applied_steps.entry(tensor).or_insert(steps) != steps {
            return mixed("applied_steps");
        }
    }
    for (tensor, kind) in other.state_kinds {
        let known = record.state_kinds.entry(tensor).or_insert(kind.clone());
        if *known != kind {
            return mixed("meanings");
        }
    }
    Ok(())
}
