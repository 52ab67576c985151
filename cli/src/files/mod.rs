//! Files: models and states read by place, and outputs that replace their targets together or not at all.

mod access;
mod at;
mod identity;
mod model;
mod output;
mod source;

use anyhow::Result;
use serde::Serialize;

pub use model::{Model, Place, Shard, Steppable, is_index, storage_type};
pub use output::{Finished, Output, Outputs};
pub use source::{SourceFile, read_whole};

/// A table with one line per row, headed by the names of the fields.
pub fn csv(rows: impl Iterator<Item = impl Serialize>) -> Result<Vec<u8>> {
    let mut table = csv::Writer::from_writer(Vec::new());
    for row in rows {
        table.serialize(row)?;
    }
    Ok(table.into_inner().map_err(|error| error.into_error())?)
}
