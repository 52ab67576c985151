//! Gradients and parameters on their way between ranks, bucket by bucket: while one is under way, the last is unpacked and
//! the next is packed.

use std::fmt::Display;
use std::mem;
use std::ops::Range;

use wgpu_optim::StorageType;
use wgpu_optim_files::round::WeightedSum;

use crate::error::ShardError;
use crate::ranks::{Counts, Ranks};
use crate::shares::{ALIGN_ELEMS, Shares, Slice};

/// A model as it is cut into shares, and these into parts. A bucket is a part of every rank's share.
#[derive(Debug)]
pub(crate) struct Buckets {
    pub(crate) shares: Shares,
    pub(crate) tensors: Vec<Stored>,
    part_elems: u64,
}

/// The storage type of a tensor's values, and whether they are exchanged at all.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Stored {
    pub(crate) params: StorageType,
    pub(crate) grads: StorageType,
    pub(crate) is_frozen: bool,
}

/// The memory that holds the whole parameters and gradients of a rank.
pub(crate) trait Memory {
    type Error: From<ShardError> + Display;

    /// Puts the gradients of these slices behind `bytes`, as they are stored.
    fn read_grads(&self, slices: &[Slice], bytes: &mut Vec<u8>) -> Result<(), Self::Error>;

    /// Puts the parameters of these slices behind `bytes`, as they are stored.
    fn read_params(&self, slices: &[Slice], bytes: &mut Vec<u8>) -> Result<(), Self::Error>;

    /// Overwrites the parameters of these slices.
    fn write_params(&mut self, slices: &[Slice], bytes: &[u8]) -> Result<(), Self::Error>;
}

impl Buckets {
    pub(crate) fn new(shares: Shares, tensors: Vec<Stored>, bucket_bytes: u64) -> Self {
        let part_elems = bucket_bytes / 4 / shares.ranks() as u64;
        Self {
            shares,
            tensors,
            part_elems: (part_elems / ALIGN_ELEMS * ALIGN_ELEMS).max(ALIGN_ELEMS),
        }
    }

    /// The most elements that a bucket has of one share.
    pub(crate) const fn max_part_elems(&self) -> u64 {
        self.part_elems + ALIGN_ELEMS
    }

    fn count(&self) -> u64 {
        self.shares.largest().div_ceil(self.part_elems)
    }

    /// The elements of a rank's share in a bucket, but for frozen tensors.
    fn slices(&self, rank: usize, bucket: u64) -> Vec<Slice> {
        let part = self.shares.part(rank, bucket, self.part_elems);
        let slices = self.shares.slices(part);
        slices
            .filter(|slice| !self.tensors[slice.tensor].is_frozen)
            .collect()
    }

    fn grads_bytes(&self, slices: &[Slice]) -> usize {
        let bytes = |slice: &Slice| slice.numel() * self.tensors[slice.tensor].grads.bytes();
        slices.iter().map(bytes).sum::<u64>() as usize
    }

    fn params_bytes(&self, slices: &[Slice]) -> usize {
        let bytes = |slice: &Slice| slice.numel() * self.tensors[slice.tensor].params.bytes();
        slices.iter().map(bytes).sum::<u64>() as usize
    }

    /// Reduce-scatter: `take` gets what the gradients of slices of this rank's share, one after the other, come to over all
    /// ranks. Each rank sends every other what is of its share, and sums what it gets itself.
    ///
    /// # Errors
    /// On every rank where one has failed.
    pub(crate) fn reduce<M: Memory>(
        &self,
        ranks: &Ranks,
        memory: &mut M,
        weights: &WeightedSum,
        staging: &mut Staging,
        take: impl FnMut(&mut M, &[Slice], &[f64]) -> Result<(), M::Error>,
    ) -> Result<(), M::Error> {
        let mut sums = mem::take(&mut staging.sums);
        let flow = Reduce {
            buckets: self,
            ranks,
            memory,
            weights,
            sums: &mut sums,
            take,
        };
        let reduced = drive(self.count(), ranks, staging, flow);
        staging.sums = sums;
        reduced
    }

    /// All-gather: every rank gets the parameters of the others' shares.
    ///
    /// # Errors
    /// On every rank where one has failed; then parameters are of two steps.
    pub(crate) fn gather<M: Memory>(
        &self,
        ranks: &Ranks,
        memory: &mut M,
        staging: &mut Staging,
    ) -> Result<(), M::Error> {
        let flow = Gather {
            buckets: self,
            ranks,
            memory,
        };
        drive(self.count(), ranks, staging, flow)
    }
}

/// Two buckets as they are sent and as they are received, and what gradients come to. Kept from step to step, so that their
/// memory is.
#[derive(Debug, Default)]
pub(crate) struct Staging {
    sent: Vec<u8>,
    next: Vec<u8>,
    received: Vec<u8>,
    last: Vec<u8>,
    sums: Vec<f64>,
}

impl Staging {
    /// The bytes of memory that the staging takes.
    pub(crate) fn bytes(&self) -> usize {
        let buffers = [&self.sent, &self.next, &self.received, &self.last];
        let buffers = buffers.into_iter().map(Vec::capacity);
        buffers.sum::<usize>() + self.sums.capacity() * size_of::<f64>()
    }
}

/// Makes a buffer as long as it has to be, and gives it no more memory than that.
fn resize(buffer: &mut Vec<u8>, len: usize) {
    buffer.reserve_exact(len.saturating_sub(buffer.len()));
    buffer.resize(len, 0);
}

/// The work on each bucket.
trait Flow {
    type Error: From<ShardError> + Display;

    /// Puts what this rank sends of a bucket into `sent`.
    fn pack(&mut self, bucket: u64, sent: &mut Vec<u8>) -> Result<(), Self::Error>;

