//! A model in one safetensors file or, by an index, in several.

use std::collections::{BTreeMap, HashMap};
use std::io::BufReader;
use std::path::{Path, PathBuf};

use wgpu_optim::StorageType;
use wgpu_optim::files::{Dtype, Header, HeaderError, Index, TensorEntry};

use crate::at::At;
use crate::error::FileError;
use crate::source::{SourceFile, read_whole};

/// The tensors of one or several files, of which only the headers have been read.
#[derive(Debug)]
pub struct Model {
    /// The model's files, in the order of their names.
    shards: Vec<Shard>,
    /// Shard and position in its header, by tensor.
    places: HashMap<String, (usize, usize)>,
    index: Option<IndexFile>,
}

/// The index of a model as it was read.
#[derive(Debug)]
pub struct IndexFile {
    /// The path of the index.
    pub path: PathBuf,
    /// The content of the index.
    pub json: Vec<u8>,
    /// The metadata, without tensors and their files.
    pub metadata: Vec<(String, String)>,
}

/// One of the files.
#[derive(Debug)]
pub struct Shard {
    /// The file.
    pub source: SourceFile,
    /// The header that the file starts with.
    pub header: Header,
}

/// A tensor and where it lies.
#[derive(Clone, Copy, Debug)]
pub struct Place<'m> {
    /// The number of the file among the model's.
    pub shard: usize,
    /// The tensor's name, dtype and shape.
    pub entry: &'m TensorEntry,
    /// First byte of the tensor in the shard's file.
    pub offset: u64,
}

impl Place<'_> {
    /// The place of the first byte, where the files of its model are numbered from `first` on.
    pub fn at(&self, first: usize) -> At {
        At {
            file: first + self.shard,
            offset: self.offset,
        }
    }

    /// The number of the tensor's bytes.
    pub fn bytes(&self) -> u64 {
        self.entry.data_bytes.end - self.entry.data_bytes.start
    }
}

/// Tensors of a model that can be stepped.
#[derive(Debug, Default)]
pub struct Steppable {
    /// Names and shapes in alphabetical order, by what their values are stored as.
    pub by_type: BTreeMap<StorageType, Vec<(String, Vec<usize>)>>,
    /// The number of tensors of other dtypes.
    pub left_out: usize,
}

/// Storage type of tensors that can be stepped; `None` for other dtypes.
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
    ///
    /// # Errors
    /// [`FileError`] if one of them cannot be read, or is not what it has to be.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        Self::with_files(path, |_| ())
    }

    /// Opens a model of more files than a process may have open: every read opens its file anew.
    pub fn open_one_by_one(path: &Path) -> Result<Self, FileError> {
        Self::with_files(path, SourceFile::close)
    }

    fn with_files(path: &Path, opened: fn(&mut SourceFile)) -> Result<Self, FileError> {
        if !is_index(path) {
            let shard = Shard::open(path, opened)?;
            let tensors = shard.header.tensors().iter().enumerate();
            return Ok(Self {
                places: tensors
                    .map(|(position, tensor)| (tensor.name.clone(), (0, position)))
                    .collect(),
                shards: vec![shard],
                index: None,
            });
        }
        let (index, json) = read_index(path)?;
        let open = |name: &String| {
            let shard = Shard::open(&path.with_file_name(name), opened);
            shard.map_err(|source| FileError::OfIndex {
                path: path.to_owned(),
                source: Box::new(source),
            })
        };
        let shards: Vec<_> = index.shards().iter().map(open).collect::<Result<_, _>>()?;
        let positions = shards.iter().map(|shard| {
            let tensors = shard.header.tensors().iter().enumerate();
            let positions = tensors.map(|(position, tensor)| (tensor.name.as_str(), position));
            positions.collect::<HashMap<_, _>>()
        });
        let positions: Vec<_> = positions.collect();
        let place_of = |(tensor, name): &(String, String)| {
            let place = index.shards().binary_search(name).ok().and_then(|shard| {
                let position = positions[shard].get(tensor.as_str())?;
                Some((shard, *position))
            });
            let place = place.ok_or_else(|| FileError::NotThere {
                path: path.to_owned(),
                tensor: tensor.clone(),
                file: name.clone(),
            })?;
            Ok((tensor.clone(), place))
        };
        let places = index.tensors().iter().map(place_of);
        let places = places.collect::<Result<_, FileError>>()?;
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

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        let shard = self.shards.first().map(|shard| shard.source.path());
        match &self.index {
            Some(index) => &index.path,
            None => shard.unwrap_or(Path::new("")),
        }
    }

    /// The files to read from.
    pub fn sources(&self) -> Vec<&SourceFile> {
        self.shards.iter().map(|shard| &shard.source).collect()
    }

    /// The index, if the model lies in several files.
    pub fn index(&self) -> Option<&IndexFile> {
        self.index.as_ref()
    }

    /// The values that the index and the files have under a key of their metadata.
    pub fn metadata<'m>(&'m self, key: &'m str) -> impl Iterator<Item = &'m str> {
        let of_index = self.index.iter().flat_map(|index| &index.metadata);
        let shards = self.shards.iter();
        let of_shards = shards.flat_map(|shard| &shard.header.metadata);
        let entries = of_index.chain(of_shards).filter(move |(own, _)| own == key);
        entries.map(|(_, value)| value.as_str())
    }

    /// The number of tensors.
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

    /// Lays out files at `target` as those of the model are, with the same tensors at places of their own, and its index
    /// behind them; `edit` changes the metadata of each. `role` is how messages call the target.
    ///
    /// # Errors
    /// [`FileError::TooLarge`] if a header would be.
    pub fn laid_out_at(
        &self,
        target: &Path,
        role: &str,
        mut edit: impl FnMut(&mut Vec<(String, String)>),
    ) -> Result<Layout, FileError> {
        let mut layout = Layout::default();
        for Shard { source, header } in &self.shards {
            let mut header = header.clone();
            edit(&mut header.metadata);
            let name = source.path().file_name().filter(|_| self.index.is_some());
            let file = match name.map(|name| name.to_string_lossy()) {
                Some(name) => NewFile::beside(target, &name, role, &header)?,
                None => NewFile::new(target, role, &header)?,
            };
            layout.data_starts.push(file.start.len() as u64);
            layout.files.push(file);
        }
        layout.files.extend(self.index.iter().map(|index| NewFile {
            role: role.to_owned(),
            path: target.to_owned(),
            start: index.json.clone(),
        }));
        Ok(layout)
    }

    /// Makes sure that what has been read is one version of every file.
    pub fn check_unchanged(&self) -> Result<(), FileError> {
        self.shards
            .iter()
            .try_for_each(|shard| shard.source.check_unchanged())
    }
}

