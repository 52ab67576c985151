//! Formats of files that are no safetensors files, recognized by their first bytes.

use std::fmt;

/// Bytes by which a format is recognized.
pub(super) const START_BYTES: u64 = 72;

/// A format in which models are kept, too, or what somebody gets in place of a file. Its text says what can be done.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum OtherFormat {
    /// A zip archive, as PyTorch and NumPy write.
    Zip,
    /// A pickle, as PyTorch wrote before.
    Pickle,
    /// Weights for llama.cpp.
    Gguf,
    /// HDF5, as Keras writes.
    Hdf5,
    /// HTML or XML.
    WebPage,
    /// JSON, as the index of a model in several files is.
    Json,
    /// Some other text, of which this is the start.
    Text(String),
}

impl OtherFormat {
    /// The format of a file that starts so, if it is one that is known.
    #[must_use]
    pub fn of(start: &[u8]) -> Option<Self> {
        let starts: &[(&[u8], Self)] = &[
            (b"PK\x03\x04", Self::Zip),
            (b"\x80\x02", Self::Pickle),
            (b"\x80\x03", Self::Pickle),
            (b"\x80\x04", Self::Pickle),
            (b"\x80\x05", Self::Pickle),
            (b"GGUF", Self::Gguf),
            (b"\x89HDF\r\n\x1a\n", Self::Hdf5),
        ];
        let mut starts = starts.iter();
        if let Some((_, format)) = starts.find(|(magic, _)| start.starts_with(magic)) {
            return Some(format.clone());
        }
        let start = &start[..start.len().min(START_BYTES as usize)];
        let text = match str::from_utf8(start) {
            Ok(text) => text,
            // Cut within a character.
            Err(error) if error.error_len().is_none() => {
                str::from_utf8(&start[..error.valid_up_to()]).ok()?
            }
            Err(_) => return None,
        };
        let text = text.trim_start_matches('\u{feff}').trim_ascii();
        let in_lower_case = text.to_ascii_lowercase();
        let is_of = |tag: &&str| in_lower_case.starts_with(*tag);
        match text.chars().next()? {
            _ if ["<!doctype", "<html", "<head", "<?xml"].iter().any(is_of) => Some(Self::WebPage),
            '{' => Some(Self::Json),
            _ if text
                .chars()
                .any(|char| char.is_control() && !char.is_whitespace()) =>
            {
                None
            }
            _ => Some(Self::Text(text.to_owned())),
        }
    }
}

impl fmt::Display for OtherFormat {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const CONVERT: &str =
            "load it in Python, and save its tensors by safetensors.torch.save_file";
        match self {
            Self::Zip => write!(f, "a zip archive, as PyTorch's .bin and .pt are: {CONVERT}"),
            Self::Pickle => write!(f, "a pickle, as PyTorch's older .bin and .pt are: {CONVERT}"),
            Self::Gguf => f.write_str(
                "a GGUF file, as llama.cpp reads: take the safetensors files that it was made from",
            ),
            Self::Hdf5 => f.write_str(
                "an HDF5 file, as Keras writes: load it in Python, and save its tensors by \
                 safetensors.numpy.save_file",
            ),
            Self::WebPage => f.write_str(
                "a web page or what a server says of an error: download the file itself, logged in if need be",
            ),
            Self::Json => f.write_str("JSON: the index of a model has a name that ends in .json"),
            Self::Text(text) => write!(f, "text that starts with {text:?}"),
        }
    }
}