    /// Takes what this rank has received of a bucket.
    fn unpack(&mut self, bucket: u64, received: &[u8]) -> Result<(), Self::Error>;

    /// The bytes of a bucket that this rank receives from each.
    fn incoming(&self, bucket: u64) -> Vec<usize>;

    /// The bytes of a bucket that this rank sends to each, unless all get the same.
    fn outgoing(&self, bucket: u64) -> Option<Vec<usize>>;
}

/// Exchanges all buckets, one at a time.
fn drive<F: Flow>(
    count: u64,
    ranks: &Ranks,
    staging: &mut Staging,
    mut flow: F,
) -> Result<(), F::Error> {
    let Staging {
        sent,
        next,
        received,
        last,
        ..
    } = staging;
    let mut ready = match count {
        0 => Ok(()),
        _ => flow.pack(0, sent),
    };
    for bucket in 0..count {
        let counts = ready.and_then(|()| {
            let from = Counts::new(flow.incoming(bucket))?;
            let to = flow.outgoing(bucket).map(Counts::new).transpose()?;
            Ok((from, to))
        });
        let (from, to) = ranks.all_well(counts)?;
        resize(received, from.total());
        let meanwhile = || {
            if let Some(before) = bucket.checked_sub(1) {
                flow.unpack(before, last)?;
            }
            match bucket + 1 < count {
                true => flow.pack(bucket + 1, next),
                false => Ok(()),
            }
        };
        ready = match to {
            Some(to) => ranks.exchange_while(sent, &to, received, &from, meanwhile),
            None => ranks.gather_while(sent, received, &from, meanwhile),
        };
        mem::swap(sent, next);
        mem::swap(received, last);
    }
    if let Some(bucket) = count.checked_sub(1) {
        ready = ready.and_then(|()| flow.unpack(bucket, last));
    }
    ranks.all_well(ready)
}

struct Reduce<'a, M, T> {
    buckets: &'a Buckets,
    ranks: &'a Ranks,
    memory: &'a mut M,
    weights: &'a WeightedSum,
    sums: &'a mut Vec<f64>,
    take: T,
}

impl<M, T> Flow for Reduce<'_, M, T>
where
    M: Memory,
    T: FnMut(&mut M, &[Slice], &[f64]) -> Result<(), M::Error>,
{
    type Error = M::Error;

    fn pack(&mut self, bucket: u64, sent: &mut Vec<u8>) -> Result<(), M::Error> {
        let slices = (0..self.ranks.size()).flat_map(|rank| self.buckets.slices(rank, bucket));
        let slices: Vec<_> = slices.collect();
        sent.clear();
        sent.reserve_exact(self.buckets.grads_bytes(&slices));
        self.memory.read_grads(&slices, sent)
    }

    fn unpack(&mut self, bucket: u64, received: &[u8]) -> Result<(), M::Error> {
        let slices = self.buckets.slices(self.ranks.rank(), bucket);
        let size = self.buckets.grads_bytes(&slices);
        self.sums.clear();
        let numel: u64 = slices.iter().map(Slice::numel).sum();
        self.sums.reserve_exact(numel as usize);
        let mut start = 0;
        for slice in &slices {
            let of = self.buckets.tensors[slice.tensor].grads;
            let bytes = (slice.numel() * of.bytes()) as usize;
            let of_ranks: Vec<_> = (0..self.ranks.size())
                .map(|rank| &received[rank * size + start..][..bytes])
                .collect();
            self.weights.sum(of, &of_ranks, self.sums);
            start += bytes;
        }
        (self.take)(self.memory, &slices, self.sums)
    }

    fn incoming(&self, bucket: u64) -> Vec<usize> {
        let own = self.buckets.slices(self.ranks.rank(), bucket);
        vec![self.buckets.grads_bytes(&own); self.ranks.size()]
    }

    fn outgoing(&self, bucket: u64) -> Option<Vec<usize>> {
        let ranks = 0..self.ranks.size();
        let bytes_of = |rank| self.buckets.grads_bytes(&self.buckets.slices(rank, bucket));
        Some(ranks.map(bytes_of).collect())
    }
}

struct Gather<'a, M> {
    buckets: &'a Buckets,
    ranks: &'a Ranks,
    memory: &'a mut M,
}

impl<M: Memory> Flow for Gather<'_, M> {
    type Error = M::Error;

    fn pack(&mut self, bucket: u64, sent: &mut Vec<u8>) -> Result<(), M::Error> {
        let slices = self.buckets.slices(self.ranks.rank(), bucket);
        sent.clear();
        sent.reserve_exact(self.buckets.params_bytes(&slices));
        self.memory.read_params(&slices, sent)
    }

    fn unpack(&mut self, bucket: u64, received: &[u8]) -> Result<(), M::Error> {
        let slices_of = |ranks: Range<usize>| -> Vec<_> {
            let slices = ranks.flat_map(|rank| self.buckets.slices(rank, bucket));
            slices.collect()
        };
        // It has its own already.
        let rank = self.ranks.rank();
        let (before, after) = (slices_of(0..rank), slices_of(rank + 1..self.ranks.size()));
        let before_end = self.buckets.params_bytes(&before);
        let after_start = received.len() - self.buckets.params_bytes(&after);
        self.memory.write_params(&before, &received[..before_end])?;
        self.memory.write_params(&after, &received[after_start..])
    }

    fn incoming(&self, bucket: u64) -> Vec<usize> {
        let ranks = 0..self.ranks.size();
        let bytes_of = |rank| {
            self.buckets
                .params_bytes(&self.buckets.slices(rank, bucket))
        };
        ranks.map(bytes_of).collect()
    }

    fn outgoing(&self, _: u64) -> Option<Vec<usize>> {
        None
    }
}
