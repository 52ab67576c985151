//! What the fuzz targets make of their input, and what has to hold of it: no panic, no output on an error, and
//! whatever is read is written as it was.
//!
//! The first two bytes of an input say how a step runs and what files the rest becomes; the rest is the text of
//! headers and indices, so that a mutated file keeps its length and a corpus can be read.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "a finding is a panic"
)]

mod file;
mod process;
mod round_trip;
mod workspace;

use std::collections::{BTreeMap, BTreeSet};

use wgpu_optim::files::{Dtype, Header, TensorEntry};
use wgpu_optim::rules::AmsGrad;
use wgpu_optim::state::{SlotEntry, StateRecord};
use wgpu_optim::storage::Codec;
use wgpu_optim::{AdamConfig, AnyRule, Rule as _, SgdConfig};

use file::{f32_file, of_text, sections};
use workspace::{Files, Hyper, Workspace, is_of_form};

/// A fuzz target.
pub type Target = fn(&[u8]);

/// Every target with its name, which is also that of its corpus.
pub const TARGETS: [(&str, Target); 4] = [
    ("model_file", model_file),
    ("state_file", state_file),
    ("index", index),
    ("pytorch", pytorch),
];

/// A file as parameters, with gradients for its tensors that a step takes or, by the second byte (`g`), itself as gradients. Other
/// second bytes (`r`, `<`, `>`) are for how it comes of the text.
pub fn model_file(input: &[u8]) {
    let Some((hyper, kind, text)) = split(input) else {
        return;
    };
    let file = of_text(text, kind);
    let header = round_trip::header(&file);
    let grads = header.as_ref().filter(|_| kind != b'g');
    let grads = grads.map(|header| f32_file(stepped_shapes(header.tensors())));
    let workspace = Workspace::new();
    workspace.write("params", &file);
    workspace.write("grads", grads.as_ref().unwrap_or(&file));
    let done = workspace.rounds(&hyper, &FILES);
    assert!(
        header.is_some() || done.is_err(),
        "no file was taken for one"
    );
    if done.is_ok() {
        round_trip::stepped(&file, &workspace.read(&hyper.out(FILES.params)));
    }
    assert!(
        grads.is_none() || !done.is_err_and(is_of_form),
        "a good file was refused"
    );
}

/// A file as state, with parameters for all that it names; by the second byte (`h`) half of them have gradients.
pub fn state_file(input: &[u8]) {
    let Some((mut hyper, kind, text)) = split(input) else {
        return;
    };
    let file = of_text(text, kind);
    let header = round_trip::header(&file);
    let record = header
        .as_ref()
        .and_then(|header| round_trip::state(&file, header));
    let workspace = Workspace::new();
    workspace.write("state", &file);
    let shapes = shapes_of_state(header.iter(), record.iter());
    let every = if kind == b'h' { 2 } else { 1 };
    workspace.write(
        "grads",
        &f32_file(shapes.clone().into_iter().step_by(every)),
    );
    workspace.write("params", &f32_file(shapes));
    if let Some(record) = &record {
        hyper.resume(record);
    }
    let state = Some("state");
    let done = workspace.rounds(&hyper, &Files { state, ..FILES });
    assert!(
        record.is_some() || done.is_err(),
        "no state was taken for one"
    );
    let fits = record.is_some_and(|record| {
        // At this learning rate.
        record.config.with_lr(0.1).is_ok()
            && header
                .as_ref()
                .is_some_and(|header| has_all_or_none(header, &record))
            && hyper.keeps_state()
            && record.state_kinds.is_empty()
            && !record.applied_steps.contains_key(RESERVED_NAME)
    });
    assert!(
        !fits || !done.is_err_and(is_of_form),
        "a good state was refused"
    );
}

/// Whether each tensor has all slots that the rule keeps and no others, or none.
fn has_all_or_none(header: &Header, record: &StateRecord) -> bool {
    let slots = record.config.slots();
    let kept: BTreeSet<_> = slots.kept().map(|slot| slot.name).collect();
    let mut by_tensor: BTreeMap<_, BTreeSet<_>> = BTreeMap::new();
    for SlotEntry { tensor, slot, .. } in SlotEntry::all_in(header) {
        by_tensor.entry(tensor).or_default().insert(slot);
    }
    by_tensor.values().all(|slots| *slots == kept)
}

