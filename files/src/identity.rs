//! The file that a path leads to, and whether it is still the one that it was.

use std::ffi::OsString;
use std::fs::{self, Metadata};
use std::io;
use std::path::{Path, PathBuf};

/// Links that are followed before they count as a circle, as on Linux.
const MAX_LINKS: usize = 40;

/// The path that another one leads to through links, the last of which may point to a file that does not exist yet.
pub fn resolve_links(path: &Path) -> io::Result<PathBuf> {
    let mut path = path.to_owned();
    for _ in 0..MAX_LINKS {
        // As `/dev/stdout` does, whatever that is.
        if path.starts_with("/proc") {
            return Err(io::Error::other(
                "it leads to what a process has open, expected the name of a file",
            ));
        }
        match fs::read_link(&path) {
            Ok(link) => path = directory_of(&path).join(link),
            // No link, or nothing at all.
            Err(_) => return Ok(path),
        }
    }
    Err(io::Error::other("too many links lead to it"))
}

/// The directory that a path's file is in.
pub fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

/// Whether a file, its links resolved, belongs to a cache of Hugging Face's libraries: snapshots there are links to
/// `blobs/HASH`.
pub fn is_blob_of_hub(path: &Path) -> bool {
    let blobs = directory_of(path);
    blobs.file_name().is_some_and(|name| name == "blobs")
        && blobs.with_file_name("snapshots").is_dir()
}

/// The identity of a path, which other spellings of it share: the directory, whatever it is called, and the name in it.
#[derive(Debug, PartialEq, Eq)]
pub struct Identity {
    #[cfg(unix)]
    directory: (u64, u64),
    #[cfg(not(unix))]
    directory: PathBuf,
    name: OsString,
}

impl Identity {
    /// The identity of a path whose links have been resolved.
    pub fn of(path: &Path) -> io::Result<Self> {
        let directory = directory_of(path);
        let name = path.file_name();
        let name = name.ok_or_else(|| io::Error::other("it names no file"))?;
        Ok(Self {
            #[cfg(unix)]
            directory: device_and_inode(&fs::metadata(directory)?),
            #[cfg(not(unix))]
            directory: fs::canonicalize(directory)?,
            // Their file systems usually do not tell the cases apart.
            name: match cfg!(any(windows, target_os = "macos")) {
                true => name.to_ascii_lowercase(),
                false => name.to_owned(),
            },
        })
    }
}

#[cfg(unix)]
fn device_and_inode(metadata: &Metadata) -> (u64, u64) {
    use std::os::unix::fs::MetadataExt as _;
    (metadata.dev(), metadata.ino())
}

/// Whether two names are hard links to one file, as far as the system says.
pub fn is_one_file(one: &Metadata, other: &Metadata) -> bool {
    #[cfg(unix)]
    {
        device_and_inode(one) == device_and_inode(other)
    }
    #[cfg(not(unix))]
    {
        let _ = (one, other);
        false
    }
}

/// Whether a file has neither been replaced nor written to between the two.
pub fn is_same_version(before: &Metadata, now: &Metadata) -> bool {
    let is_replaced = cfg!(unix) && !is_one_file(before, now);
    !is_replaced && before.len() == now.len() && before.modified().ok() == now.modified().ok()
}
