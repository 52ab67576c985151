//! The state between two steps of a model: a safetensors file with one F32 velocity per updated tensor, and
//! metadata with the format version, the form and the number of applied steps per tensor.

use std::collections::BTreeMap;

use anyhow::{Context as _, Result, anyhow, ensure};
use safetensors::tensor::SafeTensors;
use wgpu_optim::MomentumForm;

use crate::files::Metadata;

const FORMAT_VERSION: &str = "1";

/// The metadata of a state file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StateHeader {
    /// The form that made the velocities.
    pub form: MomentumForm,
    /// Applied steps by tensor name; a tensor that has never been updated is not in it.
    pub applied_steps: BTreeMap<String, u64>,
}

impl StateHeader {
    pub fn new(form: MomentumForm) -> Self {
        Self {
            form,
            applied_steps: BTreeMap::new(),
        }
    }

    /// Reads the metadata of a state file and checks that every velocity has its count.
    pub fn parse(metadata: &Metadata, tensors: &SafeTensors<'_>) -> Result<Self> {
        let entry = |key: &str| {
            metadata
                .get(key)
                .ok_or_else(|| anyhow!("not a state file: its metadata has no {key}"))
        };
        let version = entry("format_version")?;
        ensure!(
            version == FORMAT_VERSION,
            "state format version is {version}, expected {FORMAT_VERSION}"
        );
        let header = Self {
            form: entry("form")?.parse()?,
            applied_steps: serde_json::from_str(entry("applied_steps")?)
                .context("not a state file: applied_steps is not a map of counts")?,
        };
        for name in tensors.names() {
            ensure!(
                header.applied_steps.contains_key(name),
                "not a state file: tensor {name:?} has no applied step count"
            );
        }
        Ok(header)
    }

    pub fn to_metadata(&self) -> Result<Metadata> {
        Ok(Metadata::from([
            ("format_version".to_owned(), FORMAT_VERSION.to_owned()),
            ("form".to_owned(), self.form.to_string()),
            (
                "applied_steps".to_owned(),
                serde_json::to_string(&self.applied_steps)?,
            ),
        ]))
    }
}
