//! Models in several files with an index.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use safetensors::Dtype;
use serde_json::json;

use crate::DEVICES;
use crate::model::{Model, Tensor, Workspace, values};
use crate::refusals::assert_refused;

/// Writes a model as three files and an index, as Hugging Face's libraries lay them out.
pub fn write_sharded(model: &Model, index: &Path) {
    let stem = index.file_name().unwrap().to_str().unwrap();
    let stem = stem.strip_suffix(".safetensors.index.json").unwrap();
    let mut shards = vec![Model::default(); 3];
    let mut weight_map = BTreeMap::new();
    for (position, (name, tensor)) in model.tensors.iter().enumerate() {
        let shard = position % 3;
        shards[shard].tensors.insert(name.clone(), tensor.clone());
        weight_map.insert(
            name,
            format!("{stem}-{:05}-of-00003.safetensors", shard + 1),
        );
    }
    for (position, mut shard) in shards.into_iter().enumerate() {
        shard.metadata.clone_from(&model.metadata);
        let name = format!("{stem}-{:05}-of-00003.safetensors", position + 1);
        shard.write(&index.with_file_name(name));
    }
    let total: usize = model
        .tensors
        .values()
        .map(|tensor| tensor.bytes.len())
        .sum();
    let json = json!({"metadata": {"total_size": total}, "weight_map": weight_map});
    fs::write(index, serde_json::to_vec_pretty(&json).unwrap()).unwrap();
}

/// All tensors of a model in several files, each from the file that the index names.
pub fn read_sharded(index: &Path) -> Model {
    let json: serde_json::Value = serde_json::from_slice(&fs::read(index).unwrap()).unwrap();
    let mut model = Model::default();
    let mut shards = BTreeMap::new();
    for (name, shard) in json["weight_map"].as_object().unwrap() {
        let shard = shard.as_str().unwrap();
        let of_shard = shards
            .entry(shard.to_owned())
            .or_insert_with(|| Model::read(&index.with_file_name(shard)));
        model
            .tensors
            .insert(name.clone(), of_shard.tensors[name].clone());
    }
    let total: usize = model
        .tensors
        .values()
        .map(|tensor| tensor.bytes.len())
        .sum();
    assert_eq!(json["metadata"]["total_size"], total);
    model
}

/// Two rounds over a model in one file and over the same in three, with the state in one file and in three, and the
/// gradients likewise: the same tensors, bit for bit.
pub fn check_that_shards_are_one_model(device: &str, model: &Model) {
    let workspace = Workspace::new();
    for folder in ["in", "out", "back"] {
        fs::create_dir(workspace.path(folder)).unwrap();
    }
    model.write(&workspace.path("params"));
    write_sharded(model, &workspace.path("in/m.safetensors.index.json"));
    let mut grads = Model::default();
    for (name, tensor) in &model.tensors {
        let is_float = [Dtype::F32, Dtype::BF16, Dtype::F16].contains(&tensor.dtype);
        if is_float && !name.contains("LayerNorm.bias") {
            let numel = tensor.shape.iter().product();
            let gradient = Tensor::f32(&tensor.shape, &values(numel as u64, numel));
            grads.tensors.insert(name.clone(), gradient);
        }
    }
    grads.write(&workspace.path("grads"));
    write_sharded(&grads, &workspace.path("in/g.safetensors.index.json"));

    let step = |grads: &str, from: &str, to: &str, state: Option<&str>, out_state: &str| {
        let mut step = workspace.command("step --lr 0.1 --momentum 0.9 --dampening 0.1");
        step.args(["--device", device, "--params", from, "--grads", grads])
            .args(["--out-params", to, "--out-state", out_state]);
        if let Some(state) = state {
            step.args(["--state", state]);
        }
        step.assert().success();
    };
    let index = |folder: &str| format!("{folder}/m.safetensors.index.json");
    step("grads", "params", "params 1", None, "state 1");
    step("grads", "params 1", "params 2", Some("state 1"), "state 2");
    step(
        "in/g.safetensors.index.json",
        &index("in"),
        &index("out"),
        None,
        "out/s.safetensors.index.json",
    );
    let state = Some("out/s.safetensors.index.json");
    step("grads", &index("out"), &index("back"), state, "back/state");
    // In place, and from a state in one file to one in three.
    step(
        "grads",
        &index("out"),
        &index("out"),
        Some("state 1"),
        "out/s.safetensors.index.json",
    );

    let whole = Model::read(&workspace.path("params 2"));
    let state = Model::read(&workspace.path("state 2"));
    for folder in ["back", "out"] {
        let sharded = read_sharded(&workspace.path(&index(folder)));
        assert!(
            sharded.tensors == whole.tensors,
            "{device}: parameters in {folder}"
        );
        let in_index = fs::read(workspace.path(&index("in"))).unwrap();
        assert!(fs::read(workspace.path(&index(folder))).unwrap() == in_index);
        let shard = Model::read(&workspace.path(folder).join("m-00002-of-00003.safetensors"));
        assert_eq!(shard.metadata, model.metadata);
    }
    assert!(read_sharded(&workspace.path("out/s.safetensors.index.json")).tensors == state.tensors);
    // One file has the same bytes, whatever way it was made.
    assert!(
        fs::read(workspace.path("back/state")).unwrap()
            == fs::read(workspace.path("state 2")).unwrap()
    );
}

