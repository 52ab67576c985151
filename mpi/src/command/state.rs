//! The outer state of a round: a rank's share of it as it was, and as it will be.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Result, ensure};
use wgpu_optim::files::{Header, TensorEntry};
use wgpu_optim::rules::Slot;
use wgpu_optim::state::{SlotEntry, StateRecord};
use wgpu_optim::storage::{Codec, MASTER_PARAMS, PARAMS_REST};
use wgpu_optim::{AnyRule, Rule as _, StorageType};
use wgpu_optim_cli::check_no_groups;
use wgpu_optim_files::{At, Model, NewFile, Outputs, Part, SavedState, SavedTensor};

use super::models::Tensor;
use crate::checkpoint::own_entry;
use crate::shares::Shares;

/// The slots that the rule keeps, and masters where parameters have 16 bits.
pub struct State {
    pub slots: Vec<Slot>,
    pub before: Option<SavedState>,
    /// The entry of each tensor.
    pub tensors: Vec<TensorState>,
    pub record: StateRecord,
}

pub struct TensorState {
    /// The tensor's slots, as the round before has left them.
    pub saved: SavedTensor,
    /// The places of this rank's share of the slots and, behind them, of the masters.
    pub out: Vec<Part>,
}

/// Opens the state of the round before.
pub fn open_saved(path: &Path) -> Result<SavedState> {
    let saved = SavedState::new(Model::open_one_by_one(path)?)?;
    check_no_groups(&saved.files)?;
    Ok(saved)
}

impl State {
    /// The state of the round after this one, if there was one.
    pub fn after(before: Option<SavedState>, config: AnyRule, tensors: &[Tensor]) -> Result<Self> {
        let slots: Vec<_> = config.slots().kept().copied().collect();
        if let Some(before) = &before {
            let (expected, actual) = (config.state_kind(), before.record.config.state_kind());
            ensure!(
                actual == expected && before.record.state_kinds.is_empty(),
                "the state was made by the {actual} form, expected {expected}"
            );
            for name in before.record.applied_steps.keys() {
                ensure!(
                    tensors
                        .binary_search_by(|tensor| tensor.name.cmp(name))
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
            let steps = state.saved.applied_steps.saturating_add(1);
            (tensor.name.clone(), steps)
        });
        Ok(Self {
            record: StateRecord {
                config,
                steps: steps.saturating_add(1),
                applied_steps: applied_steps.collect(),
                state_kinds: BTreeMap::new(),
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
            let elems = shares.of_tensor(rank, index);
            let masters = (tensor.of != StorageType::F32).then_some(MASTER_PARAMS);
            let slots = self.slots.iter().map(|slot| slot.name).chain(masters);
            for slot in slots {
                let name = SlotEntry::name(&tensor.name, slot)?;
                if let Some(entry) = own_entry(name, &tensor.shape, &elems, Codec::F32, rank) {
                    names.push((index, elems.clone(), entry.0.clone()));
                    entries.push(entry);
                }
            }
        }
        let header = Header::new(self.record.to_metadata()?, entries)?;
        let role = format!("--out-state ({})", target.display());
        let new = NewFile::new(target, &role, &header)?;
        let file = outputs.stage_new(&new)?;
        let place = |entry: &TensorEntry| {
            let offset = new.start.len() as u64 + entry.data_bytes.start;
            (entry.name.clone(), At { file, offset })
        };
        let places: BTreeMap<_, _> = header.tensors().iter().map(place).collect();
        for (tensor, elems, name) in names {
            let at = places[&name];
            let codec = Codec::F32;
            self.tensors[tensor].out.push(Part { elems, at, codec });
        }
        Ok(header)
    }
}

impl TensorState {
    fn of(tensor: &Tensor, before: Option<&SavedState>, slots: &[Slot]) -> Result<Self> {
        let Tensor {
            name, shape, of, ..
        } = tensor;
        let saved = match before {
            Some(before) => before.of_tensor(name, shape, *of, slots)?,
            None => SavedTensor::default(),
        };
        ensure!(
            saved.rests.is_none(),
            "tensor {name:?}: the state holds its {PARAMS_REST}, which this round does not keep"
        );
        Ok(Self {
            saved,
            out: Vec::new(),
        })
    }
}
