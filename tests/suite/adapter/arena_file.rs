use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use wgpu_optim::files::{Header, HeaderError};
use wgpu_optim::gpu::{ArenaError, ArenaFileError};
use wgpu_optim::oracle::{Oracle, Roundoff};
use wgpu_optim::{
    Arena, GpuOptimizer, OPTIONAL_FEATURES, ParamGroups, SgdConfig, StorageType, half, wgpu,
};

use super::{Bench, gpu_test};
use crate::cases::values;

fn config() -> SgdConfig {
    SgdConfig::builder(0.1).momentum(0.9).build().unwrap()
}

/// A file whose tensors stand neither in alphabetical order nor where an `f32` is aligned.
fn model_file() -> Vec<u8> {
    let header = r#"{"__metadata__":{"format":"pt","sshs_model_hash":"0","about":"a test"},"z":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]},
        "ids":{"dtype":"I64","shape":[1],"data_offsets":[24,32]},
        "a":{"dtype":"F32","shape":[],"data_offsets":[32,36]},
        "mask":{"dtype":"U8","shape":[4],"data_offsets":[36,40]},
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

#[gpu_test]
async fn an_arena_from_a_file_steps_and_goes_back_into_one() {
    let bench = Bench::best().await;
    let (device, queue) = (&bench.device, &bench.queue);
    let groups = ParamGroups::new(config())
        .with("a", config(), |name| name == "a")
        .unwrap();
    let file = model_file();
    let loaded = [
        Arena::from_safetensors(device, queue, &file).unwrap(),
        Arena::builder()
            .groups(&groups)
            .load(device, queue, &file)
            .unwrap(),
    ];
    for ((arena, left_out), in_memory) in loaded.iter().zip([[0, 1, 2], [0, 2, 1]]) {
        let other = [("ids", Dtype::I64), ("mask", Dtype::U8)];
        let other = other.map(|(name, dtype)| (name.to_owned(), dtype));
        assert_eq!(left_out, &other);
        let tensors = arena.tensors();
        let shapes = tensors
            .iter()
            .map(|t| (t.name.as_str(), t.shape.as_slice()));
        assert!(shapes.eq([("z", &[2, 3][..]), ("a", &[]), ("bias", &[300])]));
        assert!(in_memory.is_sorted_by_key(|index: &usize| tensors[*index].offset_bytes));
        let params = bench.wait(arena.download_all_params()).await.unwrap();
        assert_eq!(params, model_values());

        let grads = model_values().map(|start| values(4, start.len()));
        arena.upload_all_grads(&grads).unwrap();
        let mut optimizer = GpuOptimizer::new(&bench.kernels, config(), &arena.bindings()).unwrap();
        bench.step(&mut optimizer);
        let file = bench.wait(arena.to_safetensors()).await.unwrap();
        assert_eq!(bench.wait(arena.to_safetensors()).await.unwrap(), file);
        // In the file's order; a hash of what has changed is no longer there.
        let kept = [("format", "pt"), ("about", "a test")];
        let kept = kept.map(|(key, value)| (key.to_owned(), value.to_owned()));
        assert_eq!(Header::of(&file).unwrap().metadata, kept);
        let stepped = SafeTensors::deserialize(&file).unwrap();
        assert_eq!(stepped.len(), 3);
        for ((tensor, start), grads) in tensors.iter().zip(model_values()).zip(&grads) {
            let view = stepped.tensor(&tensor.name).unwrap();
            assert_eq!(
                (view.dtype(), view.shape()),
                (Dtype::F32, &tensor.shape[..])
            );
            let mut oracle = Oracle::new(&start, Roundoff::WGSL);
            oracle.step(&config(), grads);
            let params: Vec<f32> = bytemuck::pod_collect_to_vec(view.data());
            oracle.check_params(&params).unwrap();
        }
    }
}

/// A model as it is trained in mixed precision: the types of its tensors stay, bit for bit where nothing steps.
#[gpu_test]
async fn files_keep_their_types_both_ways() {
    let bench = Bench::best().await;
    let (device, queue) = (&bench.device, &bench.queue);
    let types = [
        ("a.weight", Dtype::BF16, StorageType::Bf16, 300),
        ("a.bias", Dtype::F32, StorageType::F32, 7),
        ("b.weight", Dtype::BF16, StorageType::Bf16, 33),
        ("c.weight", Dtype::F16, StorageType::F16, 65),
        ("d.weight", Dtype::BF16, StorageType::Bf16, 0),
    ];
    let contents = types.map(|(name, dtype, of, numel)| {
        let values: Vec<f32> = values(numel as u64, numel);
        let values: Vec<f32> = values.iter().map(|value| of.rounded(*value)).collect();
        let bytes: Vec<u8> = match of {
            StorageType::F32 => values.iter().flat_map(|v| v.to_le_bytes()).collect(),
            StorageType::Bf16 => {
                let halves = values.iter().map(|v| half::bf16::from_f32(*v));
                halves.flat_map(half::bf16::to_le_bytes).collect()
            }
            StorageType::F16 => {
                let halves = values.iter().map(|v| half::f16::from_f32(*v));
                halves.flat_map(half::f16::to_le_bytes).collect()
            }
        };
        (name, dtype, numel, values, bytes)
    });
    let views = contents.iter().map(|(name, dtype, numel, _, bytes)| {
        (*name, TensorView::new(*dtype, vec![*numel], bytes).unwrap())
    });
    let file = safetensors::serialize(views, None).unwrap();
    let groups = ParamGroups::new(config())
        .with("bias", config(), |name| name.ends_with("bias"))
        .unwrap();
    for (builder, buffers) in [
        (Arena::builder(), 3),
        (Arena::builder().grads_type(StorageType::F16), 3),
        (Arena::builder().pooled().groups(&groups), 3),
    ] {
        let (arena, left_out) = builder.load(device, queue, &file).unwrap();
        assert!(left_out.is_empty());
        assert_eq!(arena.params().len(), buffers);
        assert_eq!(bench.wait(arena.to_safetensors()).await.unwrap(), file);
        let params = bench.wait(arena.download_all_params()).await.unwrap();
        let by_name = |name: &str| {
            let mut contents = contents.iter();
            &contents.find(|(of, ..)| *of == name).unwrap().3
        };
        let starts: Vec<_> = arena.tensors().iter().map(|t| by_name(&t.name)).collect();
        assert!(params.iter().eq(starts.iter().copied()));

        let grads = starts.iter().map(|start| {
            let grads = values(4, start.len());
            grads.iter().map(|g| StorageType::F16.rounded(*g)).collect()
        });
        let grads: Vec<Vec<f32>> = grads.collect();
        arena.upload_all_grads(&grads).unwrap();
        let mut optimizer = GpuOptimizer::new(&bench.kernels, config(), &arena.bindings()).unwrap();
        bench.step(&mut optimizer);
        let state = bench.wait(optimizer.state()).await.unwrap();
        let stepped = bench.wait(arena.to_safetensors()).await.unwrap();
        let stepped = SafeTensors::deserialize(&stepped).unwrap();
        for (index, tensor) in arena.tensors().iter().enumerate() {
            let dtype = stepped.tensor(&tensor.name).unwrap().dtype();
            assert_eq!(dtype, tensor.params_type.into());
            let mut oracle = Oracle::new(starts[index], Roundoff::WGSL);
            oracle.step(&config(), &grads[index]);
            let params = bench.wait(arena.download_params(&tensor.name)).await;
            let params = params.unwrap();
            match state.tensors[index].slot("master_params") {
                Some(masters) => {
                    oracle.check_params(&masters).unwrap();
                    let rounded = masters.iter().map(|m| tensor.params_type.rounded(*m));
                    assert!(rounded.eq(params));
                }
                None => {
                    oracle.check_params(&params).unwrap();
                }
            }
        }
    }
}

#[cfg(not(target_arch = "wasm32"))]
#[gpu_test]
async fn a_file_that_makes_no_arena_is_said_and_the_next_one_does() {
    let limits = wgpu::Limits {
        max_buffer_size: 1024,
        max_storage_buffer_binding_size: 1024,
        max_uniform_buffer_binding_size: 1024,
        ..wgpu::Limits::default()
    };
    let bench = Bench::open(wgpu::Features::empty(), limits).await;
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
        matches!(cut_short, Err(ArenaFileError::Header(_))),
        "{cut_short:?}"
    );
    let other = Bench::with(OPTIONAL_FEATURES).await;
    other.device.destroy();
    let lost = load(&other, &model_file());
    assert!(
        matches!(&lost, Err(ArenaFileError::Arena(ArenaError::Device { .. }))),
        "{lost:?}"
    );
    assert_eq!(
        load(Bench::best().await, &model_file())
            .unwrap()
            .tensors()
            .len(),
        3
    );
}

