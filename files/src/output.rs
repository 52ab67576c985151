//! Files that are written: beside their targets, without a name where the system can, and put in place together or
//! not at all.

use std::fs::{self, File, Metadata};
use std::io;
use std::path::{Path, PathBuf};

use tempfile::TempPath;

use crate::access;
use crate::at::{read_exact_at, write_all_at};
use crate::error::FileError;
use crate::identity::{
    Identity, directory_of, is_blob_of_hub, is_one_file, is_same_version, resolve_links,
};
use crate::model::NewFile;

const PREFIX: &str = ".wgpu-optim-";

/// The outputs of a command.
#[derive(Debug, Default)]
pub struct Outputs {
    files: Vec<Output>,
}

/// Outputs that are on disk and have yet to take their targets' places; they vanish if they do not.
#[derive(Debug)]
pub struct Finished {
    named: Vec<Replacement>,
    warnings: Vec<String>,
}

/// A file that is being made and vanishes if it does not take its target's place.
#[derive(Debug)]
pub struct Output {
    file: File,
    /// The file's name, where it has one already.
    temp: Option<TempPath>,
    target: PathBuf,
    /// The identity of the target when the output was made.
    existing: Option<Metadata>,
    identity: Identity,
    /// The user's name for the file.
    role: String,
}

impl Outputs {
    /// Makes sure that a file can be written to `target`, before any work is done for it, and that it is none of the
    /// other outputs. `role` is how messages call it. Returns its index.
    pub fn stage(&mut self, role: impl Into<String>, target: &Path) -> Result<usize, FileError> {
        let output = Output::create(role.into(), target)?;
        if let Some(other) = self.files.iter().find(|other| other.is_same_as(&output)) {
            return Err(FileError::SameFile {
                one: other.role.clone(),
                other: output.role,
                path: output.target,
            });
        }
        self.files.push(output);
        Ok(self.files.len() - 1)
    }

    /// Stages a file and writes what it starts with.
    pub fn stage_new(&mut self, file: &NewFile) -> Result<usize, FileError> {
        let index = self.stage(&*file.role, &file.path)?;
        self.files[index].write_all_at(&file.start, 0)?;
        Ok(index)
    }

    /// All of them, in the order in which they were made.
    pub fn iter(&self) -> impl Iterator<Item = &Output> {
        self.files.iter()
    }

    /// The index of the output that takes the place of an existing file, whatever either is called.
    ///
    /// # Errors
    /// [`FileError::Io`] if the system does not say where the file is.
    pub fn in_place_of(&self, path: &Path) -> Result<Option<usize>, FileError> {
        let find = || -> io::Result<Option<usize>> {
            let target = resolve_links(path)?;
            let (identity, file) = (Identity::of(&target)?, fs::metadata(&target)?);
            let takes_it = |output: &Output| {
                let existing = output.existing.as_ref();
                output.identity == identity || existing.is_some_and(|old| is_one_file(old, &file))
            };
            Ok(self.files.iter().position(takes_it))
        };
        find().map_err(FileError::io("find", path))
    }

    /// One of them, by its index.
    pub fn get(&self, index: usize) -> &Output {
        &self.files[index]
    }

    /// Lets all files take their targets' places, or none. They are on disk before the first does. Returns what could
    /// not be kept of the targets, for the user to know.
    pub fn replace_targets(self) -> Result<Vec<String>, FileError> {
        self.finish()?.replace_targets()
    }

