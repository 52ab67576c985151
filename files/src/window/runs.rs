//! Values on their way between files and a window, whatever their type.

use std::ops::Range;
use std::slice::from_ref;

use wgpu_optim::StorageType;
use wgpu_optim::rules::Slot;
use wgpu_optim::storage::{self, Codec, SectionValues};

use super::{Slice, Values};
use crate::at::{At, Part};
use crate::error::FileError;
use crate::output::Outputs;
use crate::source::SourceFile;
use crate::state::SavedTensor;

/// Elements of a window that lie side by side in a file, too.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    /// The place of the first.
    pub at: At,
    /// The elements of the window that lie there.
    pub elems: Range<usize>,
    /// The codec of the elements in the file.
    pub codec: Codec,
}

/// Finds where the slices of a window lie in files, as few runs as they make. `parts_of` has the parts of a tensor; those without
/// any are left out.
pub fn runs<'p>(slices: &[Slice], parts_of: impl Fn(usize) -> &'p [Part]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (slice, in_window) in Slice::in_window(slices) {
        let parts = parts_of(slice.tensor);
        let first = parts.partition_point(|part| part.elems.end <= slice.elems.start);
        for part in &parts[first..] {
            let start = part.elems.start.max(slice.elems.start);
            let end = part.elems.end.min(slice.elems.end);
            if start >= end {
                break;
            }
            let (at, codec) = (part.place(start), part.codec);
            let first = in_window.start + (start - slice.elems.start) as usize;
            let elems = first..first + (end - start) as usize;
            match runs.last_mut() {
                Some(last)
                    if last.codec == codec
                        && last.elems.end == elems.start
                        && last.at.plus(last.elems.len() as u64 * codec.elem_bytes()) == at =>
                {
                    last.elems.end = elems.end;
                }
                _ => runs.push(Run { at, elems, codec }),
            }
        }
    }
    runs
}

/// The parts of one slot, if it is there.
fn parts_at(slots: &[Vec<Part>], index: usize) -> &[Part] {
    slots.get(index).map_or(&[], Vec::as_slice)
}

/// A parameter that is not what its master rounds to.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct NotRounded {
    /// The parameter's tensor.
    pub tensor: usize,
    /// The parameter's index in its tensor.
    pub elem: u64,
    /// The parameter.
    pub actual: f32,
    /// The master, rounded.
    pub expected: f32,
}

/// Reads for one thread.
pub struct Reader<'f> {
    /// The files, by the numbers of [`At::file`].
    files: &'f [&'f SourceFile],
    /// Hears how many bytes have been read.
    count: &'f (dyn Fn(u64) + Sync),
    halves: Vec<u16>,
    masters: Vec<f32>,
    rounded: Vec<f32>,
}

