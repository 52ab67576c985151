//! Classes of tensors, which share the dispatches of a step.

use std::collections::{HashMap, HashSet};
use std::hash::Hash;

use crate::gpu::bound::Bound;
use crate::plan::{Chunk, Chunked, Dispatch, Plan, Target};

/// The dispatches of a step. Tensors share one if they are of one class: if they have the same key now.
#[derive(Debug)]
pub(super) struct Classes<K> {
    classes: Vec<Class<K>>,
    /// Each with the index of its class.
    dispatches: Vec<(Dispatch, usize)>,
    /// The chunks of the dispatches that are in chunks, each with the index of its class.
    chunks: Vec<Chunk<usize>>,
    /// The revision of the tensors that they have been made of, and where they may be in chunks.
    revision: Option<(u64, Chunked)>,
    /// Reused, so that a step allocates nothing.
    order: Vec<usize>,
}

#[derive(Debug)]
struct Class<K> {
    key: K,
    /// A tensor for each progress that tensors of the class have made: who is as far will have the same keys for ever.
    tensors: Vec<usize>,
}

impl<K: Copy + Hash + Ord> Classes<K> {
    /// Classes that are yet to be made.
    pub(super) const fn new() -> Self {
        Self {
            classes: Vec::new(),
            dispatches: Vec::new(),
            chunks: Vec::new(),
            revision: None,
            order: Vec::new(),
        }
    }

    /// Makes sure that the classes are those of the next step, by the keys that tensors have now; those without one are
    /// left out. Dispatches are made anew only where tensors meet or part, or where they have changed otherwise than by a
    /// step and are of another `revision`.
    pub(super) fn refresh<P: Hash + Eq>(
        &mut self,
        revision: u64,
        plan: &Plan,
        tensors: usize,
        chunked: Chunked,
        key_of: impl Fn(usize) -> Option<K>,
        progress_of: impl Fn(usize) -> P,
    ) -> bool {
        let revision = Some((revision, chunked));
        if self.revision == revision && self.advance(&key_of) {
            return false;
        }
        let mut index_of = HashMap::new();
        let mut seen = HashSet::new();
        self.classes.clear();
        let mut class_of = |tensor: usize| {
            let key = key_of(tensor)?;
            let class = *index_of.entry(key).or_insert_with(|| {
                self.classes.push(Class {
                    key,
                    tensors: Vec::new(),
                });
                self.classes.len() - 1
            });
            if seen.insert((class, progress_of(tensor))) {
                self.classes[class].tensors.push(tensor);
            }
            Some(class)
        };
        let of_tensors: Vec<_> = (0..tensors).map(&mut class_of).collect();
        let class_of = |tensor: usize| of_tensors[tensor];
        (self.dispatches, self.chunks) = plan.dispatches_by(chunked, class_of);
        self.revision = revision;
        true
    }

    /// Gives each class the key that its tensors have now. Returns whether tensors that were of one class still are, and of
    /// different ones, too.
    fn advance(&mut self, key_of: &impl Fn(usize) -> Option<K>) -> bool {
        let mut has_changed = false;
        for class in &mut self.classes {
            let mut keys = class.tensors.iter().map(|tensor| key_of(*tensor));
            let Some(Some(key)) = keys.next() else {
                return false;
            };
            if keys.any(|other| other != Some(key)) {
                return false;
            }
            has_changed |= class.key != key;
            class.key = key;
        }
        if !has_changed || self.classes.len() < 2 {
            return true;
        }
        let classes = &self.classes;
        self.order.clear();
        self.order.extend(0..classes.len());
        self.order.sort_unstable_by_key(|class| classes[*class].key);
        let mut pairs = self.order.windows(2);
        pairs.all(|pair| classes[pair[0]].key != classes[pair[1]].key)
    }

    /// Puts dispatches in an order in which each pipeline is set once; batches come by group already.
    pub(super) fn sort_by_pipeline(&mut self, bound: &Bound, group_of: impl Fn(&K) -> usize) {
        let classes = &self.classes;
        self.dispatches
            .sort_by_key(|(dispatch, class)| match dispatch.target {
                Target::Piece(piece) => {
                    let group = group_of(&classes[*class].key);
                    Some((dispatch.access, group, bound.kind_of(piece)))
                }
                Target::Batch { .. } => None,
            });
    }

    /// The dispatches, each with the index of its class.
    pub(super) fn dispatches(&self) -> &[(Dispatch, usize)] {
        &self.dispatches
    }

    /// The chunks of those that are in chunks.
    pub(super) fn chunks(&self) -> &[Chunk<usize>] {
        &self.chunks
    }

    /// The number of classes.
    pub(super) fn len(&self) -> usize {
        self.classes.len()
    }

    /// The key that the tensors of a class have in common.
    pub(super) fn key(&self, class: usize) -> &K {
        &self.classes[class].key
    }

    /// One of the tensors of a class.
    pub(super) fn tensor(&self, class: usize) -> usize {
        self.classes[class].tensors[0]
    }

    /// Every class, with one of its tensors.
    pub(super) fn iter(&self) -> impl Iterator<Item = (&K, usize)> {
        (0..self.len()).map(|class| (self.key(class), self.tensor(class)))
    }
}
