//! Messages between ranks beside gradients and parameters: whether they agree, and whether all is well.

use std::cell::Cell;
use std::fmt::Display;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};

use mpi::datatype::{Partition, PartitionMut};
use mpi::topology::SimpleCommunicator;
use mpi::traits::*;

use crate::error::ShardError;

/// Bytes that a rank has exchanged with others. What it gives itself goes over no wire and does not count.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Traffic {
    /// Bytes sent to other ranks.
    pub sent: u64,
    /// Bytes received from other ranks.
    pub received: u64,
}

/// The terms that ranks have to agree about: names of things, and what they are here.
#[derive(Clone, Debug, Default)]
pub(crate) struct Terms(Vec<(String, String)>);

impl Terms {
    pub(crate) fn add(&mut self, what: impl Into<String>, value: impl Into<String>) {
        self.0.push((what.into(), value.into()));
    }

    fn digest(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.0.hash(&mut hasher);
        hasher.finish()
    }

    /// The terms as bytes: each name and value behind its length.
    fn to_bytes(&self) -> Vec<u8> {
        let texts = self.0.iter().flat_map(|(what, value)| [what, value]);
        texts
            .flat_map(|text| {
                let len = text.len() as u64;
                len.to_le_bytes().into_iter().chain(text.bytes())
            })
            .collect()
    }

    fn from_bytes(mut bytes: &[u8]) -> Self {
        let mut text = || {
            let (len, rest) = bytes.split_first_chunk()?;
            let len = (u64::from_le_bytes(*len) as usize).min(rest.len());
            let (text, rest) = rest.split_at(len);
            bytes = rest;
            Some(String::from_utf8_lossy(text).into_owned())
        };
        let mut terms = Self::default();
        while let Some((what, value)) = text().zip(text()) {
            terms.add(what, value);
        }
        terms
    }

    /// The first thing that differs from the terms of the first rank, and what it is there and here.
    fn difference(&self, first: &Self) -> Option<(String, String, String)> {
        const NOTHING: &str = "nothing";
        let mut pairs = self.0.iter().zip(&first.0);
        if let Some((own, theirs)) = pairs.find(|(own, theirs)| own != theirs) {
            return Some(match own.0 == theirs.0 {
                true => (own.0.clone(), theirs.1.clone(), own.1.clone()),
                false => (theirs.0.clone(), theirs.1.clone(), NOTHING.to_owned()),
            });
        }
        let len = self.0.len().min(first.0.len());
        match (self.0.get(len), first.0.get(len)) {
            (Some((what, own)), _) => Some((what.clone(), NOTHING.to_owned(), own.clone())),
            (_, Some((what, theirs))) => Some((what.clone(), theirs.clone(), NOTHING.to_owned())),
            (None, None) => None,
        }
    }
}

/// The exit code of a program that has panicked.
const PANICKED: i32 = 101;

/// No bytes, at an address. That of an empty vector is 1, which Open MPI takes for `MPI_IN_PLACE`.
static NOTHING: &[u8] = [0].split_at(1).1;

/// The ranks of a communicator of our own, so that nobody else's messages are taken for ours.
pub(crate) struct Ranks {
    communicator: SimpleCommunicator,
    traffic: Cell<Traffic>,
}

/// The partition of a buffer of bytes among ranks.
pub(crate) struct Counts {
    pub(crate) counts: Vec<i32>,
    starts: Vec<i32>,
}

impl Counts {
    /// Gathers so many bytes of each rank, all of which together have to fit into an MPI count.
    pub(crate) fn new(bytes: impl IntoIterator<Item = usize>) -> Result<Self, ShardError> {
        let (mut counts, mut starts, mut end) = (Vec::new(), Vec::new(), 0_i32);
        for bytes in bytes {
            let too_large = || ShardError::TooLarge { bytes };
            let count = i32::try_from(bytes).map_err(|_| too_large())?;
            counts.push(count);
            starts.push(end);
            end = end.checked_add(count).ok_or_else(too_large)?;
        }
        Ok(Self { counts, starts })
    }

