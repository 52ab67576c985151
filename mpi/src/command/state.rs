//! The outer state of a round: a rank's share of it as it was, and as it will be.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context as _, Result, bail, ensure};
use wgpu_optim::files::Header;
use wgpu_optim::storage::MASTER_PARAMS;
use wgpu_optim::{AnyRule, Rule as _, Slot, SlotEntry, StateRecord, StorageType};
use wgpu_optim_cli::files::Outputs;

use super::models::{At, Tensor};
use crate::checkpoint::{Part, SavedState};
use crate::shares::Shares;

/// What the rule keeps, and masters where parameters have 16 bits.
pub struct State {
    pub slots: Vec<Slot>,
    pub before: Option<SavedState<AnyRule>>,
    /// What is known of each tensor.
    pub tensors: Vec<TensorState>,
    pub record: StateRecord,
}

pub struct TensorState {
    /// Applied before this round.
    pub applied_steps: u64,
    /// Whether its slots are there.
    pub has_slots: bool,
    /// Whether its masters are.
    pub has_masters: bool,
    /// Where its slots go in this rank's shard, and behind them its masters: the place of the share's first element.
    pub out: Vec<At>,
}

impl State {
    /// Opens the state of the round before, if there was one.
    pub fn open(path: Option<&Path>, config: AnyRule, tensors: &[Tensor]) -> Result<Self> {
        let before = path.map(SavedState::<AnyRule>::open).transpose()?;
        let slots: Vec<_> = config.slots().kept().copied().collect();
        if let Some(before) = &before {
            let (expected, actual) = (config.meaning(), before.record.config.meaning());
            ensure!(
                actual == expected && before.record.meanings.is_empty(),
                "the state was made by the {actual} form, expected {expected}"
            );
            let named = before.record.applied_steps.keys().map(String::as_str);
            for name in named.chain(before.tensors()) {
                ensure!(
                    tensors
                        .binary_search_by(|tensor| (*tensor.name).cmp(name))
                        .is_ok(),
                    "the state has tensor {name:?}, which the global model has not"
                );
            }
        }
        let steps = before.as_ref().map_or(0, |before| before.record.steps);
        let states = tensors
            .iter()
            .map(|tensor| TensorState::of(tensor, before.as_ref(), &slots))
            .collect::<Result<Vec<_>>>()?;
        let applied_steps = tensors.iter().zip(&states).map(|(tensor, state)| {
            let steps = state.applied_steps.saturating_add(1);
            (tensor.name.clone(), steps)
        });
        Ok(Self {
            record: StateRecord {
                config,
                steps: steps.saturating_add(1),
                applied_steps: applied_steps.collect(),
                meanings: BTreeMap::new(),
                control: before.as_ref().and_then(|before| before.record.control),
            },
            slots,
            before,
            tensors: states,
        })
    }

    /// Makes a rank's shard beside its target. Returns its header.
    pub fn stage(
        &mut self,
        outputs: &mut Outputs,
        target: &Path,
        tensors: &[Tensor],
        (shares, rank): (&Shares, usize),
    ) -> Result<Header> {
        let (mut entries, mut names) = (Vec::new(), Vec::new());
        for (index, tensor) in tensors.iter().enumerate() {
            let part = Part::of(shares.of_tensor(rank, index), &tensor.shape, rank);
            let masters = (tensor.of != StorageType::F32).then_some(MASTER_PARAMS);
            let slots = self.slots.iter().map(|slot| slot.name).chain(masters);
            let mut own = Vec::new();
            for slot in slots.filter(|_| part.is_some()) {
                let name = SlotEntry::name(&tensor.name, slot)?;
                let entry = part.as_ref().map(|part| part.entry(name));
                own.extend(entry.as_ref().map(|(name, ..)| name.clone()));
                entries.extend(entry);
            }
            names.push(own);
        }
        let header = Header::new(self.record.to_metadata()?, entries)?;
        let start = header.to_bytes()?;
        let file = outputs.stage(format!("--out-state ({})", target.display()), target)?;
        outputs.get(file).write_all_at(&start, 0)?;
        let places: BTreeMap<_, _> = header
            .tensors()
            .iter()
            .map(|entry| {
                let offset = start.len() as u64 + entry.data_bytes.start;
                (&*entry.name, At { file, offset })
            })
            .collect();
        for (state, names) in self.tensors.iter_mut().zip(names) {
            let places = names.iter().filter_map(|name| places.get(&**name).copied());
            state.out = places.collect();
        }
        Ok(header)
    }
}

impl TensorState {
    fn of(tensor: &Tensor, before: Option<&SavedState<AnyRule>>, slots: &[Slot]) -> Result<Self> {
        let mut state = Self {
            applied_steps: 0,
            has_slots: false,
            has_masters: false,
            out: Vec::new(),
        };
        let Some(before) = before else {
            return Ok(state);
        };
        let name = &*tensor.name;
        for saved in before.slots_of(name) {
            before.check(name, saved, &tensor.shape)?;
            match saved {
                MASTER_PARAMS if tensor.of != StorageType::F32 => state.has_masters = true,
                _ if slots.iter().any(|slot| slot.name == saved) => state.has_slots = true,
                _ => bail!(
                    "tensor {name:?}: the state holds its {saved}, which this round does not keep"
                ),
            }
        }
        if state.has_slots {
            for slot in slots {
                before
                    .slots_of(name)
                    .find(|saved| *saved == slot.name)
                    .with_context(|| {
                        format!(
                            "tensor {name:?}: the state has no {}, which the rule keeps",
                            slot.name
                        )
                    })?;
            }
        }
        // Slots that are not there start fresh, so the next step is the first.
        if state.has_slots || slots.is_empty() {
            let counted = before.record.applied_steps.get(name);
            state.applied_steps = counted.copied().unwrap_or(0);
        }
        Ok(state)
    }
}
