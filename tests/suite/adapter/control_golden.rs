//! Steps under a control on a real adapter at the points that PyTorch printed.

use wgpu_optim::oracle::Roundoff;
use wgpu_optim::{GpuControl, GpuOptimizer, Optimizer};

use super::{Bench, gpu_test, whole};
use crate::golden_control;

#[gpu_test]
async fn the_device_decides_as_pytorch_does() {
    for bench in Bench::both().await {
        for golden in golden_control::all() {
            let buffers: Vec<_> = golden
                .tensors()
                .map(|(_, start)| (bench.buffer_of(start), bench.buffer(start.len())))
                .collect();
            let named = golden.tensors().zip(&buffers);
            let tensors: Vec<_> = named
                .map(|((name, _), (params, grads))| whole(name, params, grads))
                .collect();
            let groups = golden.groups();
            let mut optimizer =
                GpuOptimizer::with_groups(&bench.kernels, &groups, &tensors).unwrap();
            let mut control = GpuControl::new(&bench.kernels, golden.control()).unwrap();
            for (step, expected) in golden.expected(Roundoff::WGSL).iter().enumerate() {
                optimizer.set_lr(golden.steps[step].lr).unwrap();
                for (name, _) in golden.tensors() {
                    let is_frozen = golden.is_frozen(step, name);
                    optimizer.set_frozen(name, is_frozen).unwrap();
                }
                for ((_, buffer), grads) in buffers.iter().zip(golden.grads(step)) {
                    bench.upload(buffer, &grads);
                }
                bench.submit(|encoder| optimizer.step_with(encoder, &mut control).unwrap());
                let records = bench.outcomes(&mut control).await;
                assert_eq!(records.len(), 1, "{}, step {step}", golden.name);
                let mut stepped = Vec::new();
                for (params, _) in &buffers {
                    stepped.push(bench.download(params).await);
                }
                let state = bench.wait(optimizer.state()).await.unwrap();
                let after = bench.wait(control.state()).await.unwrap();
                golden.check(step, expected, &stepped, &state, &records[0], after);
            }
        }
    }
}
