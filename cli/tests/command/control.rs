//! Gradients that are unscaled and clipped before they are applied, beside the library's twin bit for bit.

use safetensors::Dtype;
use serde_json::{Value, json};
use wgpu_optim::control::NonFinite;
use wgpu_optim::cpu::TensorValues;
use wgpu_optim::{
    AnyRule, CpuControl, CpuOptimizer, Masters, ParamGroups, Precision, SgdConfig, StepControl,
    StorageType, TensorSpec,
};

use crate::model::{Model, Tensor, Workspace, values};
use crate::refusals::refused;
use crate::{DEVICES, wgpu_optim};

/// Products with these round nothing, and sums round as they do everywhere: what the engines come to is the same.
const STEP: [&str; 4] = ["--lr", "0.5", "--momentum", "0.5"];

fn rule() -> AnyRule {
    let config = SgdConfig::builder(0.5).momentum(0.5).build().unwrap();
    config.into()
}

/// More than one window of the norm, ends that fill nothing, and a tensor without a gradient.
const TENSORS: [(&str, usize); 4] = [("a", 7), ("b", 300_001), ("c", 1), ("d", 250_000)];

/// Gradients whose norm is about 700, times `scale`.
fn grads(scale: f32) -> Vec<(&'static str, Vec<f32>)> {
    let scaled = |(name, numel): (&'static str, usize)| {
        let grads = values(numel as u64 + 1, numel);
        (name, grads.iter().map(|grad| grad * scale).collect())
    };
    TENSORS.into_iter().map(scaled).collect()
}

fn write_grads(workspace: &Workspace, grads: &[(&str, Vec<f32>)], dtype: Dtype) {
    let mut model = Model::default();
    for (name, grads) in grads {
        let tensor = Tensor::stored_as(dtype, &[grads.len()], grads);
        model.tensors.insert((*name).to_owned(), tensor);
    }
    model.write(&workspace.path("grads"));
}

/// Parameters of every tensor and one more, and these gradients.
fn with(grads: &[(&str, Vec<f32>)], of_params: Dtype, of_grads: Dtype) -> Workspace {
    let workspace = Workspace::new();
    let mut params = Model::new([("frozen", Tensor::f32(&[5], &[1e20; 5]))]);
    for (name, numel) in TENSORS {
        let tensor = Tensor::stored_as(of_params, &[numel], &values(numel as u64, numel));
        params.tensors.insert(name.to_owned(), tensor);
    }
    params.write(&workspace.path("params"));
    write_grads(&workspace, grads, of_grads);
    workspace
}

/// Runs a step that has to succeed; returns its report.
fn run(workspace: &Workspace, device: &str, args: &[&str]) -> Value {
    let mut step = workspace.step();
    step.args(["--device", device, "--json"]).args(args);
    let output = step.output().unwrap();
    assert!(output.status.success(), "{args:?}: {output:?}");
    serde_json::from_slice(&output.stdout).unwrap()
}

/// What the library's twin makes of the files, the record of its last step, and its state.
fn twin(
    workspace: &Workspace,
    control: StepControl,
    steps: usize,
) -> (Vec<TensorValues>, f32, f32) {
    let [params, grads] = ["params", "grads"].map(|name| Model::read(&workspace.path(name)));
    let of = |tensor: &Tensor| match tensor.dtype {
        Dtype::BF16 => StorageType::Bf16,
        Dtype::F16 => StorageType::F16,
        _ => StorageType::F32,
    };
    let stored = |model: &Model, name| {
        let tensor: &Tensor = &model.tensors[name];
        TensorValues::new(of(tensor), &tensor.values())
    };
    let specs = TENSORS.map(|(name, numel)| {
        let (params, grads) = (of(&params.tensors[name]), of(&grads.tensors[name]));
        TensorSpec::new(name, [numel])
            .params_type(params)
            .grads_type(grads)
    });
    let groups = ParamGroups::new(rule()).with_precision(Precision {
        masters: Masters::F32,
        ..Precision::default()
    });
    let mut optimizer = CpuOptimizer::with_groups(&groups, specs).unwrap();
    let mut control = CpuControl::new(control);
    let mut values = TENSORS.map(|(name, _)| stored(&params, name));
    let grads = TENSORS.map(|(name, _)| stored(&grads, name));
    let mut record = None;
    for _ in 0..steps {
        let mut params = values.each_mut().map(TensorValues::slice_mut);
        let grads = grads.each_ref().map(TensorValues::slice);
        record = Some(
            optimizer
                .step_mixed_with(&mut params, &grads, &mut control)
                .unwrap(),
        );
    }
    let record = record.unwrap();
    (values.into(), record.norm, record.clip_factor)
}

