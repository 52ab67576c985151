//! Several adapters, some of them unusable or called the same, and what their numbers mean.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::Write as _;
use std::path::{Path, PathBuf};

use assert_cmd::Command;
use serde_json::Value;
use wgpu_optim::{AdapterRequest, Arena, Gpu, GpuOptimizer, Kernels, SgdConfig, wgpu};

use crate::benchmark::{report, rows};
use crate::model::{Model, Tensor, Workspace};
use crate::refusals::assert_refused;
use crate::reports::json;
use crate::wgpu_optim;

/// The Vulkan loader's description of one of Mesa's drivers; without it, a line on stderr.
fn driver(name: &str) -> Option<PathBuf> {
    let directories = ["/usr/share/vulkan/icd.d", "/etc/vulkan/icd.d"];
    let files = directories
        .iter()
        .filter_map(|directory| fs::read_dir(directory).ok())
        .flatten()
        .map(|entry| entry.unwrap().path());
    let found = files.into_iter().find(|path| {
        let file = path.file_name().unwrap().to_string_lossy();
        file.starts_with(name) && file.ends_with(".json") && !file.contains("i686")
    });
    if found.is_none() {
        eprintln!("not run: this machine has no Vulkan driver {name}");
    }
    found
}

/// On a machine with these Vulkan drivers alone.
fn with_drivers(drivers: &[impl AsRef<Path>]) -> Command {
    let drivers = std::env::join_paths(drivers.iter().map(AsRef::as_ref)).unwrap();
    let mut command = wgpu_optim();
    command
        .env("WGPU_BACKEND", "vulkan")
        .env("VK_DRIVER_FILES", &drivers)
        .env("VK_ICD_FILENAMES", &drivers)
        // Mesa's device selection would look for a display server, and reorder.
        .env("NODEVICE_SELECT", "1");
    command
}

/// RADV shows a GPU that is not there, and gives no device of it.
fn with_null_hardware(drivers: &[PathBuf], family: &str) -> Command {
    let mut command = with_drivers(drivers);
    command.env("RADV_FORCE_FAMILY", family);
    command
}

const NULL: &str = "Null hardware";

/// A step of a tiny model.
fn step(workspace: &Workspace, mut command: Command) -> Command {
    let model = Model::new([("a", Tensor::f32(&[1], &[1.0]))]);
    model.write(&workspace.path("params"));
    model.write(&workspace.path("grads"));
    command
        .current_dir(workspace.path(""))
        .args("step --params params --grads grads --lr 0.1 --json".split(' '));
    command.args(["--out-params", "out_params", "--out-state", "out_state"]);
    command
}

/// The one line of a failure; drivers may say more on stderr.
fn error(command: &mut Command, code: i32) -> String {
    let output = command.output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    let mut lines = stderr.lines().filter(|line| line.starts_with("error: "));
    let line = lines.next_back().expect("a failure says why");
    line.to_owned()
}

fn list(report: &Value) -> &[Value] {
    report["adapters"].as_array().unwrap()
}

/// Number and name of each adapter of a report.
fn names(report: &Value) -> Vec<(u64, &str)> {
    let adapters = list(report).iter();
    adapters
        .map(|about| {
            let name = about["full_name"].as_str().unwrap();
            (about["number"].as_u64().unwrap(), name)
        })
        .collect()
}

const BENCH: [&str; 5] = ["bench", "--numel", "1K", "--seconds", "0"];

