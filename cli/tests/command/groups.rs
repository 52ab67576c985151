//! Groups on the command line, and what is not typed because the state says it.

use std::collections::BTreeMap;
use std::fs;

use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::state::Recorded as _;
use wgpu_optim::{AdamConfig, AnyRule, SgdConfig};

use crate::DEVICES;
use crate::model::{Model, Tensor, Workspace, values};
use crate::refusals::{assert_refused, refused};
use crate::reports::json;

const SIZES: [(&str, usize); 4] = [
    ("0.weight", 70),
    ("0.bias", 7),
    ("norm.weight", 5),
    ("norm.bias", 3),
];

const NO_DECAY: &str = "match=*.bias,weight_decay=0";

fn model(seed: u64) -> Model {
    let mut model = Model::default();
    for (index, (name, numel)) in SIZES.into_iter().enumerate() {
        let values = values(seed + index as u64, numel);
        let tensor = Tensor::f32(&[numel], &values);
        model.tensors.insert(name.to_owned(), tensor);
    }
    model
}

/// A step from `params`, `state` where there is one, and new gradients; its outputs are the next one's inputs.
fn step(workspace: &Workspace, device: &str, seed: u64, args: &[&str]) -> (String, Model) {
    let grads = model(seed);
    grads.write(&workspace.path("grads"));
    let mut step = workspace.step();
    step.args(["--device", device]).args(args);
    if workspace.path("state").exists() {
        step.args(["--state", "state"]);
    }
    let output = step.output().unwrap();
    let [stdout, stderr] =
        [output.stdout, output.stderr].map(|text| String::from_utf8(text).unwrap());
    assert!(output.status.success(), "{stderr}");
    workspace.go_on();
    (stdout, grads)
}

/// Steps a model by its groups, the flags typed at the first step alone; compares every element with the oracle.
fn check(flags: &[&str], repeat: u64, config_of: impl Fn(&str) -> AnyRule) {
    for device in DEVICES {
        let rounding = if device == "cpu" {
            Roundoff::NEAREST
        } else {
            Roundoff::WGSL
        };
        let workspace = Workspace::new();
        let start = model(1);
        start.write(&workspace.path("params"));
        let oracle = |(name, tensor): (&String, &Tensor)| {
            (name.clone(), Oracle::new(&tensor.values(), rounding))
        };
        let mut oracles: BTreeMap<_, _> = start.tensors.iter().map(oracle).collect();
        for round in 0..3 {
            let typed = match round {
                0 => flags,
                _ => &[],
            };
            let repeat_text = repeat.to_string();
            let args = [typed, &["--repeat", &repeat_text]].concat();
            let (_, grads) = step(&workspace, device, 100 * (round + 1), &args);
            let params = Model::read(&workspace.path("params"));
            let state = Model::read(&workspace.path("state"));
            for (name, oracle) in &mut oracles {
                for _ in 0..repeat {
                    oracle.step(&config_of(name), &grads.tensors[name].values());
                }
                let compared = oracle.check_params(&params.tensors[name].values());
                compared.unwrap_or_else(|e| panic!("{device}, {name} after round {round}: {e}"));
                // A group without momentum keeps none.
                let velocity = state.tensors.get(&format!("{name}.momentum_buffer"));
                if let Some(velocity) = velocity {
                    oracle
                        .check_slot("momentum_buffer", &velocity.values())
                        .unwrap();
                }
            }
        }
    }
}

#[test]
fn every_group_steps_by_its_own_hyper_parameters_and_the_state_remembers_them() {
    let decay = AdamConfig::adamw(1e-2).weight_decay(0.5);
    check(
        &[
            "--rule",
            "adamw",
            "--lr",
            "1e-2",
            "--weight-decay",
            "0.5",
            "--group",
            NO_DECAY,
        ],
        2,
        |name| {
            let of_bias = if name.ends_with("bias") { 0.0 } else { 0.5 };
            decay.weight_decay(of_bias).build().unwrap().into()
        },
    );
    // The first that matches; one group keeps no momentum.
    let sgd = SgdConfig::builder(0.1).momentum(0.9).weight_decay(0.25);
    check(
        &[
            "--lr",
            "0.1",
            "--momentum",
            "0.9",
            "--weight-decay",
            "0.25",
            "--group",
            "match=norm.*,momentum=0,lr=0.01",
            "--group",
            "match=*.bias,match=none,weight_decay=0,nesterov=true",
        ],
        1,
        |name| match name {
            "norm.weight" | "norm.bias" => {
                let norm = SgdConfig::builder(0.01).weight_decay(0.25);
                norm.build().unwrap().into()
            }
            "0.bias" => {
                let bias = sgd.weight_decay(0.0).nesterov(true);
                bias.build().unwrap().into()
            }
            _ => sgd.build().unwrap().into(),
        },
    );
}

