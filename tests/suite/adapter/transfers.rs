use std::future::Future as _;
use std::ops::Range;
use std::pin::pin;
use std::task::{Context, Poll, Waker};

use wgpu_optim::gpu::ArenaError;
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::readback::{download, download_regions, upload, upload_regions};
use wgpu_optim::{Arena, GpuOptimizer, SgdConfig, TransferError, wgpu};

use super::{Bench, gpu_test};
use crate::cases::values;

impl Bench {
    async fn read(
        &self,
        buffer: &wgpu::Buffer,
        offset_bytes: u64,
        numel: u64,
    ) -> Result<Vec<f32>, TransferError> {
        let (device, queue) = (&self.device, &self.queue);
        self.wait(download(device, queue, buffer, offset_bytes, numel))
            .await
    }
}

#[gpu_test]
async fn what_goes_up_comes_down_also_in_parts() {
    let bench = Bench::best().await;
    let data = values(1, 1001);
    let buffer = bench.buffer_of(&data);
    assert_eq!(bench.download(&buffer).await, data);
    let part = bench.read(&buffer, 12, 5).await.unwrap();
    assert_eq!(part, data[3..8]);
    upload(&bench.device, &bench.queue, &buffer, 8, &[7.0]).unwrap();
    assert_eq!(
        bench.download(&buffer).await[..4],
        [data[0], data[1], 7.0, data[3]]
    );
    let nothing = bench.read(&buffer, 0, 0).await.unwrap();
    assert!(nothing.is_empty());
}

#[gpu_test]
async fn many_regions_go_up_and_come_down_in_their_order() {
    let bench = Bench::best().await;
    let (device, queue) = (&bench.device, &bench.queue);
    let (first, second) = (values(1, 100), values(2, 1001));
    let [a, b] = [&first, &second].map(|data| bench.buffer_of(data));
    let regions = [(&b, 4000..4004), (&a, 8..24), (&a, 0..0), (&b, 0..4)];
    let read = || async {
        let read = bench.wait(download_regions(device, queue, &regions)).await;
        let bytes = read.unwrap();
        let (words, _) = bytes.as_chunks();
        words
            .iter()
            .map(|word| f32::from_ne_bytes(*word))
            .collect::<Vec<_>>()
    };
    let [from_b, from_a] =
        [(&second, 1000..1001), (&first, 2..6)].map(|(data, elems)| &data[elems]);
    assert_eq!(read().await, [from_b, from_a, &second[..1]].concat());

    let new = [1.0_f32, 2.0, 3.0, 4.0, 5.0, 6.0];
    let bytes: Vec<u8> = new.iter().flat_map(|value| value.to_ne_bytes()).collect();
    upload_regions(device, queue, &regions, &bytes).unwrap();
    assert_eq!(read().await, new);
    // Nothing beside them.
    let after = bench.download(&a).await;
    assert_eq!((&after[..2], &after[6..]), (&first[..2], &first[6..]));
    assert_eq!(bench.download(&b).await[1..1000], second[1..1000]);

    let none = bench
        .wait(download_regions(device, queue, &[]))
        .await
        .unwrap();
    assert!(none.is_empty());
    upload_regions(device, queue, &[(&a, 4..4)], &[]).unwrap();
    let refused = upload_regions(device, queue, &regions, &bytes[1..]);
    let expected = TransferError::Length {
        expected: 24,
        actual: 23,
    };
    assert_eq!(refused, Err(expected));
    for region in [0..404, 2..6, 0..6, 400..404] {
        let refused = upload_regions(device, queue, &[(&a, region.clone())], &[0; 404]);
        assert!(
            matches!(refused, Err(TransferError::OutOfBounds { .. })),
            "{region:?}"
        );
        let regions = [(&a, region)];
        let refused = bench.wait(download_regions(device, queue, &regions)).await;
        assert!(matches!(refused, Err(TransferError::OutOfBounds { .. })));
    }
    for (start, end) in [(8, 4), (404, 0), (u64::MAX, 0)] {
        let regions = [(&a, 0..4), (&b, Range { start, end })];
        let expected = TransferError::Backwards { start, end };
        let refused = upload_regions(device, queue, &regions, &[0; 4]);
        assert_eq!(refused, Err(expected.clone()));
        let refused = bench.wait(download_regions(device, queue, &regions)).await;
        assert_eq!(refused, Err(expected));
    }
    assert_eq!(read().await, new);
}