    /// All bytes.
    pub(crate) fn total(&self) -> usize {
        let last = self.starts.last().zip(self.counts.last());
        last.map_or(0, |(start, count)| (start + count) as usize)
    }

    /// The bytes of one rank.
    pub(crate) fn of<'b>(&self, rank: usize, bytes: &'b [u8]) -> &'b [u8] {
        let start = self.starts[rank] as usize;
        &bytes[start..start + self.counts[rank] as usize]
    }
}

impl Ranks {
    /// Collective: every rank of the communicator makes its own.
    pub(crate) fn new(communicator: &impl Communicator) -> Self {
        Self {
            communicator: communicator.duplicate(),
            traffic: Cell::default(),
        }
    }

    pub(crate) fn rank(&self) -> usize {
        self.communicator.rank() as usize
    }

    pub(crate) fn size(&self) -> usize {
        self.communicator.size() as usize
    }

    pub(crate) fn traffic(&self) -> Traffic {
        self.traffic.get()
    }

    fn count(&self, sent: usize, received: usize) {
        let Traffic {
            sent: sent_before,
            received: received_before,
        } = self.traffic.get();
        self.traffic.set(Traffic {
            sent: sent_before + sent as u64,
            received: received_before + received as u64,
        });
    }

    /// Everybody's bytes, as many of each, in the order of the ranks.
    pub(crate) fn gather<const N: usize>(&self, own: [u8; N]) -> Vec<[u8; N]> {
        let others = self.size() - 1;
        self.count(N * others, N * others);
        let mut all = vec![0; N * self.size()];
        self.communicator.all_gather_into(&own[..], &mut all[..]);
        all.as_chunks().0.to_vec()
    }

    /// Everybody's number, in the order of the ranks.
    pub(crate) fn gather_numbers(&self, own: u64) -> impl ExactSizeIterator<Item = u64> + use<> {
        let all = self.gather(own.to_le_bytes()).into_iter();
        all.map(u64::from_le_bytes)
    }

    /// Everybody's bytes, as many as each has.
    fn gather_bytes(&self, own: &[u8]) -> Result<Vec<Vec<u8>>, ShardError> {
        let lens = self.gather_numbers(own.len() as u64);
        let counts = Counts::new(lens.map(|len| len as usize))?;
        let mut all = vec![0; counts.total()];
        self.gather_while(own, &mut all, &counts, || ());
        let ranks = 0..self.size();
        Ok(ranks.map(|rank| counts.of(rank, &all).to_vec()).collect())
    }