fn bits(values: &[f32]) -> Vec<u32> {
    values.iter().map(|value| value.to_bits()).collect()
}

#[test]
fn a_controlled_step_is_the_twins_bit_for_bit() {
    let control = || StepControl::builder().nonfinite(NonFinite::Apply);
    for (args, control) in [
        (&["--clip-norm", "1"][..], control().max_norm(1.0)),
        (&["--clip-norm", "1e6"], control().max_norm(1e6)),
        (
            &["--clip-tensor-norm", "20"],
            control().tensor_max_norm(20.0),
        ),
        (&["--clip-value", "0.75"], control().clip_value(0.75)),
        (&["--grad-scale", "1000"], control().grad_scale(1000.0)),
        (
            &[
                "--grad-scale",
                "3",
                "--clip-norm",
                "100",
                "--clip-value",
                "0.2",
            ],
            control().grad_scale(3.0).max_norm(100.0).clip_value(0.2),
        ),
        (
            &[
                "--grad-scale",
                "3",
                "--clip-tensor-norm",
                "0.5",
                "--clip-value",
                "0.2",
            ],
            control()
                .grad_scale(3.0)
                .tensor_max_norm(0.5)
                .clip_value(0.2),
        ),
    ] {
        let control = control.build().unwrap();
        for (params, grads_type) in [
            (Dtype::F32, Dtype::F32),
            (Dtype::F32, Dtype::F16),
            (Dtype::BF16, Dtype::BF16),
        ] {
            let workspace = with(&grads(1.0), params, grads_type);
            let (expected, norm, factor) = twin(&workspace, control.clone(), 2);
            for device in DEVICES {
                let args = [&STEP[..], &["--repeat", "2"], args].concat();
                let report = run(&workspace, device, &args);
                let out = Model::read(&workspace.path("out_params"));
                for ((name, _), expected) in TENSORS.iter().zip(&expected) {
                    let actual = bits(&out.tensors[*name].values());
                    assert!(
                        actual == bits(&expected.to_f32()),
                        "{device} {args:?}: {name}"
                    );
                }
                if args.iter().any(|arg| arg.ends_with("-norm")) {
                    let of = |what: &str| report["gradients"][what].as_f64().unwrap() as f32;
                    assert_eq!((of("norm"), of("clip_factor")), (norm, factor));
                }
            }
        }
    }
}

#[test]
fn a_scale_that_is_a_power_of_two_leaves_no_trace() {
    for device in DEVICES {
        for dtype in [Dtype::F32, Dtype::BF16, Dtype::F16] {
            let args = ["--rule", "adamw", "--lr", "0.01", "--clip-norm", "20"];
            let out = |scale: f32, more: &[&str]| {
                let workspace = with(&grads(scale), Dtype::BF16, dtype);
                run(&workspace, device, &[&args[..], more].concat());
                ["out_params", "out_state"].map(|name| std::fs::read(workspace.path(name)).unwrap())
            };
            let unscaled = out(1.0, &[]);
            assert!(out(1024.0, &["--grad-scale", "1024"]) == unscaled);
            let small = 1.0 / 1024.0;
            assert!(out(small, &["--grad-scale", &small.to_string()]) == unscaled);
            // Then the norm is one that nothing is clipped by.
            assert!(out(small, &[]) != unscaled);
        }
    }
}

