//! Gradients that are not what a step can apply.

use safetensors::Dtype;
use serde_json::{Value, json};

use crate::DEVICES;
use crate::model::{Model, Tensor, Workspace, values};
use crate::refusals::refused;

const STEP: [&str; 4] = ["--lr", "0.1", "--momentum", "0.9"];

/// A model of two tensors whose second gradient has what is given at each index.
fn with(found: &[(usize, f32)]) -> Workspace {
    let workspace = Workspace::new();
    let tensors = [
        ("a", Tensor::f32(&[7], &values(1, 7))),
        ("b", Tensor::f32(&[3, 100], &values(2, 300))),
        ("ids", Tensor::i64(&[1])),
    ];
    Model::new(tensors).write(&workspace.path("params"));
    let mut grads = values(3, 300);
    for (index, value) in found {
        grads[*index] = *value;
    }
    let grads = [
        ("a", Tensor::f32(&[7], &values(4, 7))),
        ("b", Tensor::f32(&[3, 100], &grads)),
    ];
    Model::new(grads).write(&workspace.path("grads"));
    workspace
}

fn run(workspace: &Workspace, device: &str, args: &[&str]) -> (Option<i32>, Value, String) {
    let mut step = workspace.step();
    let output = step
        .args(["--device", device, "--json"])
        .args(STEP)
        .args(args)
        .output()
        .unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    (
        output.status.code(),
        serde_json::from_slice(&output.stdout).unwrap_or_default(),
        stderr,
    )
}

#[test]
fn what_is_not_finite_refuses_the_step_by_name() {
    for device in DEVICES {
        // A tensor's first, last and only element; a NaN whose payload is all there is to see.
        let quiet = f32::from_bits(0x7f80_0001);
        for (found, count, first) in [
            (&[(299, f32::NAN)][..], 1, 299),
            (&[(0, f32::INFINITY)], 1, 0),
            (
                &[(17, f32::NEG_INFINITY), (18, quiet), (250, -f32::NAN)],
                3,
                17,
            ),
        ] {
            let workspace = with(found);
            let before = workspace.snapshot();
            let (code, _, stderr) = run(&workspace, device, &[]);
            assert_eq!(code, Some(2), "{stderr}");
            let words = format!(
                "tensor \"b\": {count} of 300 gradient elements are infinite or NaN, the first at index {first}"
            );
            assert!(stderr.contains(&words), "{stderr}");
            assert!(
                stderr.contains("--nonfinite skip") && stderr.contains("--nonfinite apply"),
                "{stderr}"
            );
            assert!(workspace.snapshot() == before);
        }
        let largest = with(&[(3, f32::MAX), (4, -f32::MIN_POSITIVE / 2.0)]);
        let (code, report, stderr) = run(&largest, device, &[]);
        assert_eq!(code, Some(0), "{stderr}");
        assert_eq!(
            report["nonfinite"],
            json!({"mode": "refuse", "skipped": false, "gradients": [], "results": []})
        );
    }
}

#[test]
fn a_skipped_step_writes_what_was_there() {
    for device in DEVICES {
        let workspace = with(&[]);
        let (code, _, stderr) = run(&workspace, device, &[]);
        assert_eq!(code, Some(0), "{stderr}");
        for name in ["params", "state"] {
            std::fs::rename(workspace.path(&format!("out_{name}")), workspace.path(name)).unwrap();
        }
        let grads = [("b", Tensor::f32(&[3, 100], &[f32::NAN; 300]))];
        Model::new(grads).write(&workspace.path("grads"));
        // Another learning rate, which would be in the state.
        let args = ["--state", "state", "--nonfinite", "skip", "--lr", "0.2"];
        let mut step = workspace.step();
        step.args(["--device", device, "--momentum", "0.9"])
            .args(args);
        let output = step.output().unwrap();
        assert!(output.status.success(), "{output:?}");
        let text = String::from_utf8(output.stdout).unwrap();
        assert!(
            text.contains("the outputs are the inputs") && text.contains("0 updated, 3 frozen"),
            "{text}"
        );
        let files = workspace.snapshot();
        for name in ["params", "state"] {
            let out = workspace.path(&format!("out_{name}"));
            assert!(files[&out] == files[&workspace.path(name)], "{name}");
        }
        let report: Value =
            serde_json::from_slice(&step.arg("--json").output().unwrap().stdout).unwrap();
        let gradient = json!({"tensor": "b", "numel": 300, "count": 300, "first_index": 0});
        assert_eq!(
            report["nonfinite"],
            json!({"mode": "skip", "skipped": true, "gradients": [gradient], "results": []})
        );
    }
}

