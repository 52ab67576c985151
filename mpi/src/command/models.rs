//! The models of a round: what is read, and what becomes of it.

use std::path::Path;

use anyhow::{Result, ensure};
use wgpu_optim::StorageType;
use wgpu_optim_files::{Model, Outputs, Part, is_index, round, storage_type};

/// Bytes that are copied at a time.
const COPY_BYTES: u64 = 1 << 22;

/// A tensor that both models have.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub numel: u64,
    pub of: StorageType,
    pub local: Part,
    pub global: Part,
    pub out: Part,
}

/// The models of a rank, opened, and the new global one, staged.
pub struct Models {
    pub local: Model,
    pub global: Model,
    /// In alphabetical order.
    pub tensors: Vec<Tensor>,
    /// The number of other tensors, which are copied.
    pub copied: usize,
}

impl Models {
    pub fn open(local: &Path, global: &Path) -> Result<Self> {
        let (local, global) = (Model::open(local)?, Model::open(global)?);
        let mut tensors = Vec::new();
        for (place, own) in round::tensors_of(&global, &local)? {
            let Some(of) = storage_type(place.entry.dtype) else {
                continue;
            };
            let numel = place.entry.numel();
            let whole = |at| Part::whole(numel, at, of);
            tensors.push(Tensor {
                name: place.entry.name.clone(),
                shape: place.entry.shape.clone(),
                numel,
                of,
                local: whole(own.at(0)),
                global: whole(place.at(0)),
                out: whole(place.at(0)),
            });
        }
        tensors.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(Self {
            copied: global.len() - tensors.len(),
            local,
            global,
            tensors,
        })
    }

    /// Makes the files of the new global model beside their targets, with all that the round does not change. Returns the
    /// bytes that were copied.
    pub fn stage(&mut self, outputs: &mut Outputs, target: &Path, outer_steps: u64) -> Result<u64> {
        ensure!(
            self.global.index().is_some() == is_index(target),
            "--out-global has to be what --global is, a single file or an index, got {}",
            target.display()
        );
        let layout = self
            .global
            .laid_out_at(target, "--out-global", |metadata| {
                round::set_outer_steps(metadata, outer_steps);
            })?;
        for file in &layout.files {
            outputs.stage_new(file)?;
        }
        let (mut copied, mut bytes) = (0, Vec::new());
        for (place, named) in self.global.in_files() {
            let at = layout.at(place);
            if named && storage_type(place.entry.dtype).is_some() {
                let tensors = &mut self.tensors;
                let found = tensors.binary_search_by(|tensor| tensor.name.cmp(&place.entry.name));
                if let Ok(index) = found {
                    tensors[index].out.at = at;
                }
                continue;
            }
            let (source, end) = (&self.global.shards()[place.shard].source, place.bytes());
            for start in (0..end).step_by(COPY_BYTES as usize) {
                bytes.resize(COPY_BYTES.min(end - start) as usize, 0);
                source.read_exact_at(&mut bytes, place.offset + start)?;
                let to = at.plus(start);
                outputs.get(to.file).write_all_at(&bytes, to.offset)?;
            }
            copied += end;
        }
        Ok(copied)
    }

    /// Makes sure that what has been read is one version of every file.
    pub fn check_unchanged(&self) -> Result<()> {
        self.local.check_unchanged()?;
        Ok(self.global.check_unchanged()?)
    }
}