    /// Sees to it that all files are on disk, beside their targets.
    ///
    /// # Errors
    /// [`FileError`] if one cannot be, or its target was changed meanwhile.
    pub fn finish(self) -> Result<Finished, FileError> {
        let mut warnings = Vec::new();
        // Each waits for its disk; together they wait once.
        let finished: Vec<Result<Vec<String>, FileError>> = std::thread::scope(|scope| {
            let threads: Vec<_> = self
                .files
                .iter()
                .map(|output| scope.spawn(|| output.finish()))
                .collect();
            let panicked = |output: &Output| {
                Err(cannot_write(&output.target)(io::Error::other(
                    "a thread that wrote it panicked",
                )))
            };
            let joined = threads.into_iter().zip(&self.files);
            joined
                .map(|(thread, output)| thread.join().unwrap_or_else(|_| panicked(output)))
                .collect()
        });
        for warning in finished {
            warnings.extend(warning?);
        }
        let named: Vec<_> = self
            .files
            .into_iter()
            .map(Output::named)
            .collect::<Result<_, _>>()?;
        // Last, because what comes before has waited for the disks.
        named.iter().try_for_each(Replacement::check_target)?;
        Ok(Finished { named, warnings })
    }
}

impl Finished {
    /// Lets all files take their targets' places, or none. Returns what could not be kept of the targets.
    pub fn replace_targets(self) -> Result<Vec<String>, FileError> {
        replace_all(self.named)?;
        Ok(self.warnings)
    }
}

impl Output {
    fn create(role: String, target: &Path) -> Result<Self, FileError> {
        let create = || -> io::Result<Self> {
            if let Ok(existing) = fs::metadata(target) {
                refuse(existing.is_dir(), "not a file")?;
                refuse(
                    !existing.is_file(),
                    "not a file that can be replaced, but a device, a pipe or a socket",
                )?;
                refuse(existing.permissions().readonly(), "it is read-only")?;
            }
            let target = resolve_links(target)?;
            let existing = fs::metadata(&target).ok();
            refuse(
                is_blob_of_hub(&target),
                &format!(
                    "it is a file of the Hugging Face cache ({}), which is named by a hash of its content and may be part \
                     of several snapshots; write to a file outside of the cache",
                    target.display()
                ),
            )?;
            let identity = Identity::of(&target)?;
            let (file, temp) = temporary_file(directory_of(&target), existing.is_some())?;
            Ok(Self {
                file,
                temp,
                target,
                existing,
                identity,
                role,
            })
        };
        create().map_err(cannot_write(target))
    }

    /// The file that it is to replace or to become.
    pub fn target(&self) -> &Path {
        &self.target
    }

    /// Writes at a place of the file; the target stays as it is.
    pub fn write_all_at(&self, bytes: &[u8], offset: u64) -> Result<(), FileError> {
        write_all_at(&self.file, bytes, offset).map_err(cannot_write(&self.target))
    }

    /// Reads what has been written at a place of the file.
    pub fn read_exact_at(&self, buffer: &mut [u8], offset: u64) -> Result<(), FileError> {
        read_exact_at(&self.file, buffer, offset).map_err(cannot_write(&self.target))
    }

    /// Whether both have the same place, or the same file is in their places.
    fn is_same_as(&self, other: &Self) -> bool {
        self.identity == other.identity
            || self
                .existing
                .as_ref()
                .zip(other.existing.as_ref())
                .is_some_and(|(one, other)| is_one_file(one, other))
    }

    /// Gives the file its target's owner, permissions and attributes and sees to it that it is on disk, or a crash
    /// could leave the target empty. Returns what could not be kept.
    fn finish(&self) -> Result<Vec<String>, FileError> {
        let finish = || -> io::Result<Vec<String>> {
            let lost = match &self.existing {
                Some(existing) => access::keep(&self.file, existing, &self.target)?,
                None => Vec::new(),
            };
            self.file.sync_all()?;
            Ok(lost)
        };
        let lost = finish().map_err(cannot_write(&self.target))?;
        let lost = lost.iter();
        Ok(lost
            .map(|lost| format!("{}: {lost}", self.target.display()))
            .collect())
    }

    fn named(self) -> Result<Replacement, FileError> {
        let temp = match self.temp {
            Some(temp) => temp,
            None => give_name(&self.file, directory_of(&self.target))
                .map_err(cannot_write(&self.target))?,
        };
        Ok(Replacement {
            temp,
            target: self.target,
            existing: self.existing,
        })
    }
}

