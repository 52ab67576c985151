//! The norms of gradients, which a step that clips by them has to know before it applies the first of them.

use std::sync::atomic::{AtomicU64, Ordering};

use wgpu_optim::control::{GradNorm, GradNorms};
use wgpu_optim_files::window::{Reader, Slice, runs};

use super::inputs::Inputs;
use super::plan::Plan;
use super::threads::in_turn;
use crate::Failure;
use crate::interrupt::Interrupt;
use crate::progress::Progress;

/// Elements that are added up at a time. Their number is part of the result, and the number of threads is not.
const WINDOW_ELEMS: u64 = 1 << 18;

/// Reads the gradients of all tensors that are updated, for the norm of all of them and that of each; returns how many bytes
/// that were, too.
pub fn of_grads(
    inputs: &Inputs,
    plan: &Plan<'_>,
    interrupt: &Interrupt,
) -> Result<(GradNorms, u64), Failure> {
    let windows: Vec<_> = plan.in_order(WINDOW_ELEMS).collect();
    let files = inputs.files();
    let bytes = plan.updates.iter().map(|update| {
        let tensor = update.tensor;
        tensor.numel * tensor.storage.grads.bytes()
    });
    let progress = Progress::of_bytes(bytes.sum());
    let bytes_read = AtomicU64::new(0);
    let count = |bytes| {
        bytes_read.fetch_add(bytes, Ordering::Relaxed);
        progress.advance("norm", bytes);
    };
    let norm = |(reader, grads): &mut (Reader<'_>, Vec<f32>), window: usize| {
        let (slices, elems) = &windows[window];
        grads.resize(*elems as usize, 0.0);
        let parts = |update: usize| &*plan.updates[update].tensor.grads;
        reader.read(&runs(slices, parts), grads)?;
        let norm_of = |(slice, elems): (&Slice, _)| {
            let mut norm = GradNorm::default();
            norm.add(&grads[elems]);
            (slice.tensor, norm)
        };
        Ok(Slice::in_window(slices).map(norm_of).collect::<Vec<_>>())
    };
    // One more than there are cores, which adds while another waits for the disk.
    let threads = (rayon::current_num_threads() + 1).min(windows.len());
    let worker = |_| (Reader::new(&files, &count), Vec::new());
    let of_windows = in_turn(
        (0..threads).map(worker).collect(),
        windows.len(),
        interrupt,
        norm,
    )?;
    let mut of_all = GradNorm::default();
    let mut of_tensors = vec![GradNorm::default(); plan.updates.len()];
    for (update, norm) in of_windows.into_iter().flatten() {
        of_all = of_all.and(norm);
        of_tensors[update] = of_tensors[update].and(norm);
    }
    let norms = GradNorms {
        shared: vec![of_all],
        tensors: of_tensors.into_iter().map(Some).collect(),
    };
    Ok((norms, bytes_read.into_inner()))
}