#[test]
fn the_norm_is_the_same_whatever_the_number_of_threads() {
    let workspace = with(&grads(1.0), Dtype::F32, Dtype::F32);
    let out = |threads: &str| {
        let mut step = workspace.step();
        step.env("RAYON_NUM_THREADS", threads)
            .args(["--device", "cpu", "--clip-norm", "1"])
            .args(STEP);
        step.assert().success();
        std::fs::read(workspace.path("out_params")).unwrap()
    };
    let one = out("1");
    for threads in ["2", "7"] {
        assert!(out(threads) == one, "{threads}");
    }
}

#[test]
fn gradients_are_read_twice_for_a_norm_alone_and_the_report_has_it() {
    let workspace = with(&grads(4.0), Dtype::F32, Dtype::BF16);
    let run = |args: &[&str]| run(&workspace, "cpu", &[&STEP[..], args].concat());
    let once = run(&[]);
    assert_eq!(
        once["gradients"],
        json!({"scale": null, "norm": null, "clip_norm": null, "clip_tensor_norm": null, "clip_factor": null, "clip_value": null})
    );
    let other = run(&["--clip-value", "1", "--grad-scale", "4"]);
    assert_eq!(other["bytes_read"], once["bytes_read"]);
    assert_eq!(
        other["gradients"],
        json!({"scale": 4.0, "norm": null, "clip_norm": null, "clip_tensor_norm": null, "clip_factor": null, "clip_value": 1.0})
    );
    let twice = run(&["--clip-norm", "1000000", "--repeat", "3"]);
    let numel: usize = TENSORS.iter().map(|(_, numel)| numel).sum();
    let [read, again] = [&once, &twice].map(|report| report["bytes_read"].as_u64().unwrap());
    assert_eq!(again, read + 2 * numel as u64);
    assert_eq!(twice["gradients"]["clip_factor"], 1.0);

    write_grads(&workspace, &[("a", vec![3.0; 7])], Dtype::F32);
    let text = |args: &[&str]| {
        let mut step = workspace.step();
        step.args(["--device", "cpu"]).args(STEP).args(args);
        String::from_utf8(step.output().unwrap().stdout).unwrap()
    };
    // The norm is 3*sqrt(7)/2.
    let printed = text(&[
        "--grad-scale",
        "2",
        "--clip-norm",
        "2",
        "--clip-value",
        "0.5",
    ]);
    assert!(
        printed.contains(
            "gradients   divided by 2, norm 3.968626966596886, multiplied by 0.5039525, cut off at 0.5\n"
        ),
        "{printed}"
    );
    let printed = text(&["--clip-tensor-norm", "2"]);
    let line =
        "gradients   norm 7.937253933193772, each tensor multiplied by at least 0.25197628\n";
    assert!(printed.contains(line), "{printed}");
    assert!(!text(&[]).contains("gradients"));
}

#[test]
fn what_is_not_finite_is_refused_skipped_or_applied_under_a_norm() {
    for device in DEVICES {
        for dtype in [Dtype::F32, Dtype::BF16] {
            let mut bad = grads(1.0);
            bad[3].1[249_999] = f32::INFINITY;
            let workspace = with(&bad, Dtype::F32, dtype);
            let clip = [&STEP[..], &["--clip-norm", "1", "--device", device]].concat();
            let words = "tensor \"d\": 1 of 250000 gradient elements are infinite or NaN";
            refused(&workspace, &clip, &[words, "the first at index 249999"]);

            let skip = [&clip[..], &["--nonfinite", "skip"]].concat();
            let mut step = workspace.step();
            let output = step.args(&skip).output().unwrap();
            assert!(output.status.success(), "{output:?}");
            let text = String::from_utf8(output.stdout).unwrap();
            for line in [
                "the outputs are the inputs",
                "norm inf, multiplied by 0",
                "0 updated, 5 frozen",
            ] {
                assert!(text.contains(line), "{text}");
            }
            let read = |name: &str| std::fs::read(workspace.path(name)).unwrap();
            assert!(read("out_params") == read("params"));
            let report: Value =
                serde_json::from_slice(&step.arg("--json").output().unwrap().stdout).unwrap();
            assert_eq!(report["nonfinite"]["skipped"], true);
            assert_eq!(report["gradients"]["norm"], json!(null));
            // No step was counted.
            let state = Model::read(&workspace.path("out_state"));
            assert_eq!(state.metadata.unwrap()["steps"], "0");

            // As PyTorch has it: an infinite norm leaves zeros and NaN.
            let apply = [&STEP[..], &["--clip-norm", "1", "--nonfinite", "apply"]].concat();
            run(&workspace, device, &apply);
            let [before, after] =
                ["params", "out_params"].map(|name| Model::read(&workspace.path(name)));
            for (name, numel) in TENSORS {
                let [before, after] = [&before, &after].map(|model| model.tensors[name].values());
                let of_finite = if name == "d" { 249_999 } else { numel };
                assert!(bits(&before[..of_finite]) == bits(&after[..of_finite]));
                assert!(after[of_finite..].iter().all(|value| value.is_nan()));
            }
        }
    }
}