fn small_model() -> Model {
    let mut model = Model::new([
        ("ids", Tensor::i64(&[1, 2, 3])),
        ("scalar", Tensor::f32(&[], &[1.5])),
        ("empty", Tensor::f32(&[0, 3], &[])),
        ("LayerNorm.bias", Tensor::f32(&[5], &values(9, 5))),
        (
            "brain",
            Tensor::stored_as(Dtype::BF16, &[67], &values(10, 67)),
        ),
        (
            "half",
            Tensor::stored_as(Dtype::F16, &[3, 31], &values(11, 93)),
        ),
    ]);
    for (index, numel) in [3, 64, 1001, 257].into_iter().enumerate() {
        let tensor = Tensor::f32(&[numel], &values(index as u64, numel));
        model.tensors.insert(format!("layer.{index}"), tensor);
    }
    model.metadata = Some([("format".to_owned(), "pt".to_owned())].into());
    model
}

const MOMENTUM: [&str; 6] = ["--device", "cpu", "--lr", "0.1", "--momentum", "0.9"];

/// The small model in shards, whose index is [`M`], and gradients for it in a file.
fn sharded() -> Workspace {
    let workspace = Workspace::new();
    write_sharded(&small_model(), &workspace.path(M));
    let mut grads = small_model();
    grads.tensors.remove("ids");
    grads.write(&workspace.path("grads"));
    workspace
}

const M: &str = "m.safetensors.index.json";

#[test]
fn shards_are_one_model() {
    for device in DEVICES {
        check_that_shards_are_one_model(device, &small_model());
    }
}

#[test]
fn shards_that_do_not_fit_are_refused() {
    let workspace = sharded();
    let index = workspace.path(M);
    fs::create_dir(workspace.path("out")).unwrap();
    let good = fs::read_to_string(&index).unwrap();

    let refused_from = |params: &str, outputs, words: &[&str]| {
        let before = workspace.snapshot();
        let mut step = workspace.step_between(params, outputs);
        step.args(MOMENTUM);
        assert_refused(&step.output().unwrap(), words);
        assert!(workspace.snapshot() == before, "{words:?}");
        assert_eq!(fs::read_dir(workspace.path("out")).unwrap().count(), 0);
    };
    let refused = |outputs, words: &[&str]| refused_from(M, outputs, words);
    const OUT: &str = "out/m.safetensors.index.json";
    const OUTPUTS: [&str; 2] = [OUT, "out/state"];

    let second = workspace.path("m-00002-of-00003.safetensors");
    let moved = workspace.path("moved");
    fs::rename(&second, &moved).unwrap();
    refused(
        OUTPUTS,
        &[M, "m-00002-of-00003.safetensors", "No such file"],
    );
    fs::rename(&moved, &second).unwrap();
    fs::write(&index, good.replace("\"layer.1\"", "\"layer.9\"")).unwrap();
    refused(OUTPUTS, &[M, "\"layer.9\"", ".safetensors"]);
    fs::write(&index, good.replace("m-00003", "../m-00003")).unwrap();
    refused(OUTPUTS, &[M, "does not lie in the folder"]);
    fs::write(
        &index,
        "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n",
    )
    .unwrap();
    refused(OUTPUTS, &[M, "Git LFS pointer", "git lfs pull"]);
    fs::write(&index, "{}").unwrap();
    refused(OUTPUTS, &[M, "weight_map"]);
    fs::write(&index, &good).unwrap();

    // One file and several do not go together, and what belongs to an index changes with it or not at all.
    refused(
        ["out/params", "out/state"],
        &["--out-params", ".index.json", "out/params"],
    );
    refused_from(
        "grads",
        [OUT, "out/state"],
        &["--out-params", "single file"],
    );
    refused(
        ["n.safetensors.index.json", "out/state"],
        &["m-00001-of-00003.safetensors", M, "would stay as it is"],
    );
    refused(
        [OUT, "m-00001-of-00003.safetensors"],
        &[
            "m-00001-of-00003.safetensors",
            "--out-state and --params are the same file",
        ],
    );
    refused(
        [OUT, OUT],
        &["--out-params", "--out-state", "the same file"],
    );
}

