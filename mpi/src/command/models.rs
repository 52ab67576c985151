//! The models of a round: what is read, and what becomes of it.

use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use wgpu_optim::StorageType;
use wgpu_optim::files::is_content_hash;
use wgpu_optim_cli::files::{Model, Outputs, is_index, storage_type};

/// The metadata of a global model that say how many rounds have made it.
const OUTER_STEPS: &str = "wgpu_optim.outer_steps";

/// Bytes that are copied at a time.
const COPY_BYTES: u64 = 1 << 22;

/// A byte of one of the files that are read, or of one of those that are written.
#[derive(Clone, Copy, Debug)]
pub struct At {
    pub file: usize,
    pub offset: u64,
}

impl At {
    /// The place of an element.
    pub fn elem(self, elem: u64, of: StorageType) -> Self {
        Self {
            offset: self.offset + elem * of.bytes(),
            ..self
        }
    }
}

/// A tensor that both models have.
#[derive(Clone, Debug)]
pub struct Tensor {
    pub name: String,
    pub shape: Vec<usize>,
    pub numel: u64,
    pub of: StorageType,
    pub local: At,
    pub global: At,
    pub out: At,
}

/// The models of a rank, opened, and the new global one, staged.
pub struct Models {
    pub local: Model,
    pub global: Model,
    /// In alphabetical order.
    pub tensors: Vec<Tensor>,
    /// How many others there are, which are copied.
    pub copied: usize,
}

impl Models {
    pub fn open(local: &Path, global: &Path) -> Result<Self> {
        let (local, global) = (Model::open(local)?, Model::open(global)?);
        let mut tensors = Vec::new();
        for place in global.in_place_order() {
            let name = &place.entry.name;
            let Some(of) = storage_type(place.entry.dtype) else {
                continue;
            };
            let own = local
                .get(name)
                .with_context(|| format!("tensor {name:?} is not in the local model"))?;
            ensure!(
                own.entry.dtype == place.entry.dtype && own.entry.shape == place.entry.shape,
                "tensor {name:?}: the local model has {} of {:?}, the global one {} of {:?}",
                own.entry.dtype,
                own.entry.shape,
                place.entry.dtype,
                place.entry.shape
            );
            let at = |file, offset| At { file, offset };
            tensors.push(Tensor {
                name: name.clone(),
                shape: place.entry.shape.clone(),
                numel: place.entry.numel(),
                of,
                local: at(own.shard, own.offset),
                global: at(place.shard, place.offset),
                out: at(place.shard, place.offset),
            });
        }
        for place in local.in_place_order() {
            let name = &place.entry.name;
            if global.get(name).is_none() {
                bail!("tensor {name:?} is not in the global model");
            }
        }
        tensors.sort_by(|left, right| left.name.cmp(&right.name));
        Ok(Self {
            copied: global.len() - tensors.len(),
            local,
            global,
            tensors,
        })
    }

    /// How many rounds have made the global model, if it says so.
    pub fn outer_steps(&self) -> Result<Option<u64>> {
        let shards = self.global.shards().iter();
        let metadata = shards.flat_map(|shard| &shard.header.metadata);
        let steps = metadata.filter(|(key, _)| key == OUTER_STEPS);
        let mut steps = steps.map(|(_, value)| value);
        let Some(first) = steps.next() else {
            return Ok(None);
        };
        ensure!(
            steps.all(|other| other == first),
            "the files of the global model are not of one round"
        );
        let steps = first.parse();
        Ok(Some(steps.with_context(|| {
            format!("the global model's {OUTER_STEPS} is {first:?}, expected a number")
        })?))
    }

    /// Makes the files of the new global model beside their targets, with all that the round does not change. Returns the
    /// bytes that were copied.
    pub fn stage(&mut self, outputs: &mut Outputs, target: &Path, outer_steps: u64) -> Result<u64> {
        let index = self.global.index();
        ensure!(
            index.is_some() == is_index(target),
            "--out-global has to be what --global is, a single file or an index, got {}",
            target.display()
        );
        let mut data_starts = Vec::new();
        for shard in self.global.shards() {
            let mut header = shard.header.clone();
            header
                .metadata
                .retain(|(key, _)| !is_content_hash(key) && key != OUTER_STEPS);
            let steps = outer_steps.to_string();
            header.metadata.push((OUTER_STEPS.to_owned(), steps));
            let start = header.to_bytes()?;
            let path = match (index, shard.source.path().file_name()) {
                (Some(_), Some(name)) => target.with_file_name(name),
                _ => target.to_owned(),
            };
            let role = format!("--out-global ({})", path.display());
            let file = outputs.stage(role, &path)?;
            outputs.get(file).write_all_at(&start, 0)?;
            data_starts.push((file, start.len() as u64));
        }
        if let Some(index) = index {
            let file = outputs.stage("--out-global", target)?;
            outputs.get(file).write_all_at(&index.json, 0)?;
        }
        for tensor in &mut self.tensors {
            let (file, data_start) = data_starts[tensor.global.file];
            let shard = &self.global.shards()[tensor.global.file];
            tensor.out = At {
                file,
                offset: tensor.global.offset - shard.header.data_start() + data_start,
            };
        }
        let mut copied = 0;
        let mut bytes = Vec::new();
        for (place, named) in self.global.in_files() {
            if named && storage_type(place.entry.dtype).is_some() {
                continue;
            }
            let shard = &self.global.shards()[place.shard];
            let (file, data_start) = data_starts[place.shard];
            let end = place.entry.data_bytes.end - place.entry.data_bytes.start;
            for start in (0..end).step_by(COPY_BYTES as usize) {
                bytes.resize(COPY_BYTES.min(end - start) as usize, 0);
                shard
                    .source
                    .read_exact_at(&mut bytes, place.offset + start)?;
                let to = data_start + place.entry.data_bytes.start + start;
                outputs.get(file).write_all_at(&bytes, to)?;
            }
            copied += end;
        }
        Ok(copied)
    }

    /// Makes sure that what has been read is one version of every file.
    pub fn check_unchanged(&self) -> Result<()> {
        self.local.check_unchanged()?;
        self.global.check_unchanged()
    }
}
