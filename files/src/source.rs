//! A file that is read.

use std::fs::{self, File, Metadata, TryLockError};
use std::io;
use std::path::{Path, PathBuf};

use wgpu_optim::files::{HeaderError, is_git_lfs_pointer};

use crate::at::read_exact_at;
use crate::error::FileError;
use crate::identity::is_same_version;

/// The most that is read whole, as much as the header of a safetensors file may have.
const MAX_WHOLE_BYTES: u64 = 100_000_000;

/// A file that is read by place and must not change meanwhile.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    /// None of a file that every read opens anew.
    file: Option<File>,
    /// Size, time and inode when it was opened first.
    version: Metadata,
}

impl SourceFile {
    /// Opens a regular file.
    ///
    /// # Errors
    /// [`FileError::Io`] if it cannot be read, or is no regular file.
    pub fn open(path: &Path) -> Result<Self, FileError> {
        let (file, version) = open(path).map_err(FileError::io("read", path))?;
        Ok(Self {
            path: path.to_owned(),
            file: Some(file),
            version,
        })
    }

    /// Closes the file, and lets every read open it anew: a process may not have all its files open at once.
    pub(crate) fn close(&mut self) {
        self.file = None;
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The size of the file when it was opened.
    pub fn bytes(&self) -> u64 {
        self.version.len()
    }

    /// Does something with the file.
    pub(crate) fn with<T>(
        &self,
        work: impl FnOnce(&File) -> io::Result<T>,
    ) -> Result<T, FileError> {
        let done = match &self.file {
            Some(file) => work(file),
            None => open(&self.path).and_then(|(file, now)| {
                match is_same_version(&self.version, &now) {
                    true => work(&file),
                    false => Err(changed()),
                }
            }),
        };
        done.map_err(FileError::io("read", &self.path))
    }

    /// Fills `buffer` from byte `offset` on.
    ///
    /// # Errors
    /// [`FileError::Io`] if it cannot be read, or is shorter by now.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), FileError> {
        self.with(|file| match read_exact_at(file, buffer, offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                Err(io::Error::other("it became shorter meanwhile"))
            }
            read => read,
        })
    }

    /// Keeps other runs from replacing the file as long as this one has it open.
    ///
    /// # Errors
    /// [`FileError`] if another run has claimed it, or has replaced it since it was opened.
    pub fn claim(&self) -> Result<(), FileError> {
        self.with(|file| {
            // What has no locks has to do without: a file that has been replaced is noticed all the same, if later. On
            // Windows a lock would keep others from reading, too.
            if cfg!(unix) && matches!(file.try_lock(), Err(TryLockError::WouldBlock)) {
                return Ok(Err(FileError::Claimed {
                    path: self.path.clone(),
                }));
            }
            match is_same_version(&file.metadata()?, &fs::metadata(&self.path)?) {
                true => Ok(Ok(())),
                false => Err(changed()),
            }
        })?
    }

    /// Makes sure that what has been read is one version of the file.
    ///
    /// # Errors
    /// [`FileError::Io`] if it has been written to.
    pub fn check_unchanged(&self) -> Result<(), FileError> {
        self.with(
            |file| match is_same_version(&self.version, &file.metadata()?) {
                true => Ok(()),
                false => Err(changed()),
            },
        )
    }
}

fn open(path: &Path) -> io::Result<(File, Metadata)> {
    // A pipe would block when it is opened, and cannot be read by place.
    let kind = fs::metadata(path)?;
    if kind.is_dir() {
        return Err(io::ErrorKind::IsADirectory.into());
    }
    if !kind.is_file() {
        return Err(io::Error::other("it is no regular file"));
    }
    let file = File::open(path)?;
    let version = file.metadata()?;
    Ok((file, version))
}

fn changed() -> io::Error {
    io::Error::other("it was changed meanwhile")
}

/// The content of a small file.
///
/// # Errors
/// [`FileError`] if it cannot be read, is too large for one, or has not been fetched from Git LFS.
pub fn read_whole(path: &Path) -> Result<Vec<u8>, FileError> {
    let source = SourceFile::open(path)?;
    let bytes = source.bytes();
    if bytes > MAX_WHOLE_BYTES {
        let message = format!("it has {bytes} bytes, expected at most {MAX_WHOLE_BYTES}");
        return Err(FileError::io("read", path)(io::Error::other(message)));
    }
    let mut content = vec![0; bytes as usize];
    source.read_exact_at(&mut content, 0)?;
    match is_git_lfs_pointer(&content) {
        true => Err(FileError::content(path)(HeaderError::GitLfsPointer)),
        false => Ok(content),
    }
}