#[test]
fn a_skipped_first_step_makes_a_state_of_no_steps() {
    let workspace = with(&[(5, f32::NAN)]);
    let (code, _, stderr) = run(&workspace, "cpu", &["--nonfinite", "skip"]);
    assert_eq!(code, Some(0), "{stderr}");
    let state = Model::read(&workspace.path("out_state"));
    assert!(state.tensors.is_empty());
    let metadata = state.metadata.unwrap();
    assert_eq!(
        (
            metadata["steps"].as_str(),
            metadata["applied_steps"].as_str()
        ),
        ("0", "{}")
    );
    // It goes on from there.
    let again = with(&[]);
    std::fs::copy(workspace.path("out_state"), again.path("state")).unwrap();
    let (code, _, stderr) = run(&again, "cpu", &["--state", "state"]);
    assert_eq!(code, Some(0), "{stderr}");
    let state = Model::read(&again.path("out_state")).metadata.unwrap();
    assert_eq!(state["applied_steps"], "{\"a\":1,\"b\":1}");
}

#[test]
fn what_is_not_finite_is_applied_where_that_is_asked_for() {
    for device in DEVICES {
        let workspace = with(&[(5, f32::INFINITY)]);
        let (code, report, stderr) = run(&workspace, device, &["--nonfinite", "apply"]);
        assert_eq!(code, Some(0), "{stderr}");
        assert_eq!(report["nonfinite"]["mode"], "apply");
        let params = Model::read(&workspace.path("out_params")).tensors["b"].values();
        assert_eq!(params[5], f32::NEG_INFINITY);
        assert!(
            params
                .iter()
                .enumerate()
                .all(|(index, x)| index == 5 || x.is_finite())
        );
    }
}