#[test]
fn a_line_for_each_group_says_what_is_in_it_and_where_it_is_from() {
    let workspace = Workspace::new();
    model(1).write(&workspace.path("params"));
    let groups = ["--group", NO_DECAY, "--group", "match=norm.*,lr=0.5"];
    let first = [
        &["--rule", "adamw", "--lr", "0.1", "--beta2", "0.95"],
        &groups[..],
    ]
    .concat();
    let has = |text: &str, lines: &[&str]| {
        for line in lines {
            assert!(
                text.contains(&format!("{line}\n")),
                "{line:?} is not in {text}"
            );
        }
    };
    let (text, _) = step(&workspace, "cpu", 100, &first);
    has(
        &text,
        &[
            "rule        adamw --lr 0.1 --beta2 0.95",
            "group       match=*.bias,weight_decay=0: 2 tensors, 10 elements",
            "group       match=norm.*,lr=0.5: 1 tensors, 5 elements",
            "group       all others: 1 tensors, 70 elements",
        ],
    );
    let saved = Model::read(&workspace.path("state")).metadata.unwrap();
    assert_eq!(
        saved["groups"],
        r#"[{"match":["*.bias"],"weight_decay":0},{"match":["norm.*"],"lr":0.5}]"#
    );
    let (text, _) = step(&workspace, "cpu", 200, &["--lr", "0.2"]);
    has(
        &text,
        &[
            "rule        adamw --lr 0.2; beta1 0.9, beta2 0.95, decoupled_weight_decay 0.01, eps 1e-8, form corrected \
             from state",
            "group       match=*.bias,weight_decay=0: 2 tensors, 10 elements; from state",
            "group       match=norm.*,lr=0.5: 1 tensors, 5 elements; from state",
        ],
    );
    assert!(!text.contains("note"), "{text}");
    // A rule that is named is the state's, and a contradiction is said.
    let contradicting = ["--rule", "adamw", "--beta1", "0.8", "--group", NO_DECAY];
    let (text, _) = step(&workspace, "cpu", 300, &contradicting);
    has(
        &text,
        &[
            "note        beta1 is 0.8, and was 0.9 where the state was made",
            "note        groups are match=*.bias,weight_decay=0, and were match=*.bias,weight_decay=0 and \
             match=norm.*,lr=0.5 where the state was made",
        ],
    );
    let words = ["--beta1 0.8; beta2 0.95, ", "lr 0.2 from state"];
    assert!(words.iter().all(|words| text.contains(words)), "{text}");
    let (text, _) = step(&workspace, "cpu", 400, &["--no-groups", "--json"]);
    let report: serde_json::Value = serde_json::from_str(&text).unwrap();
    assert_eq!(report["groups"], serde_json::json!([]));
    assert_eq!(report["rule"]["beta1"], 0.8);
    assert_eq!(report["rule"]["from_state"]["beta1"], 0.8);
    let saved = Model::read(&workspace.path("state")).metadata.unwrap();
    assert!(!saved.contains_key("groups"));
    let rule = AdamConfig::from_record(&saved["rule"]).unwrap();
    let typed = AdamConfig::adamw(0.2).betas(0.8, 0.95);
    assert_eq!(rule, typed.build().unwrap());
}

/// A state of the library's own says of groups nothing, and of the rule all.
#[test]
fn a_state_without_groups_goes_on_without() {
    let workspace = Workspace::new();
    model(1).write(&workspace.path("params"));
    let config = SgdConfig::builder(0.25).momentum(0.5).nesterov(true);
    let tensors = SIZES.map(|(name, numel)| (name, vec![numel]));
    let mut optimizer = wgpu_optim::CpuOptimizer::new(config.build().unwrap(), tensors).unwrap();
    let (mut params, grads) = (model(1), model(2));
    let mut slices: Vec<_> = SIZES
        .iter()
        .map(|(name, _)| params.tensors[*name].values())
        .collect();
    let grads: Vec<_> = SIZES
        .iter()
        .map(|(name, _)| grads.tensors[*name].values())
        .collect();
    let mut step_by_library = |slices: &mut Vec<Vec<f32>>, grads: &[Vec<f32>]| {
        let mut params: Vec<_> = slices.iter_mut().map(Vec::as_mut_slice).collect();
        let grads: Vec<_> = grads.iter().map(Vec::as_slice).collect();
        optimizer.step(&mut params, &grads).unwrap();
        optimizer.state().to_safetensors().unwrap()
    };
    let state = step_by_library(&mut slices, &grads);
    fs::write(workspace.path("state"), state).unwrap();
    for ((name, numel), values) in SIZES.iter().zip(&slices) {
        params
            .tensors
            .insert((*name).to_owned(), Tensor::f32(&[*numel], values));
    }
    params.write(&workspace.path("params"));
    let (text, grads) = step(&workspace, "cpu", 300, &[]);
    assert!(
        text.contains("rule        sgd; form heavy-ball, lr 0.25, momentum 0.5, nesterov"),
        "{text}"
    );
    let grads: Vec<_> = SIZES
        .iter()
        .map(|(name, _)| grads.tensors[*name].values())
        .collect();
    step_by_library(&mut slices, &grads);
    let params = Model::read(&workspace.path("params"));
    for ((name, _), values) in SIZES.iter().zip(&slices) {
        assert_eq!(params.tensors[*name].values(), *values, "{name}");
    }
}

