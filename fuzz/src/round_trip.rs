//! The readers alone, and that what they read is written as it was.

use std::collections::HashMap;

use safetensors::SafeTensors;
use wgpu_optim::files::{Header, Index, is_content_hash};
use wgpu_optim::state::StateRecord;
use wgpu_optim::{AnyRule, OptimizerState, Rule as _};

use crate::STEPPED;

/// Reads a header, if it is one.
pub fn header(file: &[u8]) -> Option<Header> {
    let header = Header::of(file).ok()?;
    // Whatever is written after it goes to other readers.
    SafeTensors::deserialize(file).expect("a file that nobody else reads");
    let mut written = header.to_bytes().unwrap();
    let start = written.len();
    written.extend(&file[header.data_start() as usize..]);
    let again = Header::of(&written).unwrap();
    assert_eq!(again.metadata, header.metadata);
    assert_eq!(again.tensors(), header.tensors());
    assert_eq!(again.to_bytes().unwrap(), &written[..start]);

    let mut end = 0;
    for tensor in header.in_place_order() {
        assert_eq!(tensor.data_bytes.start, end);
        end = tensor.data_bytes.end;
        let bits = (end - tensor.data_bytes.start) * 8;
        assert_eq!(tensor.numel() * tensor.dtype.bitsize() as u64, bits);
    }
    assert_eq!(header.data_start() + end, file.len() as u64);
    Some(header)
}

/// A step may have updated the tensors that it takes, and has left all else as it was.
pub fn stepped(before: &[u8], after: &[u8]) {
    let headers = [before, after].map(|file| Header::of(file).unwrap());
    assert_eq!(headers[1].tensors(), headers[0].tensors());
    let kept = headers[0].metadata.iter();
    assert!(
        kept.filter(|(key, _)| !is_content_hash(key))
            .eq(&headers[1].metadata)
    );
    for tensor in headers[0].tensors() {
        if !STEPPED.contains(&tensor.dtype) {
            let bytes = tensor.data_bytes.start as usize..tensor.data_bytes.end as usize;
            let data = |file: &[u8], header: &Header| {
                file[header.data_start() as usize..][bytes.clone()].to_vec()
            };
            assert_eq!(data(after, &headers[1]), data(before, &headers[0]));
        }
    }
}

/// Reads a state, if it is one.
pub fn state(file: &[u8], header: &Header) -> Option<StateRecord> {
    let record = StateRecord::of(header);
    let state = OptimizerState::<AnyRule>::from_safetensors(file);
    assert_eq!(record.is_ok(), state.is_ok());
    let (record, state) = record.ok().zip(state.ok())?;
    let written = state.to_safetensors().unwrap();
    let again = StateRecord::of(&Header::of(&written).unwrap()).unwrap();
    assert_eq!(again, record);
    // As bytes, because a slot may be NaN.
    let again = OptimizerState::<AnyRule>::from_safetensors(&written).unwrap();
    assert_eq!(again.to_safetensors().unwrap(), written);
    let _ = state.to_pytorch();
    Some(record)
}

/// Reads an index, if it is one.
pub fn index(json: &[u8]) -> Option<Index> {
    let index = Index::parse(json).ok()?;
    let again = Index::parse(&index.to_bytes(u64::MAX).unwrap()).unwrap();
    assert_eq!(again.shards(), index.shards());
    let mut tensors = index.tensors().to_vec();
    tensors.sort();
    assert_eq!(again.tensors(), tensors);
    let texts = index.metadata.iter();
    assert!(
        texts
            .filter(|(key, _)| key != "total_size")
            .eq(&again.metadata)
    );
    Some(index)
}

/// Reads what PyTorch remembers of as many parameters, if it is such. The last parameter may be of another shape.
pub fn pytorch(file: &[u8], rule: AnyRule, parameters: usize) {
    let header = Header::of(file).ok();
    let tensors = header.iter().flat_map(Header::tensors);
    let shapes: HashMap<_, _> = tensors
        .map(|tensor| (&*tensor.name, &*tensor.shape))
        .collect();
    let slots = rule.slots();
    let shape = |index| {
        let mut keys = slots
            .iter()
            .map(|slot| format!("state.{index}.{}", slot.name));
        let shape = keys.find_map(|key| shapes.get(&*key));
        shape.map_or_else(|| vec![3], |shape| shape.to_vec())
    };
    let tensors = (0..parameters).map(|index| match index {
        6 => (format!("p{index}"), vec![2, 2]),
        _ => (format!("p{index}"), shape(index)),
    });
    let tensors: Vec<_> = tensors.collect();
    let read =
        |file: &[u8]| OptimizerState::from_pytorch(file, rule.clone(), tensors.iter().cloned());
    if let Ok(state) = read(file) {
        let written = state.to_pytorch().unwrap();
        let again = read(&written).unwrap();
        assert_eq!(again.to_pytorch().unwrap(), written);
        assert_eq!(
            again.to_safetensors().unwrap(),
            state.to_safetensors().unwrap()
        );
    }
}
