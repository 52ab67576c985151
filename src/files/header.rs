//! The header of a safetensors file: names, dtypes, shapes, places, and metadata in their order.

use std::io::Read;
use std::iter;
use std::ops::Range;

use safetensors::tensor::{Dtype, TensorInfo};
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde::ser::{Serialize, SerializeMap as _, Serializer};

use super::entries::Entries;
use super::error::HeaderError;
use super::is_git_lfs_pointer;
use super::other_format::{OtherFormat, START_BYTES};

/// The header starts with its own length, in as many bytes.
const LENGTH_BYTES: u64 = 8;

/// The largest header that a file may have, as in every reader of the format.
const MAX_HEADER_BYTES: u64 = 100_000_000;

/// The key under which the metadata stand beside the tensors.
const METADATA: &str = "__metadata__";

/// The header of a safetensors file.
///
/// Reading is strict: every byte of the data belongs to exactly one tensor, and no name comes twice. Order is kept:
/// a header that is read and written again has its metadata and tensors where they were, and the same bytes if it was
/// written by `safetensors`.
///
/// ```
/// use wgpu_optim::files::{Dtype, Header};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// let metadata = vec![("format".to_owned(), "pt".to_owned())];
/// let mut file = Header::new(metadata, [("weight".to_owned(), Dtype::F32, vec![2, 3])])?.to_bytes()?;
/// file.extend([0; 24]);
///
/// let header = Header::of(&file)?;
/// assert_eq!(header.metadata[0].1, "pt");
/// assert_eq!(header.tensors()[0].data_bytes, 0..24);
/// # Ok(())
/// # }
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Header {
    /// Keys and values, in the file's order.
    pub metadata: Vec<(String, String)>,
    /// The tensors, in the order in which they stand in the header.
    tensors: Vec<TensorEntry>,
    /// Indices of the tensors in the order of their data.
    by_place: Vec<usize>,
    data_start: u64,
}

/// A tensor of a safetensors file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TensorEntry {
    /// The tensor's name.
    pub name: String,
    /// The type of its elements.
    pub dtype: Dtype,
    /// The tensor's shape, first dimension first.
    pub shape: Vec<usize>,
    /// The tensor's bytes, counted from the start of the data, which follows the header.
    pub data_bytes: Range<u64>,
}

impl TensorEntry {
    /// Number of elements, the product of the shape.
    #[must_use]
    pub fn numel(&self) -> u64 {
        // Checked when the header was made.
        self.shape.iter().map(|size| *size as u64).product()
    }
}

impl Header {
    /// A header for tensors of these names, dtypes and shapes. Their data follow each other as `safetensors` lays
    /// them out: the dtype of the largest alignment first, then by name.
    ///
    /// # Errors
    /// [`HeaderError`] naming the tensor whose name comes twice or is `__metadata__`, or whose size is no whole number
    /// of bytes that a file can have, or naming the key that comes twice in `metadata`.
    pub fn new(
        metadata: Vec<(String, String)>,
        tensors: impl IntoIterator<Item = (String, Dtype, Vec<usize>)>,
    ) -> Result<Self, HeaderError> {
        let mut tensors: Vec<_> = tensors.into_iter().collect();
        tensors.sort_by(|left, right| right.1.cmp(&left.1).then_with(|| left.0.cmp(&right.0)));
        let mut end = 0_u64;
        let place = |(name, dtype, shape): (String, Dtype, Vec<usize>)| {
            let start = end;
            end = size_bytes(&name, dtype, &shape)?
                .checked_add(start)
                .ok_or_else(|| HeaderError::Size {
                    tensor: name.clone(),
                })?;
            Ok(TensorEntry {
                name,
                dtype,
                shape,
                data_bytes: start..end,
            })
        };
        let tensors: Vec<_> = tensors
            .into_iter()
            .map(place)
            .collect::<Result<_, HeaderError>>()?;
        Self::checked(metadata, tensors, 0)
    }

    /// Reads the header of a whole file in memory.
    ///
    /// # Errors
    /// As [`read`](Self::read).
    pub fn of(mut file: &[u8]) -> Result<Self, HeaderError> {
        let file_bytes = file.len() as u64;
        Self::read(&mut file, file_bytes)
    }