    /// Everybody's list of texts.
    pub(crate) fn gather_lists<'t>(
        &self,
        own: impl Iterator<Item = &'t str>,
    ) -> Result<Vec<Vec<String>>, ShardError> {
        let mut terms = Terms::default();
        own.for_each(|text| terms.add(text, ""));
        let lists = self.gather_bytes(&terms.to_bytes())?.into_iter();
        let texts = |bytes: Vec<u8>| Terms::from_bytes(&bytes).0.into_iter();
        Ok(lists
            .map(|bytes| texts(bytes).map(|(text, _)| text).collect())
            .collect())
    }

    /// Everybody's text.
    fn gather_texts(&self, own: &str) -> Result<Vec<String>, ShardError> {
        let texts = self.gather_bytes(own.as_bytes())?.into_iter();
        Ok(texts
            .map(|text| String::from_utf8_lossy(&text).into_owned())
            .collect())
    }

    /// The first rank's bytes.
    fn broadcast(&self, mut own: Vec<u8>) -> Vec<u8> {
        let len = u64::from_le_bytes(self.gather((own.len() as u64).to_le_bytes())[0]);
        own.resize(len as usize, 0);
        match self.rank() {
            0 => self.count(own.len() * (self.size() - 1), 0),
            _ => self.count(0, own.len()),
        }
        self.communicator
            .process_at_rank(0)
            .broadcast_into(&mut own[..]);
        own
    }

    /// Gives every rank this one's bytes, and takes theirs; `meanwhile` runs while they are under way.
    pub(crate) fn gather_while<T>(
        &self,
        own: &[u8],
        all: &mut [u8],
        counts: &Counts,
        meanwhile: impl FnOnce() -> T,
    ) -> T {
        self.count(own.len() * (self.size() - 1), counts.total() - own.len());
        let own = if own.is_empty() { NOTHING } else { own };
        let mut nothing = [0];
        let all = match all {
            [] => &mut nothing[1..],
            all => all,
        };
        let mut all = PartitionMut::new(all, &counts.counts[..], &counts.starts[..]);
        mpi::request::scope(|scope| {
            let request = self
                .communicator
                .immediate_all_gather_varcount_into(scope, own, &mut all);
            let done = meanwhile();
            request.wait_without_status();
            done
        })
    }

    /// Gives each rank its part of `own`, and takes every rank's part for this one; `meanwhile` runs while they are under
    /// way.
    pub(crate) fn exchange_while<T>(
        &self,
        own: &[u8],
        to: &Counts,
        others: &mut [u8],
        from: &Counts,
        meanwhile: impl FnOnce() -> T,
    ) -> T {
        let mine = to.counts[self.rank()] as usize;
        self.count(to.total() - mine, from.total() - mine);
        let own = if own.is_empty() { NOTHING } else { own };
        let mut nothing = [0];
        let others = match others {
            [] => &mut nothing[1..],
            others => others,
        };
        let own = Partition::new(own, &to.counts[..], &to.starts[..]);
        let mut others = PartitionMut::new(others, &from.counts[..], &from.starts[..]);
        mpi::request::scope(|scope| {
            let request =
                self.communicator
                    .immediate_all_to_all_varcount_into(scope, &own, &mut others);
            let done = meanwhile();
            request.wait_without_status();
            done
        })
    }

    /// Makes sure that all is well on every rank.
    ///
    /// # Errors
    /// This rank's own, or that of the first rank that has one.
    pub(crate) fn all_well<T, E>(&self, own: Result<T, E>) -> Result<T, E>
    where
        E: From<ShardError> + Display,
    {
        let failed = self.gather([u8::from(own.is_err())]);
        let Some(first) = failed.iter().position(|failed| *failed != [0]) else {
            return own;
        };
        let message = own.as_ref().err().map(ToString::to_string);
        let messages = self.gather_texts(message.as_deref().unwrap_or_default())?;
        Err(match own {
            Err(own) => own,
            Ok(_) => ShardError::Rank {
                rank: first,
                message: messages[first].clone(),
            }
            .into(),
        })
    }

    /// Makes sure that all is well on every rank, and that all ranks mean the same.
    ///
    /// # Errors
    /// As [`all_well`](Self::all_well), and [`ShardError::Disagreement`] on every rank where two differ.
    pub(crate) fn agree<E>(&self, terms: Result<&Terms, E>) -> Result<(), E>
    where
        E: From<ShardError> + Display,
    {
        let terms = self.all_well(terms)?;
        let digests = self.gather(terms.digest().to_le_bytes());
        if digests.iter().all(|digest| *digest == digests[0]) {
            return Ok(());
        }
        let first = Terms::from_bytes(&self.broadcast(terms.to_bytes()));
        let difference = terms.difference(&first);
        let [what, on_first, here] = difference.map_or_else(Default::default, <[_; 3]>::from);
        let mut columns = Vec::new();
        for text in [what, on_first, here] {
            columns.push(self.gather_texts(&text)?.into_iter());
        }
        let [whats, on_first, here] = &mut columns[..] else {
            return Ok(());
        };
        let mut differences = whats.zip(on_first.zip(here)).enumerate();
        match differences.find(|(_, (what, _))| !what.is_empty()) {
            Some((rank, (what, (on_first, here)))) => Err(ShardError::Disagreement {
                rank,
                what,
                expected: on_first,
                actual: here,
            }
            .into()),
            None => Ok(()),
        }
    }
}

impl Drop for Ranks {
    /// A rank that panics will never come to where the others wait for it, so it ends them.
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.communicator.abort(PANICKED);
        }
    }
}

impl std::fmt::Debug for Ranks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Ranks")
            .field("rank", &self.rank())
            .field("size", &self.size())
            .field("traffic", &self.traffic())
            .finish()
    }
}