#[test]
fn an_adapter_that_gives_no_device_ends_nothing() {
    let (Some(radv), Some(lavapipe)) = (driver("radeon"), driver("lvp")) else {
        return;
    };
    let both = [radv, lavapipe];
    let run = || with_null_hardware(&both, "navi21");
    let is_null = |adapter: &&Value| adapter["name"].as_str().unwrap().starts_with(NULL);
    let gives_none = |text: &Value| text.as_str().unwrap().contains("gave no device");

    let info = json(&run().args(["info", "--json"]).output().unwrap());
    assert_eq!(list(&info).len(), 2);
    let measured = report(run().args(BENCH).arg("--all-adapters"));
    for found in [&info, &measured] {
        for adapter in list(found) {
            if is_null(&adapter) {
                assert!(gives_none(&adapter["error"]), "{adapter}");
            } else {
                assert!(adapter["error"].is_null(), "{adapter}");
            }
        }
    }
    let sound = list(&info)
        .iter()
        .find(|adapter| !is_null(adapter))
        .unwrap();
    let devices: BTreeSet<_> = rows(&measured)
        .iter()
        .map(|row| &row["device"])
        .map(Value::to_string)
        .collect();
    let expected = [sound["full_name"].to_string(), "\"CPU\"".to_owned()];
    assert_eq!(devices, BTreeSet::from(expected));
    for command in ["info", "bench"] {
        let mut text = run();
        match command {
            "info" => text.arg("info"),
            _ => text.args(BENCH).arg("--all-adapters"),
        };
        let text = String::from_utf8(text.output().unwrap().stdout).unwrap();
        assert!(text.contains("gave no device"), "{text}");
    }

    // The next best takes its place, and it is said why.
    let measured = report(run().args(BENCH));
    assert_eq!(list(&measured)[0]["number"], sound["number"]);
    assert_eq!(list(&measured)[0]["full_name"], sound["full_name"]);
    assert!(gives_none(&measured["reason"]));
    let of_one_rule = ["accuracy", "--rule", "sgd", "--json"];
    let accuracy = json(&run().args(of_one_rule).output().unwrap());
    assert_eq!(accuracy["adapter"], sound["full_name"]);
    assert!(gives_none(&accuracy["reason"]));
    let workspace = Workspace::new();
    for (device, backend) in [("auto", "cpu"), ("gpu", "gpu")] {
        let mut step = step(&workspace, run());
        let done = json(&step.args(["--device", device]).output().unwrap());
        assert_eq!(done["backend"], backend);
        assert!(gives_none(&done["reason"]), "{done}");
    }

    // Not where it was asked for.
    let line = error(step(&workspace, run()).args(["--adapter", "null"]), 1);
    assert!(
        line.contains(NULL) && line.contains("gave no device"),
        "{line}"
    );
    let alone = || with_null_hardware(&both[..1], "navi21");
    for all in [&["--all-adapters"][..], &[]] {
        let measured = report(alone().args(BENCH).args(all));
        assert!(rows(&measured).iter().all(|row| row["device"] == "CPU"));
        assert!(gives_none(&measured["reason"]));
        let line = error(alone().args(BENCH).args(all).args(["--device", "gpu"]), 1);
        assert!(
            line.contains(NULL) && line.contains("gave no device"),
            "{line}"
        );
    }
}

#[test]
fn adapters_of_one_name_are_told_apart_by_number() {
    let Some(lavapipe) = driver("lvp") else {
        return;
    };
    // The loader loads a driver as often as it is described.
    let workspace = Workspace::new();
    let twice = [workspace.path("a.json"), workspace.path("b.json")];
    for description in &twice {
        fs::copy(&lavapipe, description).unwrap();
    }
    let info = |args: &[&str]| {
        let mut info = with_drivers(&twice);
        json(&info.args(["info", "--json"]).args(args).output().unwrap())
    };
    let found = info(&[]);
    let [(0, first), (1, second)] = names(&found)[..] else {
        panic!("{found}")
    };
    let name = &list(&found)[0]["name"];
    assert_eq!(*name, list(&found)[1]["name"]);
    assert_ne!(first, second);
    for (number, expected) in [("0", first), ("1", second)] {
        let by_number = ["--adapter", number];
        assert_eq!(
            names(&info(&by_number))[..],
            [(number.parse().unwrap(), expected)]
        );
        let mut step = step(&workspace, with_drivers(&twice));
        let done = json(&step.args(by_number).output().unwrap());
        assert_eq!(done["adapter"], expected);
        let measured = report(with_drivers(&twice).args(BENCH).args(by_number));
        assert_eq!(names(&measured), [(number.parse().unwrap(), expected)]);
    }
    let measured = report(with_drivers(&twice).args(BENCH).arg("--all-adapters"));
    assert_eq!(names(&measured), names(&found));
    for device in [first, second] {
        let fused = |row: &&Value| row["path"] == "fused" && row["device"] == device;
        // One for each form.
        assert_eq!(rows(&measured).iter().filter(fused).count(), 2);
    }

    // Digits that are no number of an adapter are text: "llvmpipe (LLVM 15.0.6, 256 bits)".
    let name = name.as_str().unwrap();
    if name.contains("256") {
        assert_eq!(names(&info(&["--adapter", "256"])), names(&found));
    }
    let all = ["0: ", "1: ", name, "no adapter found"];
    for command in [&["info"][..], &BENCH, &["accuracy"]] {
        let mut command_line = with_drivers(&twice);
        let line = error(command_line.args(command).args(["--adapter", "777"]), 2);
        assert!(
            line.contains("777") && all.iter().all(|part| line.contains(part)),
            "{line}"
        );
    }
}