    /// Reads the header at the start of a file of `file_bytes` bytes, and nothing behind it.
    ///
    /// # Errors
    /// [`HeaderError`] if the file does not read or is not a safetensors file, naming the tensor where one is wrong.
    pub fn read(file: &mut impl Read, file_bytes: u64) -> Result<Self, HeaderError> {
        let mut start = Vec::new();
        file.by_ref().take(LENGTH_BYTES).read_to_end(&mut start)?;
        let length: [u8; LENGTH_BYTES as usize] = start
            .as_slice()
            .try_into()
            .map_err(|_| HeaderError::TooShort { file_bytes })?;
        let header_bytes = u64::from_le_bytes(length);
        if header_bytes > MAX_HEADER_BYTES {
            let too_large = HeaderError::TooLarge {
                header_bytes,
                max_header_bytes: MAX_HEADER_BYTES,
            };
            return Err(no_header(start, file, too_large));
        }
        let data_start = LENGTH_BYTES + header_bytes;
        let cut_off = || HeaderError::Length {
            expected_bytes: data_start,
            actual_bytes: file_bytes,
        };
        if data_start > file_bytes {
            return Err(no_header(start, file, cut_off()));
        }
        let mut json = Vec::with_capacity(header_bytes as usize);
        file.take(header_bytes).read_to_end(&mut json)?;
        if json.len() as u64 != header_bytes {
            return Err(cut_off());
        }
        let Json { metadata, tensors } = serde_json::from_slice(&json)?;
        let entry = |(name, info): (String, TensorInfo)| TensorEntry {
            data_bytes: info.data_offsets.0 as u64..info.data_offsets.1 as u64,
            name,
            dtype: info.dtype,
            shape: info.shape,
        };
        let tensors = tensors.into_iter().map(entry).collect();
        let header = Self::checked(metadata, tensors, data_start)?;
        // Saturating: tensors may claim all of 2^64 bytes without one of them being too large.
        match data_start.saturating_add(header.data_len()) {
            expected_bytes if expected_bytes == file_bytes => Ok(header),
            expected_bytes => Err(HeaderError::Length {
                expected_bytes,
                actual_bytes: file_bytes,
            }),
        }
    }

    fn checked(
        metadata: Vec<(String, String)>,
        tensors: Vec<TensorEntry>,
        data_start: u64,
    ) -> Result<Self, HeaderError> {
        let metadata = Entries(metadata);
        if let Some(key) = metadata.duplicate() {
            return Err(HeaderError::DuplicateKey {
                key: key.to_owned(),
            });
        }
        let names = Entries(
            tensors
                .iter()
                .map(|tensor| (tensor.name.clone(), ()))
                .collect(),
        );
        if let Some(tensor) = names.duplicate() {
            return Err(HeaderError::DuplicateTensor {
                tensor: tensor.to_owned(),
            });
        }
        // The sort is stable: empty tensors at one place stay in the header's order.
        let mut by_place: Vec<_> = (0..tensors.len()).collect();
        by_place.sort_by_key(|index| {
            (
                tensors[*index].data_bytes.start,
                tensors[*index].data_bytes.end,
            )
        });
        let mut end = 0;
        for tensor in by_place.iter().map(|index| &tensors[*index]) {
            if tensor.name == METADATA {
                return Err(HeaderError::ReservedName);
            }
            let expected =
                end..size_bytes(&tensor.name, tensor.dtype, &tensor.shape)?.saturating_add(end);
            if tensor.data_bytes != expected {
                return Err(HeaderError::Place {
                    tensor: tensor.name.clone(),
                    expected,
                    actual: tensor.data_bytes.clone(),
                });
            }
            end = tensor.data_bytes.end;
        }
        Ok(Self {
            metadata: metadata.0,
            tensors,
            by_place,
            data_start,
        })
    }

    /// The start of a file: this header, and spaces up to a multiple of 8 bytes. The data follow.
    ///
    /// # Errors
    /// [`HeaderError::TooLarge`] if no reader would take it.
    pub fn to_bytes(&self) -> Result<Vec<u8>, HeaderError> {
        let mut bytes = vec![0; LENGTH_BYTES as usize];
        serde_json::to_writer(&mut bytes, self)?;
        bytes.resize(bytes.len().next_multiple_of(8), b' ');
        let header_bytes = bytes.len() as u64 - LENGTH_BYTES;
        if header_bytes > MAX_HEADER_BYTES {
            return Err(HeaderError::TooLarge {
                header_bytes,
                max_header_bytes: MAX_HEADER_BYTES,
            });
        }
        bytes[..LENGTH_BYTES as usize].copy_from_slice(&header_bytes.to_le_bytes());
        Ok(bytes)
    }

    /// The tensors, in the order in which they stand in the header.
    #[must_use]
    pub fn tensors(&self) -> &[TensorEntry] {
        &self.tensors
    }

    /// The tensors in the order of their data.
    pub fn in_place_order(&self) -> impl ExactSizeIterator<Item = &TensorEntry> {
        self.by_place.iter().map(|index| &self.tensors[*index])
    }

    /// The start of the data in the file that the header was read from; 0 for a new one.
    #[must_use]
    pub const fn data_start(&self) -> u64 {
        self.data_start
    }

    /// Bytes of all tensors together.
    #[must_use]
    pub fn data_len(&self) -> u64 {
        let last = self.in_place_order().last();
        last.map_or(0, |tensor| tensor.data_bytes.end)
    }

    /// The bytes of a tensor of this header in the whole file that it was read from.
    pub(crate) fn data<'f>(&self, file: &'f [u8], tensor: &TensorEntry) -> &'f [u8] {
        let data = &file[self.data_start as usize..];
        &data[tensor.data_bytes.start as usize..tensor.data_bytes.end as usize]
    }
}