impl<'f> Reader<'f> {
    /// One of these files, which says to `count` how many bytes it has read.
    pub fn new(files: &'f [&'f SourceFile], count: &'f (dyn Fn(u64) + Sync)) -> Self {
        Self {
            files,
            count,
            halves: Vec::new(),
            masters: Vec::new(),
            rounded: Vec::new(),
        }
    }

    /// Fills `values` where there are runs of them; low bits of masters are whole numbers.
    pub fn read(&mut self, runs: &[Run], values: &mut [f32]) -> Result<(), FileError> {
        for Run { at, elems, codec } in runs {
            let values = &mut values[elems.clone()];
            if *codec == Codec::F32 {
                self.read_bytes(*at, bytemuck::cast_slice_mut(values))?;
                continue;
            }
            let mut halves = std::mem::take(&mut self.halves);
            halves.resize(values.len(), 0);
            self.read_bytes(*at, bytemuck::cast_slice_mut(&mut halves))?;
            match codec.float() {
                Some(of) => storage::unpack(of, &halves, values),
                None => {
                    let pairs = values.iter_mut().zip(&halves);
                    pairs.for_each(|(value, half)| *value = f32::from(*half));
                }
            }
            self.halves = halves;
        }
        Ok(())
    }

    /// Puts masters in place of the parameters of a window that have some, if these are what those round to. Else returns
    /// one that is not. `of` is what the parameters of a tensor are stored as.
    pub fn read_masters<'s>(
        &mut self,
        slices: &[Slice],
        saved: impl Fn(usize) -> &'s SavedTensor,
        of: impl Fn(usize) -> StorageType,
        params: &mut Vec<f32>,
    ) -> Result<Option<NotRounded>, FileError> {
        let runs = runs(slices, |tensor| {
            saved(tensor).masters.as_deref().unwrap_or_default()
        });
        if runs.is_empty() {
            return Ok(None);
        }
        let mut masters = std::mem::take(&mut self.masters);
        masters.clone_from(params);
        self.read(&runs, &mut masters)?;
        for (slice, elems) in Slice::in_window(slices) {
            if saved(slice.tensor).masters.is_none() {
                continue;
            }
            let of = of(slice.tensor);
            self.halves.resize(elems.len(), 0);
            self.rounded.resize(elems.len(), 0.0);
            storage::round(of, &masters[elems.clone()], None, &mut self.halves);
            storage::unpack(of, &self.halves, &mut self.rounded);
            let mut pairs = params[elems.clone()].iter().zip(&self.rounded);
            let other = |(actual, expected): (&f32, &f32)| actual.to_bits() != expected.to_bits();
            if let Some(index) = pairs.position(other) {
                let elem = slice.elems.start + index as u64;
                return Ok(Some(NotRounded {
                    tensor: slice.tensor,
                    elem,
                    actual: params[elems.start + index],
                    expected: self.rounded[index],
                }));
            }
        }
        std::mem::swap(params, &mut masters);
        self.masters = masters;
        Ok(None)
    }

    /// Fills the slots of a window with what is saved of them, or with what they start as.
    pub fn read_slots<'s>(
        &mut self,
        slices: &[Slice],
        saved: impl Fn(usize) -> &'s SavedTensor,
        slots: &[Slot],
        values: &mut Values,
    ) -> Result<(), FileError> {
        for (index, (slot, of_slot)) in slots.iter().zip(&mut values.slots).enumerate() {
            of_slot.clear();
            of_slot.resize(values.params.len(), slot.start.value());
            let runs = runs(slices, |tensor| parts_at(&saved(tensor).slots, index));
            self.read(&runs, of_slot)?;
        }
        Ok(())
    }

    /// Fills `bytes` from this place on.
    pub fn read_bytes(&self, at: At, bytes: &mut [u8]) -> Result<(), FileError> {
        self.files[at.file].read_exact_at(bytes, at.offset)?;
        (self.count)(bytes.len() as u64);
        Ok(())
    }
}

/// Writes for one thread.
pub struct Writer<'f> {
    /// The outputs, by the numbers of [`At::file`].
    outputs: &'f Outputs,
    /// Hears how many bytes have been written.
    count: &'f (dyn Fn(u64) + Sync),
    halves: Vec<u16>,
}

impl<'f> Writer<'f> {
    /// One of these files, which says to `count` how many bytes it has written.
    pub fn new(outputs: &'f Outputs, count: &'f (dyn Fn(u64) + Sync)) -> Self {
        Self {
            outputs,
            count,
            halves: Vec::new(),
        }
    }

    /// Writes `values` where there are runs of them. Those of 16 bits are rounded to the nearest, which leaves values as they
    /// are that have been rounded otherwise.
    pub fn write(&mut self, runs: &[Run], values: &[f32]) -> Result<(), FileError> {
        for Run { at, elems, codec } in runs {
            let values = &values[elems.clone()];
            match codec.float() {
                Some(StorageType::F32) => self.write_bytes(*at, bytemuck::cast_slice(values))?,
                Some(of) => {
                    self.halves.resize(values.len(), 0);
                    storage::round(of, values, None, &mut self.halves);
                    self.write_bytes(*at, bytemuck::cast_slice(&self.halves))?;
                }
                None => {
                    let values = SectionValues::new(*codec, values);
                    self.write_bytes(*at, values.bytes())?;
                }
            }
        }
        Ok(())
    }

    /// Writes the state of a window; `out` is where the slots of a tensor go and, behind them, its masters.
    pub fn write_state<'p>(
        &mut self,
        slices: &[Slice],
        out: impl Fn(usize) -> &'p [Part],
        values: &Values,
    ) -> Result<(), FileError> {
        let arrays = values.slots.iter().chain([&values.params]);
        for (index, values) in arrays.enumerate() {
            let runs = runs(slices, |tensor| {
                out(tensor).get(index).map_or(&[], from_ref)
            });
            self.write(&runs, values)?;
        }
        Ok(())
    }

    /// Writes `bytes` from this place on.
    pub fn write_bytes(&self, at: At, bytes: &[u8]) -> Result<(), FileError> {
        self.outputs.get(at.file).write_all_at(bytes, at.offset)?;
        (self.count)(bytes.len() as u64);
        Ok(())
    }
}
