//! The shares of a model: the elements of which each rank keeps the state.

use std::ops::Range;

pub use wgpu_optim_files::window::Slice;

/// Elements that a share starts on a multiple of, counted in the tensor that it starts in: loads of 16 bytes are then
/// aligned, whatever the elements are stored as.
pub const ALIGN_ELEMS: u64 = 8;

/// All elements of all tensors, one after the other, cut into a share for each rank.
///
/// Shares are of one size, but for what [`ALIGN_ELEMS`] moves their starts by; a tensor may lie in several, and a rank may
/// have none of it.
///
/// ```
/// use wgpu_optim_mpi::{Shares, Slice};
///
/// let shares = Shares::new(&[30, 3], 2);
/// let slices: Vec<_> = shares.slices(shares.of(1)).collect();
/// assert_eq!(slices, [Slice { tensor: 0, elems: 16..30 }, Slice { tensor: 1, elems: 0..3 }]);
/// ```
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Shares {
    /// The starts of the tensors among all elements, and the end of the last one.
    starts: Vec<u64>,
    /// The starts of the ranks' shares among all elements, and the end of the last one.
    cuts: Vec<u64>,
}

impl Shares {
    /// The shares of tensors with so many elements each, for so many ranks (one at least).
    #[must_use]
    pub fn new(numels: &[u64], ranks: usize) -> Self {
        let mut starts = vec![0];
        let mut numel = 0_u64;
        for tensor in numels {
            numel = numel.saturating_add(*tensor);
            starts.push(numel);
        }
        let mut shares = Self {
            starts,
            cuts: Vec::new(),
        };
        let ranks = ranks.max(1);
        let cut = |rank: usize| {
            let even = u128::from(numel) * rank as u128 / ranks as u128;
            shares.aligned(even as u64)
        };
        shares.cuts = (0..=ranks).map(cut).collect();
        shares
    }

    /// The number of ranks that have a share.
    #[must_use]
    pub fn ranks(&self) -> usize {
        self.cuts.len() - 1
    }

    /// The share of a rank, as a range of all elements.
    #[must_use]
    pub fn of(&self, rank: usize) -> Range<u64> {
        self.cuts[rank]..self.cuts[rank + 1]
    }

    /// Elements of the largest share.
    #[must_use]
    pub fn largest(&self) -> u64 {
        let shares = (0..self.ranks()).map(|rank| self.of(rank));
        shares
            .map(|share| share.end - share.start)
            .max()
            .unwrap_or(0)
    }

    /// Part number `index` of a rank's share, if it is cut into parts of about so many elements (a multiple of
    /// [`ALIGN_ELEMS`]); empty where the share has fewer parts.
    pub(crate) fn part(&self, rank: usize, index: u64, elems: u64) -> Range<u64> {
        let share = self.of(rank);
        let cut = |index: u64| {
            let even = share.start.saturating_add(index.saturating_mul(elems));
            match even < share.end {
                true => self.aligned(even).max(share.start),
                false => share.end,
            }
        };
        cut(index)..cut(index + 1)
    }

    /// The tensors' elements in a range of all elements; no slice is empty.
    pub fn slices(&self, range: Range<u64>) -> impl Iterator<Item = Slice> + '_ {
        let first = self.tensor_of(range.start);
        let tensors = first..self.starts.len() - 1;
        tensors
            .take_while({
                let end = range.end;
                move |tensor| self.starts[*tensor] < end
            })
            .filter_map(move |tensor| {
                let start = self.starts[tensor];
                let from = range.start.max(start);
                let to = range.end.min(self.starts[tensor + 1]);
                (from < to).then(|| Slice {
                    tensor,
                    elems: from - start..to - start,
                })
            })
    }

    /// The elements of a tensor that a rank has.
    #[must_use]
    pub fn of_tensor(&self, rank: usize, tensor: usize) -> Range<u64> {
        let share = self.of(rank);
        let (start, end) = (self.starts[tensor], self.starts[tensor + 1]);
        let place = |elem: u64| elem.clamp(start, end) - start;
        place(share.start)..place(share.end)
    }

    /// The tensor that an element lies in, or the last one.
    fn tensor_of(&self, elem: u64) -> usize {
        self.starts[1..].partition_point(|end| *end <= elem)
    }

    /// The element at or before this one that lies on [`ALIGN_ELEMS`] in its tensor.
    fn aligned(&self, elem: u64) -> u64 {
        let start = self.starts[self.tensor_of(elem)];
        start + (elem - start) / ALIGN_ELEMS * ALIGN_ELEMS
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    /// Every element in one share and one part, in order, on alignment; shares within a step of alignment of even ones.
    #[test]
    fn shares_and_their_parts_hold_every_element_once() {
        let mut random = fastrand::Rng::with_seed(14);
        for _ in 0..400 {
            let ranks = random.usize(1..9);
            let numels: Vec<u64> = (0..random.usize(0..6))
                .map(|_| match random.u8(0..4) {
                    0 => 0,
                    1 => random.u64(1..4),
                    _ => random.u64(1..200),
                })
                .collect();
            let shares = Shares::new(&numels, ranks);
            let all: Vec<(usize, u64)> = numels
                .iter()
                .enumerate()
                .flat_map(|(tensor, numel)| (0..*numel).map(move |elem| (tensor, elem)))
                .collect();
            let part_elems = ALIGN_ELEMS * random.u64(1..4);
            let mut seen = Vec::new();
            for rank in 0..ranks {
                let share = shares.of(rank);
                let even = all.len() as f64 / ranks as f64;
                let numel = (share.end - share.start) as f64;
                assert!((numel - even).abs() <= ALIGN_ELEMS as f64, "{numels:?}");
                let in_share = seen.len();
                for part in 0..shares.largest().div_ceil(part_elems) + 1 {
                    for slice in shares.slices(shares.part(rank, part, part_elems)) {
                        assert!(slice.elems.start % ALIGN_ELEMS == 0 && slice.numel() > 0);
                        seen.extend(slice.elems.map(|elem| (slice.tensor, elem)));
                    }
                }
                let of_tensors: Vec<_> = (0..numels.len())
                    .flat_map(|tensor| {
                        let elems = shares.of_tensor(rank, tensor);
                        elems.map(move |elem| (tensor, elem))
                    })
                    .collect();
                assert_eq!(
                    seen[in_share..],
                    of_tensors,
                    "{numels:?}, rank {rank} of {ranks}"
                );
            }
            assert_eq!(seen, all, "{numels:?} among {ranks}");
        }
    }

    #[test]
    fn numbers_of_any_size_are_cut() {
        let shares = Shares::new(&[u64::MAX / 2, 70], 512);
        assert_eq!(shares.of(511).end, u64::MAX / 2 + 70);
        assert_eq!(shares.slices(shares.of(511)).last().unwrap().elems, 0..70);
    }
}