/// A model file of one tensor of zeros, which take no room on the disk.
fn sparse_model(path: &Path, numel: u64) {
    let bytes = 4 * numel;
    let header =
        format!(r#"{{"w":{{"dtype":"F32","shape":[{numel}],"data_offsets":[0,{bytes}]}}}}"#);
    let mut file = File::create(path).unwrap();
    file.write_all(&(header.len() as u64).to_le_bytes())
        .unwrap();
    file.write_all(header.as_bytes()).unwrap();
    file.set_len(8 + header.len() as u64 + bytes).unwrap();
}

/// More elements than a slow adapter is given at a time.
const LARGE: u64 = 70_000_000;

#[test]
fn info_plans_as_an_optimizer_does() {
    let workspace = Workspace::new();
    let model = workspace.path("model");
    sparse_model(&model, LARGE);
    let request = AdapterRequest {
        backends: wgpu::Backends::from_env().unwrap_or(wgpu::Backends::PRIMARY),
        ..AdapterRequest::default()
    };
    let Gpu {
        adapter,
        device,
        queue,
    } = Gpu::open_blocking(&request).unwrap();
    let kernels = Kernels::new(&device, &queue).unwrap();
    let arena = Arena::new(&device, &queue, [("w", vec![LARGE as usize])]).unwrap();
    let config = SgdConfig::builder(0.1).momentum(0.9).build().unwrap();
    let optimizer = GpuOptimizer::new(&kernels, config, &arena.bindings()).unwrap();
    let info = |mut command: Command| {
        command.args(["info", "--json", "--plan"]).arg(&model);
        json(&command.output().unwrap())
    };
    let found = info(wgpu_optim());
    let same = |entry: &&Value| entry["name"] == adapter.get_info().name;
    let plan = &list(&found).iter().find(same).unwrap()["plan"];
    assert_eq!(plan["pieces"], optimizer.plan().pieces.len());
    assert_eq!(
        plan["dispatches"],
        optimizer.plan().dispatches(|_| Some(())).len()
    );

    // An integrated GPU, whose bindings hold more than it is given at a time.
    let Some(radv) = driver("radeon") else {
        return;
    };
    let found = info(with_null_hardware(&[radv], "raven"));
    let [integrated] = list(&found) else {
        panic!("{found}")
    };
    assert_eq!(integrated["device_type"], "IntegratedGpu");
    let binding = integrated["max_storage_buffer_binding_bytes"]
        .as_u64()
        .unwrap();
    assert!(binding > 4 * LARGE);
    assert_eq!(integrated["plan"]["pieces"], 1);
    assert_eq!(integrated["plan"]["dispatches"], 2);
}

#[test]
fn a_model_that_does_not_fit_one_adapter_is_planned_on_the_others() {
    let workspace = Workspace::new();
    let model = workspace.path("model");
    // Larger than any buffer may be.
    sparse_model(&model, 1 << 40);
    let run = |args: &[&str]| {
        let mut info = wgpu_optim();
        info.args(["info", "--plan"])
            .arg(&model)
            .args(args)
            .output()
            .unwrap()
    };
    let report = json(&run(&["--json"]));
    assert!(!list(&report).is_empty());
    for adapter in list(&report) {
        let error = adapter["plan"]["error"].as_str().unwrap();
        assert!(error.contains("\"w\""), "{error}");
    }
    let text = String::from_utf8(run(&[]).stdout).unwrap();
    assert!(
        text.contains("no plan") && text.contains("CPU twin: "),
        "{text}"
    );
}

#[test]
fn a_backend_that_is_not_there_is_refused() {
    for (typed, words) in [
        (
            "nonsense",
            &["\"nonsense\"", "vulkan, metal, dx12 or gl"][..],
        ),
        ("vulkan,", &["\"\"", "vulkan, metal, dx12 or gl"]),
        ("vulkan, opengl, d3d13", &["\" d3d13\""]),
        #[cfg(target_os = "linux")]
        (
            "metal,dx12",
            &["a backend of this system, which has", "vulkan"],
        ),
    ] {
        for command in [&["info"][..], &BENCH, &["accuracy"]] {
            let command = wgpu_optim()
                .env("WGPU_BACKEND", typed)
                .args(command)
                .unwrap_err();
            let output = command.as_output().unwrap();
            assert_refused(output, &[&format!("WGPU_BACKEND={typed}")]);
            assert_refused(output, words);
        }
    }
    // One that is empty is none.
    let info = |backend: &str| {
        let mut info = wgpu_optim();
        info.env("WGPU_BACKEND", backend).args(["info", "--json"]);
        json(&info.output().unwrap())
    };
    assert_eq!(names(&info("")), names(&info("vulkan,metal,dx12")));
}

/// In a container nobody has a display, and nobody wants one.
#[cfg(target_os = "linux")]
#[test]
fn nothing_is_said_of_a_display() {
    for (directory, backend) in [
        (None, "vulkan"),
        (Some("relative"), "vulkan"),
        (None, "vulkan,gl"),
    ] {
        let mut info = wgpu_optim();
        info.env_remove("NODEVICE_SELECT")
            .env_remove("XDG_RUNTIME_DIR")
            .envs(directory.map(|directory| ("XDG_RUNTIME_DIR", directory)))
            .env("WGPU_BACKEND", backend)
            .arg("info");
        let output = info.output().unwrap();
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(output.status.success(), "{stderr}");
        assert!(!stderr.contains("XDG_RUNTIME_DIR"), "{stderr}");
    }
    // Whatever else is said there is still said.
    if driver("lvp").is_none() {
        return;
    }
    let mut info = wgpu_optim();
    info.env_remove("XDG_RUNTIME_DIR")
        .env("VK_LOADER_DEBUG", "all");
    let stderr = String::from_utf8(info.arg("info").output().unwrap().stderr).unwrap();
    assert!(stderr.contains("lvp_icd"), "{stderr}");
}
