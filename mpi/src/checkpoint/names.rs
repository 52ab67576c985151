//! The names of the files of a sharded state, and its index.

use std::collections::HashSet;
use std::fs;
use std::path::Path;

use wgpu_optim::files::{Header, Index};
use wgpu_optim_files::{FileError, Outputs, directory_of, is_index, read_index};

use crate::error::ShardError;
use crate::ranks::Ranks;

/// The metadata of an index that count how often it has been written.
const GENERATION: &str = "generation";

/// The names of the files of a sharded state: that of its index, less its ending, and what no other generation has. So no
/// two indices share them.
pub(crate) struct Names {
    stem: String,
    generation: u64,
    ranks: usize,
}

impl Names {
    /// Names that no index in the folder has, the same on all ranks. Collective.
    ///
    /// # Errors
    /// [`ShardError`] if `index` cannot be written: it is the index of something else, or not named as one.
    pub(crate) fn agreed(ranks: &Ranks, index: &Path) -> Result<Self, ShardError> {
        let name = index.file_name().unwrap_or_default().to_string_lossy();
        let stem = name.strip_suffix(".json").filter(|stem| !stem.is_empty());
        let mut names = Self {
            stem: stem.unwrap_or_default().to_owned(),
            generation: 1,
            ranks: ranks.size(),
        };
        let last = match (stem, ranks.rank()) {
            (None, _) => Err(ShardError::IndexName {
                path: index.to_owned(),
            }),
            (Some(_), 0) => LastIndex::read(index),
            _ => Ok(None),
        };
        if let Some(last) = ranks.all_well(last)? {
            names.generation = last.generation.saturating_add(1);
        }
        if ranks.rank() == 0 {
            let taken = named_by_others(index);
            let is_taken =
                |names: &Self| (0..names.ranks).any(|rank| taken.contains(&names.of(rank)));
            while is_taken(&names) {
                names.generation = names.generation.saturating_add(1);
            }
        }
        let mut generations = ranks.gather_numbers(names.generation);
        names.generation = generations.next().unwrap_or(names.generation);
        Ok(names)
    }

    /// The name of a rank's file.
    pub(crate) fn of(&self, rank: usize) -> String {
        let Self {
            stem,
            generation,
            ranks,
        } = self;
        format!(
            "{stem}-{generation:06}-{:05}-of-{ranks:05}.safetensors",
            rank + 1
        )
    }

    /// Makes sure that the first rank sees every rank's file beside the index: an index of files that nobody else can see
    /// would take the place of one whose files are there. Collective; `own` is this rank's file, which is on disk.
    pub(crate) fn check_seen(
        &self,
        ranks: &Ranks,
        index: &Path,
        own: &Path,
    ) -> Result<(), ShardError> {
        let bytes = fs::metadata(own).map(|own| own.len());
        let bytes = bytes.map_err(FileError::io("read", own));
        let bytes = ranks.all_well(bytes.map_err(ShardError::from))?;
        let mut sizes = ranks.gather_numbers(bytes).enumerate();
        let seen = match ranks.rank() {
            0 => sizes.try_for_each(|(rank, expected_bytes)| {
                let path = index.with_file_name(self.of(rank));
                match fs::metadata(&path) {
                    Ok(seen) if seen.len() == expected_bytes => Ok(()),
                    _ => Err(ShardError::NotShared { rank, path }),
                }
            }),
            _ => Ok(()),
        };
        ranks.all_well(seen)
    }

    /// Puts an index of all ranks' files in place of the one before, and removes the files of that. Collective; all files
    /// have been [seen](Self::check_seen).
    pub(crate) fn replace_index(
        &self,
        ranks: &Ranks,
        path: &Path,
        own: &Header,
    ) -> Result<(), ShardError> {
        let own_names = own.tensors().iter().map(|tensor| tensor.name.as_str());
        let names = ranks.gather_lists(own_names)?;
        let total = ranks.gather_numbers(own.data_len()).sum();
        let replaced = match ranks.rank() {
            0 => {
                let weight_map = names.into_iter().enumerate().flat_map(|(rank, names)| {
                    let named = move |name| (name, self.of(rank));
                    names.into_iter().map(named)
                });
                LastIndex::read(path).and_then(|last| {
                    self.write_index(path, weight_map.collect(), &own.metadata, total)?;
                    Ok(last)
                })
            }
            _ => Ok(None),
        };
        let last = ranks.all_well(replaced)?;
        if ranks.rank() == 0 {
            let last = last.map_or_else(Vec::new, |last| last.files);
            self.remove_others(path, last);
        }
        Ok(())
    }