#[gpu_test]
async fn transfers_that_cannot_be_are_refused_and_the_next_one_works() {
    let bench = Bench::best().await;
    let buffer = bench.buffer_of(&[1.0, 2.0]);
    for (offset, numel) in [(0, 3), (4, 2), (2, 1), (u64::MAX - 3, 1), (0, u64::MAX / 2)] {
        let refused = bench.read(&buffer, offset, numel).await;
        assert!(matches!(
            refused,
            Err(TransferError::OutOfBounds {
                buffer_bytes: 8,
                ..
            })
        ));
    }
    let refused = upload(&bench.device, &bench.queue, &buffer, 4, &[1.0, 2.0]);
    assert!(matches!(
        refused,
        Err(TransferError::OutOfBounds {
            offset_bytes: 4,
            numel: 2,
            ..
        })
    ));
    let private = bench.device.create_buffer(&wgpu::BufferDescriptor {
        label: None,
        size: 8,
        usage: wgpu::BufferUsages::STORAGE,
        mapped_at_creation: false,
    });
    let refused = bench.read(&private, 0, 1).await;
    assert!(matches!(refused, Err(TransferError::MissingUsage { .. })));
    let refused = upload(&bench.device, &bench.queue, &private, 0, &[1.0]);
    assert!(matches!(refused, Err(TransferError::MissingUsage { .. })));
    assert_eq!(bench.download(&buffer).await, [1.0, 2.0]);
}

/// Every transfer off the device says so.
#[gpu_test]
async fn a_lost_device_is_an_error_and_no_panic() {
    let bench = Bench::with(wgpu::Features::empty()).await;
    let buffer = bench.buffer_of(&[1.0, 2.0]);
    let arena = Arena::new(&bench.device, &bench.queue, [("weight", vec![7])]).unwrap();
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let optimizer = GpuOptimizer::new(&bench.kernels, config, &arena.bindings()).unwrap();
    bench.device.destroy();
    // The first to notice, and one that comes later.
    for _ in 0..2 {
        assert_eq!(
            bench.read(&buffer, 0, 2).await,
            Err(TransferError::DeviceLost)
        );
    }
    let lost = bench.wait(arena.download_all_params()).await;
    assert_eq!(lost, Err(ArenaError::Transfer(TransferError::DeviceLost)));
    let lost = bench.wait(optimizer.state()).await;
    assert_eq!(lost, Err(TransferError::DeviceLost));
    // Another device goes on working.
    let other = Bench::best().await;
    assert_eq!(other.download(&other.buffer_of(&[3.0])).await, [3.0]);
}

#[gpu_test]
async fn a_device_lost_under_way_ends_the_transfer_in_what_was_read_or_an_error() {
    let bench = Bench::with(wgpu::Features::empty()).await;
    let data = values(1, 1 << 20);
    let buffer = bench.buffer_of(&data);
    let (device, queue) = (&bench.device, &bench.queue);
    let mut transfer = pin!(download(device, queue, &buffer, 0, 1 << 20));
    let mut context = Context::from_waker(Waker::noop());
    let read = match transfer.as_mut().poll(&mut context) {
        Poll::Ready(read) => read,
        Poll::Pending => {
            device.destroy();
            transfer.await
        }
    };
    match read {
        Ok(read) => assert!(read == data),
        Err(error) => assert_eq!(error, TransferError::DeviceLost),
    }
}

#[gpu_test]
async fn a_destroyed_buffer_is_an_error_and_the_next_one_is_read() {
    let bench = Bench::best().await;
    let buffer = bench.buffer_of(&[1.0, 2.0]);
    buffer.destroy();
    let refused = bench.read(&buffer, 0, 2).await;
    let Err(TransferError::Device { message }) = refused else {
        panic!("{refused:?}");
    };
    assert!(message.contains("destroyed"), "{message}");
    assert_eq!(bench.download(&bench.buffer_of(&[3.0])).await, [3.0]);
}

pub async fn every_transfer() {
    let bench = Bench::best().await;
    let arena = Arena::new(
        &bench.device,
        &bench.queue,
        [("weight", vec![7, 11]), ("bias", vec![5])],
    )
    .unwrap();
    let (start, grads) = ([values(1, 77), values(2, 5)], [values(3, 77), values(4, 5)]);
    arena.upload_all_params(&start).unwrap();
    arena.upload_all_grads(&grads).unwrap();
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let mut optimizer = GpuOptimizer::new(&bench.kernels, config, &arena.bindings()).unwrap();
    let mut oracles = start.each_ref().map(|s| Oracle::new(s, Roundoff::WGSL));
    for _ in 0..3 {
        bench.step(&mut optimizer);
        for (oracle, grads) in oracles.iter_mut().zip(&grads) {
            oracle.step(&config, grads);
        }
    }
    let all = arena.download_all_params().await.unwrap();
    let state = optimizer.state().await.unwrap();
    for ((oracle, params), state) in oracles.iter().zip(&all).zip(&state.tensors) {
        oracle.check_params(params).unwrap();
        let velocity = state.slot("momentum_buffer").unwrap();
        oracle.check_velocity(&velocity).unwrap();
    }
    assert_eq!(arena.download_params("weight").await.unwrap(), all[0]);
    let (device, queue) = (&bench.device, &bench.queue);
    let part = download(device, queue, &arena.params()[0], 8, 9).await;
    assert_eq!(part.unwrap(), all[0][2..11]);
    #[cfg(feature = "safetensors")]
    {
        let file = arena.to_safetensors().await.unwrap();
        let (copy, _) = Arena::from_safetensors(device, queue, &file).unwrap();
        assert_eq!(copy.download_params("weight").await.unwrap(), all[0]);
    }
}