/// Why a file has no header: by what it is instead, as far as that is known.
fn no_header(mut start: Vec<u8>, file: &mut impl Read, otherwise: HeaderError) -> HeaderError {
    let rest = START_BYTES.saturating_sub(start.len() as u64);
    if let Err(error) = file.take(rest).read_to_end(&mut start) {
        return error.into();
    }
    // A header that is only cut off.
    if start.get(LENGTH_BYTES as usize) == Some(&b'{') {
        return otherwise;
    }
    match OtherFormat::of(&start) {
        _ if is_git_lfs_pointer(&start) => HeaderError::GitLfsPointer,
        Some(format) => HeaderError::OtherFormat { format },
        None => otherwise,
    }
}

/// A tensor of a file: its name, dtype, shape and bytes.
pub(crate) type Content<'c> = (String, Dtype, &'c [usize], &'c [u8]);

/// A whole file of tensors.
pub(crate) fn serialize(
    metadata: Vec<(String, String)>,
    tensors: Vec<Content<'_>>,
) -> Result<Vec<u8>, HeaderError> {
    Ok(Contents::new(metadata, tensors)?.to_bytes())
}

/// The parts of a file, in its order.
pub(crate) struct Contents<'c> {
    header: Vec<u8>,
    tensors: Vec<Content<'c>>,
}

impl<'c> Contents<'c> {
    /// Checks and sorts the tensors of a file.
    pub(crate) fn new(
        metadata: Vec<(String, String)>,
        mut tensors: Vec<Content<'c>>,
    ) -> Result<Self, HeaderError> {
        let entries = tensors.iter();
        let entries = entries.map(|(name, dtype, shape, _)| (name.clone(), *dtype, shape.to_vec()));
        let header = Header::new(metadata, entries)?;
        tensors.sort_unstable_by(|left, right| (right.1, &left.0).cmp(&(left.1, &right.0)));
        // Before memory is taken for them.
        for (entry, (_, _, _, bytes)) in header.in_place_order().zip(&tensors) {
            let expected_bytes = entry.data_bytes.end - entry.data_bytes.start;
            let actual_bytes = bytes.len() as u64;
            if actual_bytes != expected_bytes {
                return Err(HeaderError::Values {
                    tensor: entry.name.clone(),
                    expected_bytes,
                    actual_bytes,
                });
            }
        }
        Ok(Self {
            header: header.to_bytes()?,
            tensors,
        })
    }

    pub(crate) fn parts(&self) -> impl Iterator<Item = &[u8]> {
        let tensors = self.tensors.iter().map(|(_, _, _, bytes)| *bytes);
        iter::once(&*self.header).chain(tensors)
    }

    /// All of it, in memory.
    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        self.parts().collect::<Vec<_>>().concat()
    }
}

/// Bytes of a tensor, a whole number of them.
fn size_bytes(name: &str, dtype: Dtype, shape: &[usize]) -> Result<u64, HeaderError> {
    let bits = shape
        .iter()
        .try_fold(dtype.bitsize() as u64, |product, size| {
            product.checked_mul(*size as u64)
        });
    match bits {
        Some(bits) if bits.is_multiple_of(8) => Ok(bits / 8),
        _ => Err(HeaderError::Size {
            tensor: name.to_owned(),
        }),
    }
}

/// The header as it stands in a file.
struct Json {
    metadata: Vec<(String, String)>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Json {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct TensorsAndMetadata;

        impl<'de> Visitor<'de> for TensorsAndMetadata {
            type Value = Json;

            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("a map of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Json, A::Error> {
                let (mut metadata, mut tensors) = (None, Vec::new());
                while let Some(name) = map.next_key::<String>()? {
                    if name != METADATA {
                        tensors.push((name, map.next_value()?));
                    } else if metadata.is_none() {
                        metadata = Some(map.next_value::<Option<Entries<String>>>()?);
                    } else {
                        return Err(serde::de::Error::duplicate_field(METADATA));
                    }
                }
                let metadata = metadata
                    .flatten()
                    .map_or_else(Vec::new, |entries| entries.0);
                Ok(Json { metadata, tensors })
            }
        }

        deserializer.deserialize_map(TensorsAndMetadata)
    }
}

impl Serialize for Header {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        let mut map = serializer.serialize_map(None)?;
        if !self.metadata.is_empty() {
            map.serialize_entry(METADATA, &Entries(self.metadata.clone()))?;
        }
        for tensor in &self.tensors {
            let info = TensorInfo {
                dtype: tensor.dtype,
                shape: tensor.shape.clone(),
                data_offsets: (
                    tensor.data_bytes.start as usize,
                    tensor.data_bytes.end as usize,
                ),
            };
            map.serialize_entry(&tensor.name, &info)?;
        }
        map.end()
    }
}
