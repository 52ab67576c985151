//! Transfers under executors that know nothing of wgpu, and ones that something happens to.

use std::future::Future;
use std::pin::{Pin, pin};
use std::sync::mpsc;
use std::task::{Context, Poll, Waker};
use std::thread;
use std::time::Duration;

use wgpu_optim::readback::{block_on, download, download_blocking};
use wgpu_optim::{TransferError, wgpu};

use super::Bench;
use super::transfers::every_transfer;
use crate::cases::values;

/// Runs `test` on another thread, so that one which never ends fails.
fn in_time<T: Send + 'static>(test: impl FnOnce() -> T + Send + 'static) -> T {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || sender.send(test()));
    receiver.recv_timeout(Duration::from_secs(60)).unwrap()
}

/// A device of its own.
fn bench() -> Bench {
    wait(Bench::with(wgpu::Features::empty()))
}

/// Waits for what is no transfer.
fn wait<F: Future>(future: F) -> F::Output {
    pollster::block_on(future)
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
fn every_transfer_finishes_under_any_executor() {
    for run in executors() {
        in_time(move || run(Box::pin(every_transfer())));
    }
    in_time(|| block_on(&wait(Bench::best()).device, every_transfer()));
    // That of another device too.
    in_time(|| block_on(&bench().device, every_transfer()));
}

#[test]
fn many_transfers_are_under_way_at_once_and_some_are_given_up() {
    in_time(|| {
        let bench = bench();
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
        assert_eq!(wait(bench.download(&buffer)), data);
    });
}

/// A transfer may be faster than the loss, but not every time.
fn check_loss(lose: impl Fn(&Bench, &wgpu::Buffer) -> Result<Vec<f32>, TransferError>) {
    let data = values(1, LARGE);
    let lost = (0..20).find_map(|_| {
        let bench = bench();
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
            let bench = bench();
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
            assert_eq!(wait(bench.download(&bench.buffer_of(&[3.0]))), [3.0]);
        });
    }
}
