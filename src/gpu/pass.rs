//! Dispatches in a compute pass: one way to record them, for steps and norms, with a control and without.

use super::error::StepError;
use super::scalars::UniformRing;
use crate::wgsl::scalars::{SCALARS_GROUP, TENSORS_GROUP};

/// A dispatch of a kernel over tensors.
pub(super) struct Call<'a> {
    pub(super) pipeline: &'a wgpu::ComputePipeline,
    pub(super) tensors: &'a wgpu::BindGroup,
    /// The decision of a control, if the kernel binds one.
    pub(super) decision: Option<Decision<'a>>,
    pub(super) workgroups: [u32; 2],
}

/// A block of a buffer that says what a control has decided, by dynamic offset; or what kernels in chunks bind in its place.
#[derive(Clone, Copy)]
pub(super) struct Decision<'a> {
    pub(super) group: u32,
    pub(super) bindings: &'a wgpu::BindGroup,
    pub(super) offset_bytes: Option<u32>,
}

/// Records the copy that fills the ring, on devices without immediates: the scalars of so many calls.
pub(super) fn prepare<S: AsRef<[u8]>>(
    ring: &mut Option<UniformRing>,
    device: &wgpu::Device,
    encoder: &mut wgpu::CommandEncoder,
    calls: usize,
    scalars_of: impl Fn(usize) -> S,
) -> Result<(), StepError> {
    let Some(ring) = ring else {
        return Ok(());
    };
    for call in 0..calls {
        ring.set(call, scalars_of(call).as_ref());
    }
    ring.record(device, encoder)
}

/// Records calls, each with the index of its scalars, which are in the ring if there is one. Returns their number.
pub(super) fn record<'a, S: AsRef<[u8]>>(
    pass: &mut wgpu::ComputePass<'_>,
    ring: Option<&UniformRing>,
    calls: impl Iterator<Item = (usize, Call<'a>)>,
    scalars_of: impl Fn(usize) -> S,
) -> usize {
    let (mut current, mut recorded) = (None, 0);
    for (index, call) in calls {
        if current != Some(call.pipeline) {
            pass.set_pipeline(call.pipeline);
            current = Some(call.pipeline);
        }
        pass.set_bind_group(TENSORS_GROUP, call.tensors, &[]);
        if let Some(decision) = call.decision {
            let offset = decision.offset_bytes.as_slice();
            pass.set_bind_group(decision.group, decision.bindings, offset);
        }
        match ring {
            Some(ring) => ring.bind(pass, SCALARS_GROUP, index),
            None => pass.set_immediates(0, scalars_of(index).as_ref()),
        }
        let [x, y] = call.workgroups;
        pass.dispatch_workgroups(x, y, 1);
        recorded += 1;
    }
    recorded
}

/// Records a kernel of one workgroup.
pub(super) fn record_one(
    pass: &mut wgpu::ComputePass<'_>,
    pipeline: &wgpu::ComputePipeline,
    bindings: &wgpu::BindGroup,
) {
    pass.set_pipeline(pipeline);
    pass.set_bind_group(TENSORS_GROUP, bindings, &[]);
    pass.dispatch_workgroups(1, 1, 1);
}
