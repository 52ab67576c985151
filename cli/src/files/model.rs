//! A model in one safetensors file or, by an index, in several.

use std::collections::{BTreeMap, HashMap};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use wgpu_optim::StorageType;
use wgpu_optim::files::{Dtype, Header, Index, TensorEntry};

use super::source::{SourceFile, read_whole};

/// The tensors of one or several files, of which only the headers have been read.
#[derive(Debug)]
pub struct Model {
    /// In the order of their names.
    shards: Vec<Shard>,
    /// Shard and position in its header, by tensor.
    places: HashMap<String, (usize, usize)>,
    index: Option<IndexFile>,
}

/// The index of a model as it was read.
#[derive(Debug)]
pub struct IndexFile {
    pub path: PathBuf,
    pub json: Vec<u8>,
    pub metadata: Vec<(String, String)>,
}

/// One of the files.
#[derive(Debug)]
pub struct Shard {
    /// The file.
    pub source: SourceFile,
    /// What it starts with.
    pub header: Header,
}

/// A tensor and where it lies.
#[derive(Clone, Copy, Debug)]
pub struct Place<'m> {
    /// Which of the model's files it is in.
    pub shard: usize,
    /// Its name, dtype and shape.
    pub entry: &'m TensorEntry,
    /// First byte of the tensor in the shard's file.
    pub offset: u64,
}

/// Tensors of a model that can be stepped.
#[derive(Debug, Default)]
pub struct Steppable {
    /// Names and shapes in alphabetical order, by what their values are stored as.
    pub by_type: BTreeMap<StorageType, Vec<(String, Vec<usize>)>>,
    /// How many tensors are of other dtypes.
    pub left_out: usize,
}

/// What a tensor that can be stepped is stored as.
pub fn storage_type(dtype: Dtype) -> Option<StorageType> {
    match dtype {
        Dtype::F32 => Some(StorageType::F32),
        Dtype::BF16 => Some(StorageType::Bf16),
        Dtype::F16 => Some(StorageType::F16),
        _ => None,
    }
}

impl Model {
    /// Opens a safetensors file, or all the files of an index (a path that ends in `.json`).
    pub fn open(path: &Path) -> Result<Self> {
        if is_index(path) {
            return Self::open_index(path);
        }
        let shard = Shard::open(path)?;
        let tensors = shard.header.tensors().iter().enumerate();
        Ok(Self {
            places: tensors
                .map(|(position, tensor)| (tensor.name.clone(), (0, position)))
                .collect(),
            shards: vec![shard],
            index: None,
        })
    }

    fn open_index(path: &Path) -> Result<Self> {
        let json = read_whole(path)?;
        let index = Index::parse(&json).with_context(|| path.display().to_string())?;
        let open = |name: &String| {
            let shard = Shard::open(&path.with_file_name(name));
            shard.with_context(|| format!("index {}", path.display()))
        };
        let shards: Vec<_> = index.shards().iter().map(open).collect::<Result<_>>()?;
        let positions: Vec<HashMap<_, _>> = shards
            .iter()
            .map(|shard| {
                let tensors = shard.header.tensors().iter().enumerate();
                tensors
                    .map(|(position, tensor)| (tensor.name.as_str(), position))
                    .collect()
            })
            .collect();
        let mut places = HashMap::with_capacity(index.tensors().len());
        for (tensor, name) in index.tensors() {
            let place = index.shards().binary_search(name).ok().and_then(|shard| {
                let position = positions[shard].get(tensor.as_str())?;
                Some((shard, *position))
            });
            let place = place.with_context(|| {
                format!(
                    "index {}: tensor {tensor:?} is not in {name}, where the index says it is",
                    path.display()
                )
            })?;
            places.insert(tensor.clone(), place);
        }
        Ok(Self {
            shards,
            places,
            index: Some(IndexFile {
                path: path.to_owned(),
                json,
                metadata: index.metadata,
            }),
        })
    }

    /// The files.
    pub fn shards(&self) -> &[Shard] {
        &self.shards
    }

    /// The index, if the model lies in several files.
    pub fn index(&self) -> Option<&IndexFile> {
        self.index.as_ref()
    }

    /// How many tensors there are.
    pub fn len(&self) -> usize {
        self.places.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.places.is_empty()
    }

    /// A tensor by its name.
    pub fn get(&self, tensor: &str) -> Option<Place<'_>> {
        let (shard, position) = *self.places.get(tensor)?;
        Some(self.place(shard, &self.shards[shard].header.tensors()[position]))
    }

    fn place<'m>(&'m self, shard: usize, entry: &'m TensorEntry) -> Place<'m> {
        Place {
            shard,
            entry,
            offset: self.shards[shard].header.data_start() + entry.data_bytes.start,
        }
    }

    /// The tensors in the order in which they lie, file by file; not those that an index does not name.
    pub fn in_place_order(&self) -> impl Iterator<Item = Place<'_>> {
        self.in_files()
            .filter_map(|(place, named)| named.then_some(place))
    }

    /// All tensors of the files, and whether they belong to the model: an index may leave some out.
    pub fn in_files(&self) -> impl Iterator<Item = (Place<'_>, bool)> {
        let shards = self.shards.iter().enumerate();
        shards.flat_map(move |(shard, file)| {
            file.header.in_place_order().map(move |entry| {
                let place = self.place(shard, entry);
                let named = self
                    .get(&entry.name)
                    .is_some_and(|named| named.shard == shard);
                (place, named)
            })
        })
    }

    /// The tensors that can be stepped.
    pub fn steppable(&self) -> Steppable {
        let mut steppable = Steppable::default();
        for Place { entry, .. } in self.in_place_order() {
            match storage_type(entry.dtype) {
                Some(of) => {
                    let of_type = steppable.by_type.entry(of).or_default();
                    of_type.push((entry.name.clone(), entry.shape.clone()));
                }
                None => steppable.left_out += 1,
            }
        }
        steppable.by_type.values_mut().for_each(|of| of.sort());
        steppable
    }

    /// Makes sure that what has been read is one version of every file.
    pub fn check_unchanged(&self) -> Result<()> {
        self.shards
            .iter()
            .try_for_each(|shard| shard.source.check_unchanged())
    }
}

impl Shard {
    fn open(path: &Path) -> Result<Self> {
        let source = SourceFile::open(path)?;
        let header = Header::read(&mut BufReader::new(source.reader()), source.bytes())
            .with_context(|| path.display().to_string())?;
        Ok(Self { source, header })
    }
}

/// Whether a path is that of an index, by its name.
pub fn is_index(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("json"))
}