/// Only one of both would be stepped, and which of them a program reads is its own affair.
#[test]
fn a_tensor_in_two_shards_is_refused_where_it_would_be_stepped() {
    let workspace = Workspace::new();
    let model = small_model();
    write_sharded(&model, &workspace.path("m.safetensors.index.json"));
    let path = workspace.path("m-00002-of-00003.safetensors");
    let mut second = Model::read(&path);
    assert!(!second.tensors.contains_key("layer.0"));
    second
        .tensors
        .insert("layer.0".into(), model.tensors["layer.0"].clone());
    second.write(&path);
    let step = |name: &str| {
        let tensors = [(name, model.tensors[name].clone())];
        Model::new(tensors).write(&workspace.path("grads"));
        let mut step = workspace.step_between(M, [M, "state"]);
        step.args(MOMENTUM);
        step.output().unwrap()
    };
    let before = workspace.snapshot();
    let words = "tensor \"layer.0\" is in two files of --params, and m-00002-of-00003.safetensors is not where";
    assert_refused(&step("layer.0"), &[words]);
    fs::remove_file(workspace.path("grads")).unwrap();
    assert!(workspace.snapshot() == before);
    // Frozen, both stay alike.
    assert!(step("layer.1").status.success());
    assert!(Model::read(&path).tensors["layer.0"] == model.tensors["layer.0"]);
}

/// A state without velocities is counts alone, and there may be some beside velocities, too. In several files they are
/// in the index.
#[test]
fn counts_without_velocities_are_kept() {
    let workspace = Workspace::new();
    small_model().write(&workspace.path("params"));
    write_sharded(
        &small_model(),
        &workspace.path("params.safetensors.index.json"),
    );
    let grads = |names: [&str; 2], file: &str| {
        let mut grads = small_model();
        grads
            .tensors
            .retain(|name, _| names.contains(&name.as_str()));
        grads.write(&workspace.path(file));
    };
    grads(["layer.0", "layer.1"], "grads 1");
    grads(["layer.1", "layer.2"], "grads 2");
    let rounds = |ending: &str| {
        let [params, state] = ["params", "state"].map(|file| format!("{file}{ending}"));
        let resume = ["--state", &state];
        for (grads, momentum) in [("grads 1", "0"), ("grads 2", "0"), ("grads 2", "0.9")] {
            let is_first = grads == "grads 1";
            let mut step = workspace.command("step --device cpu --lr 0.1");
            step.args(["--momentum", momentum, "--grads", grads])
                .args(["--params", &params, "--out-params", &params])
                .args(["--out-state", &state])
                .args(resume.iter().filter(|_| !is_first));
            step.assert().success();
        }
    };
    rounds("");
    rounds(".safetensors.index.json");
    // Whatever is written from now on has been read.
    for state in ["state", "state.safetensors.index.json"] {
        workspace
            .command("step")
            .args(MOMENTUM)
            .args(["--params", "params", "--grads", "grads 1"])
            .args(["--out-params", "out_params", "--state", state])
            .args(["--out-state", &format!("from {state}").replace(".json", "")])
            .assert()
            .success();
    }
    let whole = fs::read(workspace.path("from state")).unwrap();
    let applied = r#"{\"layer.0\":1,\"layer.1\":2,\"layer.2\":1}"#;
    assert!(String::from_utf8_lossy(&whole).contains(applied));
    assert!(fs::read(workspace.path("from state.safetensors.index")).unwrap() == whole);
}

/// What is too large for an index is not read, however much of it there is.
#[test]
fn an_index_of_any_size_takes_no_memory() {
    let workspace = Workspace::new();
    let huge = fs::File::create(workspace.path("m.safetensors.index.json")).unwrap();
    huge.set_len(1 << 40).unwrap();
    let mut step = workspace.step_between(M, ["out_params", "out_state"]);
    step.args(MOMENTUM);
    assert_refused(&step.output().unwrap(), &["1099511627776 bytes"]);
}

#[test]
fn files_of_two_states_are_no_state() {
    let workspace = sharded();
    let step = |state: Option<&str>, out: &str| {
        let mut step = workspace.step_between(M, [M, out]);
        step.args(MOMENTUM);
        if let Some(state) = state {
            step.args(["--state", state]);
        }
        step.output().unwrap()
    };
    assert!(step(None, "s.safetensors.index.json").status.success());
    assert!(
        step(Some("s.safetensors.index.json"), "t.safetensors.index.json")
            .status
            .success()
    );
    fs::copy(
        workspace.path("t-00002-of-00003.safetensors"),
        workspace.path("s-00002-of-00003.safetensors"),
    )
    .unwrap();
    let before = workspace.snapshot();
    let output = step(Some("s.safetensors.index.json"), "u.safetensors.index.json");
    assert_refused(
        &output,
        &["s-00002-of-00003.safetensors", "not of one state"],
    );
    assert!(workspace.snapshot() == before);
}
