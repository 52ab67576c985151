use wgpu_optim::readback::{download_blocking, upload};
use wgpu_optim::{TransferError, wgpu};

use super::Bench;
use crate::cases::values;

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
    assert!(
        matches!(lost, Err(TransferError::Device { .. })),
        "{lost:?}"
    );
    // Another device goes on working.
    let other = Bench::best();
    assert_eq!(other.download(&other.buffer_of(&[3.0])), [3.0]);
}
