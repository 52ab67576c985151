//! A file that is read.

use std::fs::{self, File, Metadata, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use anyhow::{Context as _, Result, bail, ensure};
use wgpu_optim::files::is_git_lfs_pointer;

use super::at::read_exact_at;
use super::identity::is_same_version;

/// The most that is read whole, as much as the header of a safetensors file may have.
const MAX_WHOLE_BYTES: u64 = 100_000_000;

/// A file that is read by place and must not change meanwhile.
#[derive(Debug)]
pub struct SourceFile {
    path: PathBuf,
    file: File,
    bytes: u64,
    modified: Option<SystemTime>,
}

impl SourceFile {
    /// Opens a regular file.
    pub fn open(path: &Path) -> Result<Self> {
        let open = || -> io::Result<(File, Metadata)> {
            // A pipe would block when it is opened, and cannot be read by place.
            let kind = fs::metadata(path)?;
            if kind.is_dir() {
                return Err(io::ErrorKind::IsADirectory.into());
            }
            if !kind.is_file() {
                return Err(io::Error::other("it is no regular file"));
            }
            let file = File::open(path)?;
            let metadata = file.metadata()?;
            Ok((file, metadata))
        };
        let (file, metadata) = open().with_context(|| cannot_read(path))?;
        Ok(Self {
            path: path.to_owned(),
            file,
            bytes: metadata.len(),
            modified: metadata.modified().ok(),
        })
    }

    /// The path that it was opened by.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Its size when it was opened.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }

    /// The file itself, to be read from its start.
    pub fn reader(&self) -> &File {
        &self.file
    }

    /// Fills `buffer` from byte `offset` on.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<()> {
        match read_exact_at(&self.file, buffer, offset) {
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => {
                bail!("{}: it became shorter meanwhile", cannot_read(&self.path))
            }
            read => read.with_context(|| cannot_read(&self.path)),
        }
    }

    /// Keeps other runs of this command from replacing the file as long as this one has it open.
    ///
    /// # Errors
    /// If another run has claimed it, or has replaced it since it was opened.
    pub fn claim(&self) -> Result<()> {
        // What has no locks has to do without: a file that has been replaced is noticed all the same, if later. On Windows
        // a lock would keep others from reading, too.
        let locked = if cfg!(unix) {
            self.file.try_lock()
        } else {
            Ok(())
        };
        ensure!(
            !matches!(locked, Err(TryLockError::WouldBlock)),
            "{} is being replaced by another run, and one of the two would be lost; start this one when that has ended",
            self.path.display()
        );
        let (own, now) = (self.file.metadata()?, fs::metadata(&self.path)?);
        ensure!(
            is_same_version(&own, &now),
            "{}: it was changed meanwhile",
            cannot_read(&self.path)
        );
        Ok(())
    }

    /// Makes sure that what has been read is one version of the file.
    pub fn check_unchanged(&self) -> Result<()> {
        let now = self.file.metadata();
        let now = now.with_context(|| cannot_read(&self.path))?;
        ensure!(
            now.len() == self.bytes && now.modified().ok() == self.modified,
            "{}: it was changed meanwhile",
            cannot_read(&self.path)
        );
        Ok(())
    }
}

/// The content of a small file.
pub fn read_whole(path: &Path) -> Result<Vec<u8>> {
    let source = SourceFile::open(path)?;
    ensure!(
        source.bytes() <= MAX_WHOLE_BYTES,
        "{}: it has {} bytes, expected at most {MAX_WHOLE_BYTES}",
        cannot_read(path),
        source.bytes()
    );
    let mut content = vec![0; source.bytes() as usize];
    source.read_exact_at(&mut content, 0)?;
    ensure!(
        !is_git_lfs_pointer(&content),
        "{} is a Git LFS pointer, not the file itself: `git lfs pull` in its repository fetches the file",
        path.display()
    );
    Ok(content)
}

fn cannot_read(path: &Path) -> String {
    format!("cannot read {}", path.display())
}
