//! A checksum of the parameters that a state goes with, in its file: momentum of another model or run with the same names
//! and shapes would be taken without a word. Parameters may well be changed between two steps, so it is a note, not an
//! error.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use wgpu_optim::files::Header;
use wgpu_optim_files::{At, FileError, Outputs, Place};

use super::inputs::Inputs;

/// The metadata of a state file: JSON, by tensor the CRC-32 of what its parameters start with, in hexadecimal.
const KEY: &str = "params_crc32";

/// Bytes of a tensor that are looked at: another model or step shows in a few elements of any tensor.
const BYTES: usize = 4096;

/// Checksums of parameters, by the tensor's name.
pub type Fingerprints = BTreeMap<String, String>;

/// The fingerprints in a state file; none where it has none.
pub fn in_file(header: &Header) -> Result<Fingerprints> {
    let entry = header.metadata.iter().find(|(key, _)| key == KEY);
    entry.map_or(Ok(Fingerprints::new()), |(_, json)| {
        serde_json::from_str(json).with_context(|| format!("metadata {KEY}"))
    })
}

/// A header with what its tensors' parameters are; none for tensors without state. It is as long whatever they are.
pub fn put(header: &mut Header, fingerprints: &Fingerprints) -> Result<()> {
    header.metadata.retain(|(key, _)| key != KEY);
    if !fingerprints.is_empty() {
        let json = serde_json::to_string(fingerprints)?;
        header.metadata.push((KEY.to_owned(), json));
    }
    Ok(())
}

/// The fingerprint that stands for parameters until they have been written.
pub fn unknown() -> String {
    to_text(0)
}

/// The fingerprint of parameters that have been read.
pub fn of_input(inputs: &Inputs, place: Place<'_>) -> Result<String> {
    let source = &inputs.params.shards()[place.shard].source;
    of(place, |bytes| source.read_exact_at(bytes, place.offset))
}

/// The fingerprint of parameters that have been written at `at`.
pub fn of_output(outputs: &Outputs, place: Place<'_>, at: At) -> Result<String> {
    let output = outputs.get(at.file);
    of(place, |bytes| output.read_exact_at(bytes, at.offset))
}

fn of(place: Place<'_>, read: impl FnOnce(&mut [u8]) -> Result<(), FileError>) -> Result<String> {
    let mut bytes = vec![0; BYTES.min(place.bytes() as usize)];
    read(&mut bytes)?;
    Ok(to_text(crc32fast::hash(&bytes)))
}

fn to_text(crc: u32) -> String {
    format!("{crc:08x}")
}
