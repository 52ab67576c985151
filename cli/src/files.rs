//! Files: safetensors read through a memory map, and whatever is written beside its target and renamed.

use std::collections::HashMap;
use std::fs::{self, File, Permissions};
use std::io;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, bail, ensure};
use memmap2::Mmap;
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use serde::Serialize;
use tempfile::TempPath;

/// Names and values of a file's own metadata.
pub type Metadata = HashMap<String, String>;

/// A file in memory, as the operating system pages it in.
pub struct MappedFile {
    path: PathBuf,
    map: Mmap,
}

impl MappedFile {
    pub fn open(path: &Path) -> Result<Self> {
        let open = || -> io::Result<Mmap> {
            let file = File::open(path)?;
            // A directory opens, but does not map.
            if file.metadata()?.is_dir() {
                return Err(io::ErrorKind::IsADirectory.into());
            }
            #[expect(
                unsafe_code,
                reason = "mapping is sound while nobody truncates the file; this program only replaces \
                          files by renaming, which leaves the mapped one as it is"
            )]
            unsafe {
                Mmap::map(&file)
            }
        };
        let map = open().with_context(|| format!("cannot read {}", path.display()))?;
        let path = path.to_owned();
        Ok(Self { path, map })
    }

    /// The whole file.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// The tensors and the metadata.
    pub fn parse(&self) -> Result<(SafeTensors<'_>, Metadata)> {
        let not_safetensors = || format!("{} is not a safetensors file", self.path.display());
        let tensors = SafeTensors::deserialize(&self.map).with_context(not_safetensors)?;
        let (_, header) = SafeTensors::read_metadata(&self.map).with_context(not_safetensors)?;
        Ok((tensors, header.metadata().clone().unwrap_or_default()))
    }
}

/// Names and shapes of a file's F32 tensors, in alphabetical order.
pub fn f32_shapes(tensors: &SafeTensors<'_>) -> Vec<(String, Vec<usize>)> {
    let mut shapes: Vec<_> = tensors
        .iter()
        .filter(|(_, view)| view.dtype() == Dtype::F32)
        .map(|(name, view)| (name.to_owned(), view.shape().to_vec()))
        .collect();
    shapes.sort();
    shapes
}

/// The values of an F32 tensor, wherever its bytes lie.
pub fn f32_values(view: &TensorView<'_>) -> Vec<f32> {
    bytemuck::pod_collect_to_vec(view.data())
}

/// A table with one line per row, headed by the names of the fields.
pub fn csv(rows: impl Iterator<Item = impl Serialize>) -> Result<Vec<u8>> {
    let mut table = csv::Writer::from_writer(Vec::new());
    for row in rows {
        table.serialize(row)?;
    }
    Ok(table.into_inner().map_err(|error| error.into_error())?)
}

/// A file that is being made beside its target, and vanishes if it does not replace it.
pub struct StagedFile {
    temp: TempPath,
    target: PathBuf,
    permissions: Permissions,
}

impl StagedFile {
    /// Makes sure that the target can be written, before any work is done for it.
    pub fn create(target: &Path) -> Result<Self> {
        let cannot_write = || format!("cannot write {}", target.display());
        // Through a link the file that it points to is replaced, not the link.
        let target = match fs::canonicalize(target) {
            Ok(existing) => existing,
            Err(_) => target.to_owned(),
        };
        let existing = fs::metadata(&target).ok();
        if let Some(existing) = &existing {
            ensure!(existing.is_file(), "{}: not a file", cannot_write());
            ensure!(
                !existing.permissions().readonly(),
                "{}: it is read-only",
                cannot_write()
            );
        }
        let mut builder = tempfile::Builder::new();
        builder.prefix(".wgpu-optim-");
        // What any new file gets, instead of a temporary file's privacy.
        #[cfg(unix)]
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
        let temp = builder
            .tempfile_in(directory_of(&target))
            .with_context(cannot_write)?;
        let permissions = match existing {
            Some(existing) => existing.permissions(),
            None => temp
                .as_file()
                .metadata()
                .with_context(cannot_write)?
                .permissions(),
        };
        Ok(Self {
            temp: temp.into_temp_path(),
            target,
            permissions,
        })
    }