#[gpu_test]
async fn empty_tensors_of_a_file_keep_its_order() {
    let mut file = Vec::new();
    let names = ["e3", "e1", "a", "e2", "e0"];
    let entry = |name: &str| match name {
        "a" => r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#.to_owned(),
        name => format!(r#""{name}":{{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]}}"#),
    };
    let header = format!("{{{}}}", names.map(entry).join(","));
    file.extend((header.len() as u64).to_le_bytes());
    file.extend(header.bytes());
    file.extend(1.0_f32.to_le_bytes());
    let bench = Bench::best().await;
    for _ in 0..10 {
        let (arena, _) = Arena::from_safetensors(&bench.device, &bench.queue, &file).unwrap();
        let order: Vec<_> = arena.tensors().iter().map(|t| t.name.as_str()).collect();
        assert_eq!(order, ["e3", "e1", "e2", "e0", "a"]);
    }
}

#[gpu_test]
async fn an_arena_that_no_file_can_hold_says_so_when_it_is_written() {
    let bench = Bench::best().await;
    let (device, queue) = (&bench.device, &bench.queue);
    let tensors = [("a", vec![2]), ("__metadata__", vec![3])];
    let mut arena = Arena::new(device, queue, tensors).unwrap();
    let refused = bench.wait(arena.to_safetensors()).await;
    assert!(
        matches!(
            refused,
            Err(ArenaFileError::Header(HeaderError::ReservedName))
        ),
        "{refused:?}"
    );
    arena = Arena::new(device, queue, [("a", vec![2])]).unwrap();
    let entry = ("format".to_owned(), "pt".to_owned());
    arena.file_metadata_mut().extend([entry.clone(), entry]);
    let refused = bench.wait(arena.to_safetensors()).await;
    assert!(
        matches!(&refused, Err(ArenaFileError::Header(HeaderError::DuplicateKey { key })) if key == "format"),
        "{refused:?}"
    );
    arena.file_metadata_mut().pop();
    bench.wait(arena.to_safetensors()).await.unwrap();
}
