use wgpu_optim::{KernelError, Kernels, ScalarPath, wgpu};

use super::device;

#[test]
fn limits_below_what_the_kernels_need_are_named() {
    for (limit, low) in [
        (
            "max_storage_buffers_per_shader_stage",
            wgpu::Limits {
                max_storage_buffers_per_shader_stage: 2,
                ..Default::default()
            },
        ),
        (
            "max_compute_invocations_per_workgroup",
            wgpu::Limits {
                max_compute_invocations_per_workgroup: 128,
                ..Default::default()
            },
        ),
        (
            "max_compute_workgroup_size_x",
            wgpu::Limits {
                max_compute_workgroup_size_x: 128,
                ..Default::default()
            },
        ),
    ] {
        let (device, queue) = device(low, wgpu::Features::empty());
        let refused = Kernels::new(&device, &queue).unwrap_err();
        assert!(matches!(refused, KernelError::LimitTooLow { limit: l, .. } if l == limit));
    }
    // Where there is no compute at all, the first limit says so.
    let (device, queue) = device(
        wgpu::Limits::downlevel_webgl2_defaults(),
        wgpu::Features::empty(),
    );
    assert!(Kernels::new(&device, &queue).is_err());
}

#[test]
fn devices_at_the_usual_limits_will_do() {
    for limits in [wgpu::Limits::default(), wgpu::Limits::downlevel_defaults()] {
        let (device, queue) = device(limits, wgpu::Features::empty());
        assert!(Kernels::new(&device, &queue).is_ok());
    }
}

#[test]
fn scalars_take_immediates_where_they_fit() {
    let path = |features, max_immediate_size| {
        let limits = wgpu::Limits {
            max_immediate_size,
            ..Default::default()
        };
        let (device, queue) = device(limits, features);
        Kernels::new(&device, &queue).unwrap().scalar_path()
    };
    assert_eq!(
        path(wgpu::Features::IMMEDIATES, 128),
        ScalarPath::Immediates
    );
    assert_eq!(path(wgpu::Features::IMMEDIATES, 44), ScalarPath::Uniforms);
    assert_eq!(path(wgpu::Features::empty(), 0), ScalarPath::Uniforms);
}