    /// Where the file will be, links resolved.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Writes a safetensors file; the target stays as it is.
    pub fn write<'data>(
        &self,
        tensors: impl IntoIterator<Item = (String, TensorView<'data>)>,
        metadata: Metadata,
    ) -> Result<()> {
        let metadata = (!metadata.is_empty()).then_some(metadata);
        self.write_with(|temp| Ok(safetensors::serialize_to_file(tensors, metadata, temp)?))
    }

    /// Writes these bytes; the target stays as it is.
    pub fn write_bytes(&self, content: &[u8]) -> Result<()> {
        self.write_with(|temp| Ok(fs::write(temp, content)?))
    }

    fn write_with(&self, write: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
        let write = || -> Result<()> {
            write(&self.temp)?;
            fs::set_permissions(&self.temp, self.permissions.clone())?;
            // On disk before the rename, or a crash could leave the target empty.
            File::open(&self.temp)?.sync_all()?;
            Ok(())
        };
        write().with_context(|| format!("cannot write {}", self.target.display()))
    }

    /// Lets the written file take the target's place.
    pub fn replace_target(self) -> Result<()> {
        let Self { temp, target, .. } = self;
        temp.persist(&target)
            .with_context(|| format!("cannot write {}", target.display()))
    }
}

/// Lets two written files replace their targets, both or neither.
pub fn replace_both(first: StagedFile, second: StagedFile) -> Result<()> {
    let target = first.target.clone();
    let old =
        keep_aside(&target).with_context(|| format!("cannot replace {}", target.display()))?;
    first.replace_target()?;
    if let Err(error) = second.replace_target() {
        let undone = match old {
            Some(old) => old.persist(&target).map_err(|error| error.error),
            None => fs::remove_file(&target),
        };
        if let Err(undo) = undone {
            bail!(
                "{error:#}, and {} could not be put back: {undo}",
                target.display()
            );
        }
        return Err(error);
    }
    Ok(())
}

/// A second name for an existing file, under which it outlives its replacement.
fn keep_aside(path: &Path) -> io::Result<Option<TempPath>> {
    if !path.exists() {
        return Ok(None);
    }
    let aside =
        tempfile::Builder::new()
            .prefix(".wgpu-optim-")
            .make_in(directory_of(path), |aside| {
                // A file system without hard links takes a copy.
                fs::hard_link(path, aside).or_else(|error| match error.kind() {
                    io::ErrorKind::AlreadyExists => Err(error),
                    _ => fs::copy(path, aside).map(drop),
                })
            })?;
    Ok(Some(aside.into_temp_path()))
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn staged(target: &Path, value: f32) -> StagedFile {
        let staged = StagedFile::create(target).unwrap();
        let bytes = value.to_le_bytes();
        let view = TensorView::new(Dtype::F32, vec![1], &bytes).unwrap();
        staged
            .write([("x".to_owned(), view)], Metadata::new())
            .unwrap();
        staged
    }

    fn value_in(path: &Path) -> f32 {
        let file = MappedFile::open(path).unwrap();
        let (tensors, _) = file.parse().unwrap();
        f32_values(&tensors.tensor("x").unwrap())[0]
    }

    #[test]
    fn both_targets_change_or_neither() {
        let dir = tempfile::tempdir().unwrap();
        let (a, b) = (dir.path().join("a"), dir.path().join("b"));
        replace_both(staged(&a, 1.0), staged(&b, 2.0)).unwrap();
        replace_both(staged(&a, 3.0), staged(&b, 4.0)).unwrap();
        assert_eq!((value_in(&a), value_in(&b)), (3.0, 4.0));

        // The second target turns into a directory after it has been checked.
        let (first, second) = (staged(&a, 5.0), staged(&b, 6.0));
        fs::remove_file(&b).unwrap();
        fs::create_dir(&b).unwrap();
        fs::write(b.join("in the way"), "").unwrap();
        assert!(replace_both(first, second).is_err());
        assert_eq!(value_in(&a), 3.0);

        // The same where the first target is new.
        let new = dir.path().join("new");
        let first = staged(&new, 5.0);
        fs::remove_dir_all(&b).unwrap();
        let second = staged(&b, 6.0);
        fs::create_dir(&b).unwrap();
        fs::write(b.join("in the way"), "").unwrap();
        assert!(replace_both(first, second).is_err());
        assert!(!new.exists());
        assert_eq!(
            fs::read_dir(dir.path()).unwrap().count(),
            2,
            "nothing else is left behind"
        );
    }
}
