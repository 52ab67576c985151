use std::collections::HashMap;

use safetensors::tensor::{Dtype, SafeTensors};
use wgpu_optim::oracle::{Oracle, Rounding};
use wgpu_optim::readback::block_on;
use wgpu_optim::{
    Arena, ArenaError, ArenaFileError, GpuOptimizer, OPTIONAL_FEATURES, ParamGroups, SgdConfig,
    wgpu,
};

use super::Bench;
use crate::cases::values;

fn config() -> SgdConfig {
    SgdConfig::builder(0.1).momentum(0.9).build().unwrap()
}

/// A file whose tensors stand neither in alphabetical order nor where an `f32` is aligned.
fn model_file() -> Vec<u8> {
    let header = r#"{"z":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
        "ids":{"dtype":"I64","shape":[1],"data_offsets":[24,32]},
        "a":{"dtype":"F32","shape":[],"data_offsets":[32,36]},
        "half":{"dtype":"F16","shape":[2],"data_offsets":[36,40]},
        "bias":{"dtype":"F32","shape":[300],"data_offsets":[40,1240]}} "#;
    assert!(!header.len().is_multiple_of(4));
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    let [z, a, bias] = model_values();
    for (values, other_dtype) in [(z, 8), (a, 4), (bias, 0)] {
        file.extend(values.iter().flat_map(|value| value.to_le_bytes()));
        file.extend(vec![7; other_dtype]);
    }
    file
}

fn model_values() -> [Vec<f32>; 3] {
    [values(1, 6), values(2, 1), values(3, 300)]
}

#[test]
fn an_arena_from_a_file_steps_and_goes_back_into_one() {
    let bench = Bench::best();
    let (device, queue) = (&bench.device, &bench.queue);
    let groups = ParamGroups::new(config())
        .with("a", config(), |name| name == "a")
        .unwrap();
    let file = model_file();
    let loaded = [
        Arena::from_safetensors(device, queue, &file).unwrap(),
        Arena::from_safetensors_with_groups(device, queue, &groups, &file).unwrap(),
    ];
    for ((arena, left_out), in_memory) in loaded.iter().zip([[0, 1, 2], [0, 2, 1]]) {
        let other = [("ids", Dtype::I64), ("half", Dtype::F16)];
        let other = other.map(|(name, dtype)| (name.to_owned(), dtype));
        assert_eq!(left_out, &other);
        let tensors = arena.tensors();
        let shapes = tensors
            .iter()
            .map(|t| (t.name.as_str(), t.shape.as_slice()));
        assert!(shapes.eq([("z", &[2, 3][..]), ("a", &[]), ("bias", &[300])]));
        assert!(in_memory.is_sorted_by_key(|index: &usize| tensors[*index].offset_bytes));
        let params = block_on(device, arena.download_all_params()).unwrap();
        assert_eq!(params, model_values());

        let grads = model_values().map(|start| values(4, start.len()));
        arena.upload_all_grads(&grads).unwrap();
        let mut optimizer = GpuOptimizer::new(&bench.kernels, config(), &arena.bindings()).unwrap();
        bench.step(&mut optimizer);
        let metadata = HashMap::from([("format".to_owned(), "pt".to_owned())]);
        let file = block_on(device, arena.to_safetensors(Some(metadata.clone()))).unwrap();
        let (_, header) = SafeTensors::read_metadata(&file).unwrap();
        assert_eq!(header.metadata(), &Some(metadata));
        let stepped = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(stepped.len(), 3);
        for ((tensor, start), grads) in tensors.iter().zip(model_values()).zip(&grads) {
            let view = stepped.tensor(&tensor.name).unwrap();
            assert_eq!(
                (view.dtype(), view.shape()),
                (Dtype::F32, &tensor.shape[..])
            );
            let mut oracle = Oracle::new(&start, Rounding::WGSL);
            oracle.step(&config(), grads);
            let params: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
            oracle.check_params(&params).unwrap();
        }
    }
}

#[test]
fn a_file_that_makes_no_arena_is_said_and_the_next_one_does() {
    let limits = wgpu::Limits {
        max_buffer_size: 1024,
        max_storage_buffer_binding_size: 1024,
        max_uniform_buffer_binding_size: 1024,
        ..wgpu::Limits::default()
    };
    let bench = Bench::open(wgpu::Features::empty(), limits);
    let load = |bench: &Bench, file: &[u8]| {
        Arena::from_safetensors(&bench.device, &bench.queue, file).map(|(arena, _)| arena)
    };
    let too_large = load(&bench, &model_file());
    assert!(
        matches!(
            &too_large,
            Err(ArenaFileError::Arena(ArenaError::TooLarge { tensor, .. })) if tensor == "bias"
        ),
        "{too_large:?}"
    );
    let cut_short = load(&bench, &model_file()[..500]);
    assert!(
        matches!(cut_short, Err(ArenaFileError::Safetensors(_))),
        "{cut_short:?}"
    );
    let other = Bench::with(OPTIONAL_FEATURES);
    other.device.destroy();
    let lost = load(&other, &model_file());
    assert!(
        matches!(&lost, Err(ArenaFileError::Arena(ArenaError::Device { .. }))),
        "{lost:?}"
    );
    assert_eq!(
        load(Bench::best(), &model_file()).unwrap().tensors().len(),
        3
    );
}