#[test]
fn groups_that_mean_nothing_are_refused() {
    let workspace = Workspace::with(&model(1), &model(2));
    for (group, words) in [
        (
            "match=*.biases,weight_decay=0",
            &[
                "--group match=*.biases,weight_decay=0: it matches no tensor; there are \"0.bias\", \"0.weight\", ",
            ][..],
        ),
        (
            "match=*,wd=0",
            &[
                "--group match=*,wd=0: the rule has no wd, expected match or one of ",
                "weight_decay",
            ],
        ),
        ("match=*,rule=adam", &["the rule has no rule"]),
        ("weight_decay=0", &["expected match=GLOB"]),
        ("match=[,lr=1", &["match=[: "]),
        ("match=*,lr=1,lr=2", &["lr is given twice"]),
        ("match=*,lr", &["expected FIELD=VALUE"]),
        ("match=*,lr=x", &["lr=\"x\": expected a number"]),
        ("match=*,momentum=-1", &["momentum = -1.0 is out of range"]),
        (
            "match=*.bias,form=ema",
            &["would be of the ema form, expected heavy-ball"],
        ),
    ] {
        let args = ["--lr", "0.1", "--momentum", "0.9", "--group", group];
        refused(&workspace, &args, words);
    }
    refused(
        &workspace,
        &[],
        &["expected --lr, the learning rate: there is no state"],
    );
    // Of another form than the state.
    let workspace = Workspace::with(&model(1), &model(2));
    step(
        &workspace,
        "cpu",
        100,
        &["--lr", "0.1", "--momentum", "0.9"],
    );
    refused(
        &workspace,
        &["--state", "state", "--rule", "adam"],
        &["expected --lr", "by the rule sgd"],
    );
    refused(
        &workspace,
        &["--state", "state", "--rule", "adam", "--lr", "1"],
        &["made by the heavy-ball form"],
    );
}

/// Groups of a round are those of a step, and a state in several files has them in each.
#[test]
fn a_round_has_groups_too() {
    let workspace = Workspace::new();
    model(1).write(&workspace.path("global"));
    model(2).write(&workspace.path("local"));
    let round = |args: &[&str]| {
        let mut round = workspace.command("round --global global --local local --device cpu");
        round.args(args);
        json(&round.arg("--json").output().unwrap())
    };
    let first = round(&[
        "--out-state",
        "outer.index.json",
        "--weight-decay",
        "0.5",
        "--group",
        NO_DECAY,
    ]);
    let again = round(&["--state", "outer.index.json"]);
    assert_eq!(first["groups"], again["groups"]);
    assert_eq!(again["groups"][0]["tensors"], 2);
    assert_eq!(again["outer_step"], 2);
    assert_eq!(again["rule"]["from_state"]["weight_decay"], 0.5);
    // By hand: no decay, Nesterov momentum of the first round.
    let [start, local] = [model(1), model(2)].map(|model| model.tensors["0.bias"].values());
    let mut oracle = Oracle::new(&start, Roundoff::NEAREST);
    let config = SgdConfig::builder(0.7).momentum(0.9).nesterov(true);
    let mut global = start;
    for _ in 0..2 {
        let grads: Vec<_> = global
            .iter()
            .zip(&local)
            .map(|(global, local)| global - local)
            .collect();
        oracle.step(&config.build().unwrap(), &grads);
        // Each of the rounds is within the bound; the second starts from what the first has made.
        global = oracle.params().map(|param| param as f32).collect();
    }
    let written = Model::read(&workspace.path("global"));
    for (ours, expected) in written.tensors["0.bias"]
        .values()
        .iter()
        .zip(oracle.params())
    {
        // Two steps of a handful of roundings each, of numbers below 8.
        assert!((f64::from(*ours) - expected).abs() <= 16.0 * 8.0 * f64::from(f32::EPSILON));
    }
    let missing = workspace
        .command("round --global global --local local --out-state x --group match=nothing,lr=1");
    let mut missing = missing;
    assert_refused(&missing.output().unwrap(), &["it matches no tensor"]);
}