/// Divided by a scale below one, gradients may overflow that were finite; a cut would then hide it.
#[test]
fn gradients_that_overflow_when_they_are_divided_are_not_finite() {
    for device in DEVICES {
        let mut large = grads(1.0);
        large[0].1[6] = -1e30;
        let workspace = with(&large, Dtype::F32, Dtype::F32);
        let on_device = ["--device", device];
        for cut in [&[][..], &["--clip-value", "1"], &["--clip-norm", "1"]] {
            let args = [&STEP[..], &on_device, &["--grad-scale", "1e-9"], cut].concat();
            let words =
                "tensor \"a\": 1 of 7 gradient elements are infinite or NaN, the first at index 6";
            refused(
                &workspace,
                &args,
                &[words, "divided by --grad-scale 0.000000001"],
            );
        }
        let args = ["--grad-scale", "1e-8", "--clip-value", "1"];
        run(&workspace, device, &[&STEP[..], &args].concat());
    }
}

#[test]
fn a_norm_that_no_f32_holds_is_reported() {
    let workspace = with(&[("a", vec![3e38; 7])], Dtype::F32, Dtype::F32);
    let report = run(
        &workspace,
        "cpu",
        &[&STEP[..], &["--clip-norm", "1"]].concat(),
    );
    let norm = report["gradients"]["norm"].as_f64().unwrap();
    let expected = f64::from(3e38_f32) * 7_f64.sqrt();
    assert!((norm / expected - 1.0).abs() < 1e-12, "{norm}");
    let out = Model::read(&workspace.path("out_params")).tensors["a"].values();
    assert!(out.iter().all(|value| value.is_finite()), "{out:?}");
}

#[test]
fn numbers_that_say_nothing_are_refused_by_their_flag() {
    let workspace = with(&grads(1.0), Dtype::F32, Dtype::F32);
    for (args, words) in [
        (["--clip-norm", "-1"], "--clip-norm -1.0 is out of range"),
        (["--clip-norm", "nan"], "--clip-norm NaN is out of range"),
        (
            ["--clip-tensor-norm", "-1"],
            "--clip-tensor-norm -1.0 is out of range",
        ),
        (
            ["--clip-value", "1e39"],
            "--clip-value 1e39 is out of range",
        ),
        (["--grad-scale", "0"], "--grad-scale 0.0 is out of range"),
        (
            ["--grad-scale", "1e-42"],
            "--grad-scale 1e-42 is out of range",
        ),
        (["--grad-scale", "-2"], "expected a positive number"),
        (["--clip-value", "much"], "invalid value 'much'"),
    ] {
        refused(&workspace, &[&STEP[..], &args].concat(), &[args[0], words]);
    }
    let both = ["--clip-norm", "1", "--clip-tensor-norm", "1"];
    refused(
        &workspace,
        &[&STEP[..], &both].concat(),
        &["'--clip-norm <X>' cannot be used with '--clip-tensor-norm <X>'"],
    );
    for command in ["bench", "accuracy"] {
        let output = wgpu_optim()
            .args([command, "--clip-norm", "1"])
            .output()
            .unwrap();
        assert_eq!(output.status.code(), Some(2));
        assert!(
            String::from_utf8(output.stderr)
                .unwrap()
                .contains("--clip-norm")
        );
    }
}