/// Gradients and all that was read are finite, and what the step would leave is not: whatever it is, it would stay so.
#[test]
fn a_step_that_would_leave_what_is_not_finite_is_refused_skipped_or_applied() {
    let f32_of = |value| (Dtype::F32, value, 1.0);
    let f16 = (Dtype::F16, 60_000.0, 1.0);
    let bf16 = (Dtype::BF16, 3.38e38, 1.0);
    for (args, (dtype, param, other), grad, left) in [
        // The square is infinite, and the element would never move again.
        ("--lr 0.1 --rule adam", f32_of(1.0), 1e21, "exp_avg_sq"),
        (
            "--lr 1 --momentum 0.9",
            f32_of(-3e38),
            3e38,
            "F32 parameters",
        ),
        ("--lr 1e38", f32_of(0.0), 10.0, "F32 parameters"),
        // Masters hold it, and what they are rounded to does not.
        ("--lr 1", f16, -6_000.0, "F16 parameters"),
        ("--lr 1", bf16, -2.5e36, "BF16 parameters"),
        ("--lr 1 --masters none", f16, -6_000.0, "F16 parameters"),
        ("--lr 1 --repeat 2", f16, -3_000.0, "F16 parameters"),
    ] {
        for device in DEVICES {
            let workspace = Workspace::new();
            // More than a window on the CPU.
            let numel = 300_001;
            let (mut params, mut grads) = (vec![other; numel], vec![1.0; numel]);
            for index in [270_000, 5] {
                (params[index], grads[index]) = (param, grad);
            }
            let tensors = [
                ("before", Tensor::f32(&[3], &[1.0; 3])),
                ("w", Tensor::stored_as(dtype, &[numel], &params)),
            ];
            Model::new(tensors).write(&workspace.path("params"));
            let tensors = [
                ("before", Tensor::f32(&[3], &[1.0; 3])),
                ("w", Tensor::f32(&[numel], &grads)),
            ];
            Model::new(tensors).write(&workspace.path("grads"));
            let args: Vec<_> = args.split(' ').chain(["--device", device]).collect();
            let words = format!(
                "tensor \"w\": the step would leave 2 of the {numel} elements of its {left} infinite or NaN, the first \
                 at index 5"
            );
            refused(
                &workspace,
                &args,
                &[&words, "--nonfinite skip", "--nonfinite apply"],
            );

            let step = |mode: &str| {
                let mut step = workspace.step();
                step.args(&args).args(["--nonfinite", mode, "--json"]);
                let output = step.output().unwrap();
                assert!(output.status.success(), "{output:?}");
                let report: Value = serde_json::from_slice(&output.stdout).unwrap();
                report["nonfinite"].clone()
            };
            let report = step("skip");
            let found = json!({"tensor": "w", "values": left, "numel": numel, "count": 2, "first_index": 5});
            assert_eq!(
                report,
                json!({"mode": "skip", "skipped": true, "gradients": [], "results": [found]})
            );
            let files = workspace.snapshot();
            assert!(files[&workspace.path("out_params")] == files[&workspace.path("params")]);
            assert_eq!(step("apply")["skipped"], false);
            let [params, state] =
                ["out_params", "out_state"].map(|name| Model::read(&workspace.path(name)));
            let written = match left {
                "exp_avg_sq" => state.tensors["w.exp_avg_sq"].values(),
                _ => params.tensors["w"].values(),
            };
            let is_written = |index: usize| !written[index].is_finite();
            assert!(
                is_written(5) && is_written(270_000) && !is_written(6),
                "{device} {args:?}"
            );
        }
    }
}

/// A gradient that is not finite is what is said, and not what comes of it.
#[test]
fn what_comes_of_a_bad_gradient_is_not_said() {
    for device in DEVICES {
        let workspace = with(&[(5, f32::INFINITY), (6, 3e38)]);
        let (_, report, stderr) = run(
            &workspace,
            device,
            &["--nonfinite", "skip", "--repeat", "3"],
        );
        assert_eq!(
            report["nonfinite"]["gradients"][0]["first_index"], 5,
            "{stderr}"
        );
        assert_eq!(report["nonfinite"]["results"], json!([]));
    }
}

#[test]
fn no_gradient_at_all_counts_no_step() {
    let workspace = with(&[]);
    for (grads, args) in [
        (Model::default(), &[][..]),
        (
            Model::new([("ids", Tensor::i64(&[1]))]),
            &["--skip-non-float"],
        ),
    ] {
        grads.write(&workspace.path("grads"));
        let args = [&STEP[..], args].concat();
        refused(
            &workspace,
            &args,
            &["--grads holds no gradient", "no step has been counted"],
        );
    }
}

#[test]
fn integers_among_the_gradients_are_refused_or_skipped() {
    let workspace = with(&[]);
    let mut grads = Model::read(&workspace.path("grads"));
    grads.tensors.insert("ids".to_owned(), Tensor::i64(&[0]));
    grads.write(&workspace.path("grads"));
    let before = workspace.snapshot();
    let (code, _, stderr) = run(&workspace, "cpu", &[]);
    assert_eq!(code, Some(2), "{stderr}");
    for word in ["tensor \"ids\"", "the gradient is I64", "--skip-non-float"] {
        assert!(stderr.contains(word), "{stderr}");
    }
    assert!(workspace.snapshot() == before);

    let (code, report, stderr) = run(&workspace, "cpu", &["--skip-non-float"]);
    assert_eq!(code, Some(0), "{stderr}");
    assert_eq!(report["tensors_updated"], 2);
    assert_eq!(report["tensors_frozen"], 1);
    assert_eq!(report["tensors_skipped_non_float"], 1);
    let ids = |name: &str| Model::read(&workspace.path(name)).tensors["ids"].clone();
    assert_eq!(ids("out_params"), ids("params"));
}