impl Shard {
    fn open(path: &Path, opened: fn(&mut SourceFile)) -> Result<Self, FileError> {
        let mut source = SourceFile::open(path)?;
        let bytes = source.bytes();
        let header = source.with(|file| Ok(Header::read(&mut BufReader::new(file), bytes)))?;
        let header = header.map_err(FileError::content(path))?;
        opened(&mut source);
        Ok(Self { source, header })
    }
}

/// Files that are to be written with the tensors of a model.
#[derive(Clone, Debug, Default)]
pub struct Layout {
    /// One for each file of the model, and the index behind them if it has one.
    pub files: Vec<NewFile>,
    data_starts: Vec<u64>,
}

impl Layout {
    /// The first byte of a tensor that has this place in the model.
    pub fn at(&self, place: Place<'_>) -> At {
        At {
            file: place.shard,
            offset: self.data_starts[place.shard] + place.entry.data_bytes.start,
        }
    }
}

/// A file that is to be written.
#[derive(Clone, Debug)]
pub struct NewFile {
    /// The name of the file in messages.
    pub role: String,
    /// The path that the file is going to have.
    pub path: PathBuf,
    /// The bytes that it starts with: a header, or all of an index.
    pub start: Vec<u8>,
}

impl NewFile {
    /// A safetensors file.
    ///
    /// # Errors
    /// [`FileError::TooLarge`] if its header is.
    pub fn new(path: &Path, role: &str, header: &Header) -> Result<Self, FileError> {
        let start = header.to_bytes().map_err(|error| match error {
            HeaderError::TooLarge {
                header_bytes,
                max_header_bytes,
            } => FileError::TooLarge {
                role: role.to_owned(),
                header_bytes,
                max_header_bytes,
            },
            error => FileError::content(path)(error),
        })?;
        Ok(Self {
            role: role.to_owned(),
            path: path.to_owned(),
            start,
        })
    }

    /// A safetensors file of this name beside the index of all of a model's.
    ///
    /// # Errors
    /// [`FileError::TooLarge`] if its header is.
    pub fn beside(
        index: &Path,
        name: &str,
        role: &str,
        header: &Header,
    ) -> Result<Self, FileError> {
        Self::new(
            &index.with_file_name(name),
            &format!("{role} ({name})"),
            header,
        )
    }
}

/// Whether a path is that of an index, by its name.
pub fn is_index(path: &Path) -> bool {
    path.extension()
        .is_some_and(|extension| extension.eq_ignore_ascii_case("json"))
}

/// Reads an index; returns its text, too.
///
/// # Errors
/// [`FileError`] if it cannot be read, or is none.
pub fn read_index(path: &Path) -> Result<(Index, Vec<u8>), FileError> {
    let json = read_whole(path)?;
    let index = Index::parse(&json).map_err(FileError::content(path))?;
    Ok((index, json))
}