/// A written file with a name of its own, beside its target.
#[derive(Debug)]
struct Replacement {
    temp: TempPath,
    target: PathBuf,
    existing: Option<Metadata>,
}

impl Replacement {
    /// Makes sure that nothing is lost that has come to the target's place since the output was made.
    fn check_target(&self) -> Result<(), FileError> {
        let now = fs::symlink_metadata(&self.target).ok();
        let is_lost = now.is_some_and(|now| {
            let existing = self.existing.as_ref();
            !existing.is_some_and(|existing| is_same_version(existing, &now))
        });
        refuse(
            is_lost,
            "it was changed meanwhile, as by another run, and that would be lost",
        )
        .map_err(cannot_write(&self.target))
    }
}

/// Puts every file in its target's place, or none.
fn replace_all(files: Vec<Replacement>) -> Result<(), FileError> {
    let directories: Vec<_> = files
        .iter()
        .map(|file| directory_of(&file.target).to_owned())
        .collect();
    // The old files, under second names. The last needs none: nothing can fail after it.
    let keep = |file: &Replacement| {
        keep_aside(&file.target).map_err(FileError::io("replace", &file.target))
    };
    let kept = files.iter().rev().skip(1).rev().map(keep);
    let mut kept = kept.collect::<Result<Vec<_>, _>>()?.into_iter();
    let mut replaced = Vec::new();
    for Replacement { temp, target, .. } in files {
        if let Err(error) = temp.persist(&target) {
            return Err(put_back(replaced, cannot_write(&target)(error.error)));
        }
        replaced.push((target, kept.next().flatten()));
    }
    for directory in directories {
        // So that the new names survive a crash. Where a directory cannot be synced they are there all the same.
        let _ = File::open(directory).and_then(|directory| directory.sync_all());
    }
    Ok(())
}

/// Undoes replacements, the last one first, because of `error`.
fn put_back(replaced: Vec<(PathBuf, Option<TempPath>)>, mut error: FileError) -> FileError {
    for (target, old) in replaced.into_iter().rev() {
        let undone = match old {
            Some(old) => old.persist(&target).map_err(|error| error.error),
            None => fs::remove_file(&target),
        };
        if let Err(undo) = undone {
            error = FileError::NotPutBack {
                path: target,
                undo,
                source: Box::new(error),
            };
        }
    }
    error
}

/// A second name for an existing file, under which it outlives its replacement.
fn keep_aside(path: &Path) -> io::Result<Option<TempPath>> {
    if !path.exists() {
        return Ok(None);
    }
    let aside = tempfile::Builder::new()
        .prefix(PREFIX)
        .make_in(directory_of(path), |aside| {
            // A file system without hard links takes a copy.
            fs::hard_link(path, aside).or_else(|error| match error.kind() {
                io::ErrorKind::AlreadyExists => Err(error),
                _ => fs::copy(path, aside).map(drop),
            })
        })?;
    Ok(Some(aside.into_temp_path()))
}

/// A file in `directory` that vanishes with the process, whatever ends it, where the system has such; else one with a
/// name that is removed when it is dropped.
fn temporary_file(directory: &Path, replaces: bool) -> io::Result<(File, Option<TempPath>)> {
    #[cfg(target_os = "linux")]
    if let Ok(file) = unnamed_file(directory) {
        return Ok((file, None));
    }
    let (file, temp) = named_file(directory, replaces)?;
    Ok((file, Some(temp)))
}

/// A file with a name of its own. One that replaces another is private until it gets that one's permissions.
fn named_file(directory: &Path, replaces: bool) -> io::Result<(File, TempPath)> {
    let mut builder = tempfile::Builder::new();
    builder.prefix(PREFIX);
    // What any new file gets, instead of a temporary file's privacy.
    #[cfg(unix)]
    if !replaces {
        builder.permissions(std::os::unix::fs::PermissionsExt::from_mode(0o666));
    }
    #[cfg(not(unix))]
    let _ = replaces;
    Ok(builder.tempfile_in(directory)?.into_parts())
}