    fn write_index(
        &self,
        path: &Path,
        weight_map: Vec<(String, String)>,
        metadata: &[(String, String)],
        total_size: u64,
    ) -> Result<(), ShardError> {
        let mut index = Index::new(weight_map).map_err(FileError::content(path))?;
        index.metadata = metadata.to_vec();
        let generation = self.generation.to_string();
        index.metadata.push((GENERATION.to_owned(), generation));
        let json = index.to_bytes(total_size);
        let json = json.map_err(FileError::content(path))?;
        let mut outputs = Outputs::default();
        let output = outputs.stage("the index", path)?;
        outputs.get(output).write_all_at(&json, 0)?;
        outputs.replace_targets()?;
        Ok(())
    }

    /// Removes the files that the index before has named, and what generations have left that were never finished; not
    /// what another index names, too.
    fn remove_others(&self, index: &Path, last: Vec<String>) {
        let entries = fs::read_dir(directory_of(index))
            .into_iter()
            .flatten()
            .flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        let unfinished = names.filter(|name| self.is_a_generation(name));
        let mut kept = named_by_others(index);
        kept.extend((0..self.ranks).map(|rank| self.of(rank)));
        for name in last.into_iter().chain(unfinished) {
            // What is left is in nobody's way.
            if !kept.contains(&name) {
                let _ = fs::remove_file(index.with_file_name(name));
            }
        }
    }

    /// Whether a file has the name of a rank's, of this generation or another one.
    fn is_a_generation(&self, name: &str) -> bool {
        let rest = name.strip_prefix(&*self.stem);
        let rest = rest.and_then(|rest| rest.strip_suffix(".safetensors"));
        let parts: Vec<_> = rest.unwrap_or_default().split('-').collect();
        let is_number = |text: &str, digits| {
            text.len() >= digits && text.bytes().all(|byte| byte.is_ascii_digit())
        };
        match parts[..] {
            ["", generation, rank, "of", ranks] => {
                is_number(generation, 6) && is_number(rank, 5) && is_number(ranks, 5)
            }
            _ => false,
        }
    }
}

/// The index of a state that is to be replaced, as far as it reads.
struct LastIndex {
    /// The number of times that it has been written; 0 where nobody has counted.
    generation: u64,
    files: Vec<String>,
}

impl LastIndex {
    /// Reads the index at a path; `None` if there is none.
    fn read(path: &Path) -> Result<Option<Self>, ShardError> {
        if !fs::exists(path).map_err(FileError::io("read", path))? {
            return Ok(None);
        }
        let (index, _) = read_index(path)?;
        let said = |key: &str| {
            let entry = index.metadata.iter().find(|(known, _)| known == key);
            entry.map(|(_, value)| value.as_str())
        };
        // What every state says of itself, and no model.
        let keys = ["format_version", "applied_steps"];
        if keys.into_iter().any(|key| said(key).is_none()) {
            return Err(ShardError::NotAState {
                path: path.to_owned(),
            });
        }
        let generation = said(GENERATION).and_then(|generation| generation.parse().ok());
        Ok(Some(Self {
            generation: generation.unwrap_or(0),
            files: index.shards().to_vec(),
        }))
    }
}

/// The files that the other indices in the folder of an index name.
fn named_by_others(index: &Path) -> HashSet<String> {
    let entries = fs::read_dir(directory_of(index))
        .into_iter()
        .flatten()
        .flatten();
    let others = entries.filter(|entry| Some(&*entry.file_name()) != index.file_name());
    let paths = others.map(|entry| entry.path());
    let indices = paths.filter(|path| is_index(path) && path.is_file());
    let indices = indices.filter_map(|path| read_index(&path).ok());
    indices
        .flat_map(|(index, _)| index.shards().to_vec())
        .collect()
}
