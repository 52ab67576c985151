use wgpu_optim::rules::Scalars;
use wgpu_optim::wgsl::{KernelError, ScalarPath};
use wgpu_optim::{BuildError, ConfigError, GpuOptimizer, Kernels, Rule, wgpu};

use super::{STORAGE, buffer, device, kernels, tensor};

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

/// A rule of a user's own, of which only the WGSL matters.
#[derive(Clone, Debug, PartialEq)]
struct Written(&'static str);

impl Rule for Written {
    fn stem(&self) -> &'static str {
        "written"
    }

    fn wgsl(&self) -> String {
        self.0.into()
    }

    fn scalar_names(&self) -> &'static [&'static str] {
        &["lr"]
    }

    fn scalars(&self, _phase: u64) -> Scalars {
        [0.1].into()
    }

    fn lr(&self) -> f64 {
        0.1
    }

    fn with_lr(&self, _lr: f64) -> Result<Self, ConfigError> {
        Ok(self.clone())
    }
}

/// What naga says of a line of the frame helps nobody who wrote the rule.
#[test]
fn a_rule_without_the_function_that_is_called_is_told_what_to_declare() {
    let kernels = kernels();
    let params = buffer(&kernels, 400, STORAGE);
    let grads = buffer(&kernels, 400, STORAGE);
    let build = |wgsl| {
        let theta = tensor("theta", (&params, 0), (&grads, 0), 10);
        GpuOptimizer::new(&kernels, Written(wgsl), &[theta])
    };
    for (wgsl, declared) in [
        ("", None),
        ("fn updated(theta: vec4<f32>) -> vec4<f32> { return theta; }", None),
        (
            "// fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
             /* fn update(k: Scalars, /* */ fn update() {} */ fn step(x: f32) -> f32 { return x; }",
            None,
        ),
        (
            "fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>) -> vec4<f32> { return theta; }",
            Some("fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>) -> vec4<f32>"),
        ),
        (
            "fn update(k: Scalars, theta: f32, g: f32, state: ptr<function, State>) -> f32 { return theta; }",
            Some("fn update(k: Scalars, theta: f32, g: f32, state: ptr<function, State>) -> f32"),
        ),
        (
            "fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: State)\n -> vec4<f32> { return theta; }",
            Some("fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: State) -> vec4<f32>"),
        ),
        (
            "fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) {}",
            Some("fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>)"),
        ),
    ] {
        let refused = build(wgsl).unwrap_err();
        let expected = BuildError::Kernel(KernelError::Signature {
            rule: "written",
            actual: declared.map(str::to_owned),
        });
        assert_eq!(refused, expected, "{wgsl}");
        let text = refused.to_string();
        assert!(text.contains("expected `fn update(k: Scalars, theta: vec4<f32>,"), "{text}");
        assert!(text.contains(declared.unwrap_or("no `fn update`")), "{text}");
    }
    for wgsl in [
        "fn update(k: Scalars, theta: vec4<f32>, g: vec4<f32>, state: ptr<function, State>) -> vec4<f32> {
             return theta - k.lr * g;
         }",
        // However it is written.
        "// fn update(
         fn /* of */ update (
             scalars : Scalars , // what a step has
             x: vec4f,
             g: vec4 < f32 >,
             s: ptr < function , State >,
         ) -> vec4f
         {
             return x - scalars.lr * g;
         }",
        "alias Four = vec4<f32>;
         fn helper(x: Four) -> Four { return x; }
         fn update(k: Scalars, theta: Four, g: Four, state: ptr<function, State>) -> Four {
             return helper(theta) - k.lr * g;
         }",
    ] {
        build(wgsl).unwrap();
    }
}
