//! Values read by place, whatever their type.

use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use wgpu_optim::{StorageType, storage};

use super::parts::Source;
use super::plan::{At, Segment};
use crate::Failure;
use crate::progress::Progress;

/// Reads for one thread.
pub struct Reader<'r> {
    /// In the order in which [`At::file`] counts them.
    files: &'r [Source<'r>],
    progress: &'r Progress,
    /// Of all threads.
    bytes_read: &'r AtomicU64,
    /// What the progress is called.
    what: &'static str,
    /// What was read last of values of 16 bits; room for others on their way to a file.
    pub halves: Vec<u16>,
}

impl<'r> Reader<'r> {
    pub fn new(
        files: &'r [Source<'r>],
        progress: &'r Progress,
        bytes_read: &'r AtomicU64,
        what: &'static str,
    ) -> Self {
        Self {
            files,
            progress,
            bytes_read,
            what,
            halves: Vec::new(),
        }
    }

    /// Fills `values` where there are runs of them.
    pub fn read(&mut self, runs: Vec<Run>, values: &mut [f32]) -> Result<(), Failure> {
        for Run { at, elems, of } in runs {
            let values = &mut values[elems];
            match of {
                StorageType::F32 => self.read_bytes(at, bytemuck::cast_slice_mut(values))?,
                StorageType::Bf16 | StorageType::F16 => {
                    self.read_halves(at, values.len())?;
                    storage::unpack(of, &self.halves, values);
                }
            }
        }
        Ok(())
    }

    pub fn read_halves(&mut self, at: At, numel: usize) -> Result<(), Failure> {
        let mut halves = std::mem::take(&mut self.halves);
        halves.resize(numel, 0);
        self.read_bytes(at, bytemuck::cast_slice_mut(&mut halves))?;
        self.halves = halves;
        Ok(())
    }

    pub fn read_bytes(&self, at: At, bytes: &mut [u8]) -> Result<(), Failure> {
        match self.files[at.file] {
            Source::File(file) => file.read_exact_at(bytes, at.offset)?,
            Source::InParts(slot) => slot.read_exact_at(self.files, bytes, at.offset)?,
        }
        let read = bytes.len() as u64;
        self.bytes_read.fetch_add(read, Ordering::Relaxed);
        self.progress.advance(self.what, read);
        Ok(())
    }
}

/// Each segment of a window, and which of the window's elements it is.
pub fn in_window(segments: &[Segment]) -> impl Iterator<Item = (&Segment, Range<usize>)> {
    let mut end = 0;
    segments.iter().map(move |segment| {
        let start = end;
        end += (segment.elems.end - segment.elems.start) as usize;
        (segment, start..end)
    })
}

/// Elements of a window that lie side by side in a file, too.
#[derive(Debug, PartialEq, Eq)]
pub struct Run {
    pub at: At,
    pub elems: Range<usize>,
    pub of: StorageType,
}

/// Where the segments of a window lie in files, as few runs as they make; those without a place are left out.
pub fn runs(
    segments: &[Segment],
    place: impl Fn(&Segment) -> Option<(At, StorageType)>,
) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (segment, elems) in in_window(segments) {
        let Some((at, of)) = place(segment) else {
            continue;
        };
        let at = at.plus(segment.elems.start * of.bytes());
        match runs.last_mut() {
            Some(last)
                if last.of == of
                    && last.elems.end == elems.start
                    && last.at.plus(last.elems.len() as u64 * of.bytes()) == at =>
            {
                last.elems.end = elems.end;
            }
            _ => runs.push(Run { at, elems, of }),
        }
    }
    runs
}
