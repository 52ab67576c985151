use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::mpsc;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use wgpu_optim::oracle::{Oracle, Rounding};
use wgpu_optim::readback::{block_on, download, download_blocking, upload};
use wgpu_optim::{Arena, GpuOptimizer, SgdConfig, TransferError, wgpu};

use super::Bench;
use crate::cases::values;

/// Runs `test` on another thread, so that one which never ends fails.
fn in_time<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(test()));
    receiver.recv_timeout(Duration::from_secs(60)).unwrap()
}

type Boxed<'a, T> = Pin<Box<dyn Future<Output = T> + 'a>>;

/// Executors that know nothing of wgpu.
fn executors<T>() -> [fn(Boxed<'_, T>) -> T; 2] {
    [
        |future| pollster::block_on(future),
        |future| {
            let runtime = tokio::runtime::Builder::new_current_thread().build();
            runtime.unwrap().block_on(future)
        },
    ]
}

/// Elements that take their time: uploading them is left to the submission of the download.
const LARGE: usize = 8 << 20;

/// Starts a transfer and leaves it to the executor after something has happened, unless it was faster.
fn interrupted<T>(
    mut transfer: Boxed<'_, T>,
    run: fn(Boxed<'_, T>) -> T,
    happening: impl FnOnce(),
) -> T {
    match transfer
        .as_mut()
        .poll(&mut Context::from_waker(Waker::noop()))
    {
        Poll::Ready(done) => done,
        Poll::Pending => {
            happening();
            run(transfer)
        }
    }
}

#[test]
fn what_goes_up_comes_down_also_in_parts() {
    let bench = Bench::best();
    let data = values(1, 1001);
    let buffer = bench.buffer_of(&data);
    assert_eq!(bench.download(&buffer), data);
    let part = download_blocking(&bench.device, &bench.queue, &buffer, 12, 5).unwrap();
    assert_eq!(part, data[3..8]);
    upload(&bench.device, &bench.queue, &buffer, 8, &[7.0]).unwrap();
    assert_eq!(
        bench.download(&buffer)[..4],
        [data[0], data[1], 7.0, data[3]]
    );
    let nothing = download_blocking(&bench.device, &bench.queue, &buffer, 0, 0).unwrap();
    assert!(nothing.is_empty());
}

#[test]
fn transfers_that_cannot_be_are_refused_and_the_next_one_works() {
    let bench = Bench::best();
    let buffer = bench.buffer_of(&[1.0, 2.0]);
    for (offset, numel) in [(0, 3), (4, 2), (2, 1), (u64::MAX - 3, 1), (0, u64::MAX / 2)] {
        let refused = download_blocking(&bench.device, &bench.queue, &buffer, offset, numel);
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
    let refused = download_blocking(&bench.device, &bench.queue, &private, 0, 1);
    assert!(matches!(refused, Err(TransferError::MissingUsage { .. })));
    let refused = upload(&bench.device, &bench.queue, &private, 0, &[1.0]);
    assert!(matches!(refused, Err(TransferError::MissingUsage { .. })));
    assert_eq!(bench.download(&buffer), [1.0, 2.0]);
}

#[test]
fn a_lost_device_is_an_error_and_no_panic() {
    let bench = Bench::with(wgpu::Features::empty());
    let buffer = bench.buffer_of(&[1.0, 2.0]);
    bench.device.destroy();
    let lost = download_blocking(&bench.device, &bench.queue, &buffer, 0, 2);
    assert_eq!(lost, Err(TransferError::DeviceLost));
    // Another device goes on working.
    let other = Bench::best();
    assert_eq!(other.download(&other.buffer_of(&[3.0])), [3.0]);
}

async fn every_transfer() {
    let bench = Bench::best();
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
    let mut oracles = start.each_ref().map(|s| Oracle::new(s, Rounding::WGSL));
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
        oracle.check_velocity(velocity).unwrap();
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

#[test]
fn every_transfer_finishes_under_any_executor() {
    for run in executors() {
        in_time(move || run(Box::pin(every_transfer())));
    }
    in_time(|| block_on(&Bench::best().device, every_transfer()));
    // That of another device too.
    in_time(|| {
        block_on(
            &Bench::with(wgpu::Features::empty()).device,
            every_transfer(),
        )
    });
}

#[test]
fn many_transfers_are_under_way_at_once_and_some_are_given_up() {
    in_time(|| {
        let bench = Bench::with(wgpu::Features::empty());
        let data = values(1, 1000);
        let buffer = bench.buffer_of(&data);
        let (device, queue) = (bench.device.clone(), bench.queue.clone());
        let runtime = tokio::runtime::Builder::new_current_thread().build();
        runtime.unwrap().block_on(async {
            let transfer = |at: usize| {
                let (device, queue, buffer) = (device.clone(), queue.clone(), buffer.clone());
                async move { download(&device, &queue, &buffer, 4 * at as u64, 10).await }
            };
            let tasks: Vec<_> = (0..99)
                .map(|at| (at, tokio::spawn(transfer(10 * at))))
                .collect();
            let mut given_up = pin!(transfer(0));
            let _ = given_up
                .as_mut()
                .poll(&mut Context::from_waker(Waker::noop()));
            tokio::task::yield_now().await;
            for (at, task) in tasks {
                if at % 3 == 0 {
                    task.abort();
                } else {
                    let part = task.await.unwrap().unwrap();
                    assert_eq!(part, data[10 * at..10 * at + 10]);
                }
            }
        });
        assert_eq!(bench.download(&buffer), data);
    });
}

/// A transfer may be faster than the loss, but not every time.
fn check_loss(lose: impl Fn(&Bench, &wgpu::Buffer) -> Result<Vec<f32>, TransferError>) {
    let data = values(1, LARGE);
    let lost = (0..20).find_map(|_| {
        let bench = Bench::with(wgpu::Features::empty());
        let buffer = bench.buffer_of(&data);
        let result = lose(&bench, &buffer);
        result.map(|read| assert!(read == data)).err()
    });
    let lost = lost.unwrap();
    assert_eq!(lost, TransferError::DeviceLost);
    assert!(lost.to_string().contains("device lost"), "{lost}");
}

#[test]
fn a_device_lost_under_way_ends_the_transfer() {
    for run in executors() {
        in_time(move || {
            check_loss(|Bench { device, queue, .. }, buffer| {
                let transfer = Box::pin(download(device, queue, buffer, 0, LARGE as u64));
                interrupted(transfer, run, || device.destroy())
            });
        });
    }
    in_time(|| {
        check_loss(|bench, buffer| {
            let device = bench.device.clone();
            thread::spawn(move || {
                thread::sleep(Duration::from_millis(3));
                device.destroy();
            });
            download_blocking(&bench.device, &bench.queue, buffer, 0, LARGE as u64)
        });
    });
}

#[test]
fn a_buffer_destroyed_under_way_is_read_and_one_destroyed_before_is_an_error() {
    for run in executors() {
        in_time(move || {
            let bench = Bench::with(wgpu::Features::empty());
            let (device, queue) = (&bench.device, &bench.queue);
            let data = values(1, LARGE);
            let buffer = bench.buffer_of(&data);
            let transfer = Box::pin(download(device, queue, &buffer, 0, LARGE as u64));
            let read = interrupted(transfer, run, || buffer.destroy()).unwrap();
            assert!(read == data);
            buffer.destroy();
            let refused = run(Box::pin(download(device, queue, &buffer, 0, 1000)));
            let Err(TransferError::Device { message }) = refused else {
                panic!("{refused:?}");
            };
            assert!(message.contains("destroyed"), "{message}");
            assert_eq!(bench.download(&bench.buffer_of(&[3.0])), [3.0]);
        });
    }
}