/// An index and the files beside it, separated by lines of `--`: by the second byte the gradients (`g`), the state
/// (`s`), or the parameters, with a new state in one file or several (`P`).
pub fn index(input: &[u8]) {
    const INDEX: &str = "m.safetensors.index.json";
    let Some((mut hyper, kind, text)) = split(input) else {
        return;
    };
    let mut sections = sections(text);
    let json = sections.next().unwrap_or_default();
    let index = round_trip::index(json);
    let workspace = Workspace::new();
    workspace.write(INDEX, json);
    let mut headers = Vec::new();
    for (name, text) in ["a", "b", "c"].iter().zip(sections) {
        let file = of_text(text, 0);
        workspace.write(name, &file);
        headers.extend(round_trip::header(&file));
    }
    // A state's index has a record, too.
    let of_index = index.iter().map(|index| index.metadata.clone());
    let of_index = of_index.flat_map(|metadata| Header::new(metadata, []));
    let records: Vec<_> = of_index
        .chain(headers.iter().cloned())
        .filter_map(|header| StateRecord::of(&header).ok())
        .collect();
    let named = index.iter().flat_map(|index| index.tensors());
    let named: BTreeSet<_> = named.map(|(tensor, _)| tensor).collect();
    let mut shapes: BTreeMap<_, _> =
        stepped_shapes(headers.iter().flat_map(Header::tensors)).collect();
    shapes.retain(|name, _| named.contains(name));
    let files = match kind {
        b'g' => {
            workspace.write("params", &f32_file(shapes));
            Files {
                grads: INDEX,
                ..FILES
            }
        }
        b's' => {
            let shapes = shapes_of_state(headers.iter(), records.iter());
            workspace.write("params", &f32_file(shapes.clone()));
            workspace.write("grads", &f32_file(shapes));
            if let [record, ..] = &*records {
                hyper.resume(record);
            }
            let state = Some(INDEX);
            Files { state, ..FILES }
        }
        _ => {
            workspace.write("grads", &f32_file(shapes));
            let out_state = match kind {
                b'P' => "s.safetensors.index.json",
                _ => FILES.out_state,
            };
            Files {
                params: INDEX,
                out_state,
                ..FILES
            }
        }
    };
    let done = workspace.rounds(&hyper, &files);
    assert!(
        index.is_some() || done.is_err(),
        "no index was taken for one"
    );
}

/// A file of what PyTorch remembers, for as many parameters as the first byte says; by its bit 3 of AMSGrad, else of
/// momentum.
pub fn pytorch(input: &[u8]) {
    let Some((_, kind, text)) = split(input) else {
        return;
    };
    let rule: AnyRule = if input[0] >> 3 & 1 == 1 {
        let amsgrad = AdamConfig::builder(0.1).amsgrad(AmsGrad::OfAverage);
        amsgrad.build().unwrap().into()
    } else {
        let momentum = SgdConfig::builder(0.1).momentum(0.9);
        momentum.build().unwrap().into()
    };
    round_trip::pytorch(&of_text(text, kind), rule, usize::from(input[0] % 8));
}

fn split(input: &[u8]) -> Option<(Hyper, u8, &[u8])> {
    process::limit_memory();
    match input {
        [hyper, kind, text @ ..] => Some((Hyper::of(*hyper), *kind, text)),
        _ => None,
    }
}

const FILES: Files<'_> = Files {
    params: "params",
    grads: "grads",
    state: None,
    out_state: "state",
};

/// A name that no tensor of a file has.
const RESERVED_NAME: &str = "__metadata__";

/// Dtypes of the tensors that a step takes.
const STEPPED: [Dtype; 3] = [Dtype::F32, Dtype::BF16, Dtype::F16];

type Shapes = BTreeMap<String, Vec<usize>>;

fn stepped_shapes<'t>(
    tensors: impl IntoIterator<Item = &'t TensorEntry>,
) -> impl Iterator<Item = (String, Vec<usize>)> {
    let tensors = tensors.into_iter();
    let stepped = tensors.filter(|tensor| STEPPED.contains(&tensor.dtype));
    stepped.map(|tensor| (tensor.name.clone(), tensor.shape.clone()))
}

/// The shapes of all that a state names and a file can hold.
fn shapes_of_state<'s>(
    headers: impl Iterator<Item = &'s Header>,
    records: impl Iterator<Item = &'s StateRecord>,
) -> Shapes {
    let counted = records.flat_map(|record| record.applied_steps.keys());
    let mut shapes: Shapes = counted.map(|name| (name.clone(), vec![3])).collect();
    let slots = headers.flat_map(SlotEntry::all_in);
    let slots = slots.filter(|slot| Codec::try_from(slot.entry.dtype).is_ok());
    shapes.extend(slots.map(|slot| (slot.tensor.to_owned(), slot.entry.shape.clone())));
    shapes.remove(RESERVED_NAME);
    shapes
}