/// A file without a name. Not every file system has them, and only by `/proc` can they be given one.
#[cfg(target_os = "linux")]
fn unnamed_file(directory: &Path) -> io::Result<File> {
    use std::os::unix::fs::OpenOptionsExt as _;

    let file = fs::OpenOptions::new()
        .read(true)
        .write(true)
        .mode(0o666)
        .custom_flags(nix::fcntl::OFlag::O_TMPFILE.bits())
        .open(directory)?;
    fs::metadata(by_descriptor(&file))?;
    Ok(file)
}

#[cfg(target_os = "linux")]
fn by_descriptor(file: &File) -> PathBuf {
    use std::os::fd::AsRawFd as _;
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// Gives an unnamed file a name in `directory`, under which it is removed when that is dropped.
fn give_name(file: &File, directory: &Path) -> io::Result<TempPath> {
    #[cfg(target_os = "linux")]
    {
        use nix::fcntl::{AT_FDCWD, AtFlags};
        let link = |name: &Path| {
            let flags = AtFlags::AT_SYMLINK_FOLLOW;
            nix::unistd::linkat(AT_FDCWD, &by_descriptor(file), AT_FDCWD, name, flags)?;
            Ok(())
        };
        let named = tempfile::Builder::new()
            .prefix(PREFIX)
            .make_in(directory, link)?;
        Ok(named.into_temp_path())
    }
    #[cfg(not(target_os = "linux"))]
    {
        let _ = (file, directory);
        Err(io::ErrorKind::Unsupported.into())
    }
}

fn cannot_write(path: &Path) -> impl FnOnce(io::Error) -> FileError {
    FileError::io("write", path)
}

/// An error that says why something is refused, where it is.
fn refuse(is_refused: bool, why: &str) -> io::Result<()> {
    match is_refused {
        true => Err(io::Error::other(why)),
        false => Ok(()),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    fn stage(targets: &[(&Path, &str)]) -> Outputs {
        let mut outputs = Outputs::default();
        for (target, content) in targets {
            let index = outputs.stage("--out", target).unwrap();
            outputs
                .get(index)
                .write_all_at(content.as_bytes(), 0)
                .unwrap();
        }
        outputs
    }

    /// Every file of a directory with its content.
    fn files(directory: &Path) -> Vec<(String, String)> {
        let entries = fs::read_dir(directory).unwrap().map(Result::unwrap);
        let mut files: Vec<_> = entries
            .map(|entry| {
                let content = fs::read_to_string(entry.path()).unwrap_or_default();
                (entry.file_name().into_string().unwrap(), content)
            })
            .collect();
        files.sort();
        files
    }

    fn expected(files: &[(&str, &str)]) -> Vec<(String, String)> {
        let owned = |(name, content): &(&str, &str)| (name.to_string(), content.to_string());
        files.iter().map(owned).collect()
    }

    #[test]
    fn all_targets_change_or_none() {
        let dir = tempfile::tempdir().unwrap();
        let [a, b, c] = ["a", "b", "c"].map(|name| dir.path().join(name));
        stage(&[(&a, "a1"), (&b, "b1")]).replace_targets().unwrap();
        stage(&[(&a, "a2"), (&b, "b2"), (&c, "c2")])
            .replace_targets()
            .unwrap();
        let before = expected(&[("a", "a2"), ("b", "b2"), ("c", "c2")]);
        assert_eq!(files(dir.path()), before);
        drop(stage(&[(&a, "lost"), (&c, "lost")]));
        assert_eq!(files(dir.path()), before);

        // Each of the three in turn cannot be replaced: a directory has taken its place after it was checked. The
        // first target exists, the second is new.
        fs::remove_file(&b).unwrap();
        for blocked in [&a, &b, &c] {
            let outputs = stage(&[(&a, "a3"), (&b, "b3"), (&c, "c3")])
                .finish()
                .unwrap();
            let content = fs::read(blocked).ok();
            if content.is_some() {
                fs::remove_file(blocked).unwrap();
            }
            fs::create_dir(blocked).unwrap();
            fs::write(blocked.join("in the way"), "").unwrap();
            let error = format!("{:#}", outputs.replace_targets().unwrap_err());
            assert!(error.contains(&blocked.display().to_string()), "{error}");
            fs::remove_dir_all(blocked).unwrap();
            if let Some(content) = content {
                fs::write(blocked, content).unwrap();
            }
            assert_eq!(files(dir.path()), expected(&[("a", "a2"), ("c", "c2")]));
        }
    }

    /// Another run makes, replaces or writes the target, in the same folder.
    #[test]
    fn what_has_come_to_a_targets_place_meanwhile_is_not_lost() {
        let dir = tempfile::tempdir().unwrap();
        let [old, new] = ["old", "new"].map(|name| dir.path().join(name));
        let replace = |path: &Path| {
            let other = dir.path().join("other");
            fs::write(&other, "precious").unwrap();
            fs::rename(other, path).unwrap();
        };
        let write = |path: &Path| fs::write(path, "precious").unwrap();
        let replaced = [&replace as &dyn Fn(&Path), &write];
        for (target, put) in replaced
            .into_iter()
            .flat_map(|put| [(&old, put), (&new, put)])
        {
            let _ = fs::remove_file(&new);
            fs::write(&old, "old content").unwrap();
            let outputs = stage(&[(&old, "1"), (&new, "2")]);
            put(target);
            let before = files(dir.path());
            let error = format!("{:#}", outputs.replace_targets().unwrap_err());
            let name = target.display().to_string();
            assert!(
                error.contains(&name) && error.contains("changed meanwhile"),
                "{error}"
            );
            assert_eq!(files(dir.path()), before);
        }
        // What has gone cannot be lost.
        let outputs = stage(&[(&old, "1"), (&new, "2")]);
        fs::remove_file(&old).unwrap();
        outputs.replace_targets().unwrap();
        assert_eq!(files(dir.path()), expected(&[("new", "2"), ("old", "1")]));
    }

    /// Files that have a name from the first, as on systems that know no others.
    #[test]
    #[cfg(unix)]
    fn what_replaces_a_file_is_private_until_it_has_that_ones_permissions() {
        use std::os::unix::fs::PermissionsExt as _;

        let dir = tempfile::tempdir().unwrap();
        let mode = |replaces| {
            let (file, _temp) = named_file(dir.path(), replaces).unwrap();
            file.metadata().unwrap().permissions().mode() & 0o777
        };
        assert_eq!(mode(true), 0o600);
        fs::write(dir.path().join("new"), "").unwrap();
        let new = fs::metadata(dir.path().join("new")).unwrap();
        assert_eq!(mode(false), new.permissions().mode() & 0o777);
    }

    #[test]
    fn a_file_with_a_name_of_its_own_is_put_in_place_and_removed_alike() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        let mut outputs = stage(&[(&target, "unnamed")]);
        let (file, temp) = {
            let mut builder = tempfile::Builder::new();
            builder
                .prefix(PREFIX)
                .tempfile_in(dir.path())
                .unwrap()
                .into_parts()
        };
        outputs.files[0].file = file;
        outputs.files[0].temp = Some(temp);
        outputs.get(0).write_all_at(b"named", 0).unwrap();
        assert_eq!(files(dir.path()).len(), 1);
        outputs.replace_targets().unwrap();
        assert_eq!(files(dir.path()), expected(&[("a", "named")]));
    }

    #[test]
    #[cfg(target_os = "linux")]
    fn an_output_has_no_name_before_it_takes_its_place() {
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("a");
        let outputs = stage(&[(&target, "a1")]);
        assert_eq!(files(dir.path()), []);
        outputs.replace_targets().unwrap();
        assert_eq!(files(dir.path()), expected(&[("a", "a1")]));
    }
}
