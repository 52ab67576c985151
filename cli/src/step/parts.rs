//! Slots in parts: the ranks of `wgpu-optim-mpi` leave each its elements, in a tensor `TENSOR.SLOT[START:END]` of one
//! dimension. Here they are read as if they lay in one file.

use std::ops::Range;

use anyhow::{Context as _, Result, bail};
use wgpu_optim::files::Header;

use super::plan::At;
use crate::files::SourceFile;
use crate::window::ELEM_BYTES;

/// The elements of a slot that a tensor of a file has.
#[derive(Clone, Debug)]
pub struct Part {
    pub elems: Range<u64>,
    /// The first of them.
    pub at: At,
}

/// A slot in parts, in order: every element once.
#[derive(Debug)]
pub struct InParts(Vec<Part>);

/// A source of values: a file, or a slot in parts that counts as one.
#[derive(Clone, Copy, Debug)]
pub enum Source<'i> {
    File(&'i SourceFile),
    InParts(&'i InParts),
}

impl InParts {
    /// Joins the parts of a slot of so many elements.
    pub fn new(mut parts: Vec<Part>, numel: u64) -> Result<Self> {
        parts.retain(|part| !part.elems.is_empty());
        parts.sort_by_key(|part| part.elems.start);
        let mut end = 0;
        for Part { elems, .. } in &parts {
            match elems.start {
                start if start > end => bail!("no file has its elements {end} to {start}"),
                start if start < end => bail!("two files have its element {start}"),
                _ => end = elems.end,
            }
        }
        match end == numel {
            true => Ok(Self(parts)),
            false => bail!("its parts end at element {end}, expected {numel}"),
        }
    }

    /// Fills `buffer` from byte `offset` on; parts lie in `files`.
    pub fn read_exact_at(
        &self,
        files: &[Source<'_>],
        mut buffer: &mut [u8],
        mut offset: u64,
    ) -> Result<()> {
        let first = self
            .0
            .partition_point(|part| part.elems.end * ELEM_BYTES <= offset);
        for Part { elems, at } in &self.0[first..] {
            if buffer.is_empty() {
                break;
            }
            let end = elems.end * ELEM_BYTES;
            let len = ((end - offset) as usize).min(buffer.len());
            let (own, others) = buffer.split_at_mut(len);
            let at = at.plus(offset - elems.start * ELEM_BYTES);
            if let Source::File(file) = files[at.file] {
                file.read_exact_at(own, at.offset)?;
            }
            (buffer, offset) = (others, end);
        }
        Ok(())
    }
}

/// A slot's name in a file without the elements that it has there, and these.
pub fn split(slot: &str) -> (&str, Option<Range<u64>>) {
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

/// The header of a file of a state as if it had all of every slot, for what it says of the state.
pub fn as_whole(header: &Header) -> Result<Header> {
    let tensors = header.tensors().iter();
    let whole = tensors.map(|entry| {
        // Of the first format a tensor's own name is the last there is.
        let (name, _) = match entry.name.contains('.') {
            true => split(&entry.name),
            false => (&*entry.name, None),
        };
        (name.to_owned(), entry.dtype, entry.shape.clone())
    });
    Header::new(header.metadata.clone(), whole).context("a slot is in it twice")
}
