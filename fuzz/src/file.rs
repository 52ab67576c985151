//! Files from the text of their headers.

use serde::de::IgnoredAny;
use serde_json::Value;
use wgpu_optim::files::{Dtype, Header};

/// The most data that a file gets, whatever its header says.
const MAX_DATA_BYTES: u64 = 1 << 12;

/// A safetensors file of a header's text and, behind it, bytes to repeat as its data: as many as the header says, or
/// one too few (`<`) or too many (`>`). As it stands (`r`), the text is the file.
pub fn of_text(text: &[u8], kind: u8) -> Vec<u8> {
    if kind == b'r' {
        return text.to_vec();
    }
    let mut json = serde_json::Deserializer::from_slice(text).into_iter::<IgnoredAny>();
    let header_bytes = match json.next() {
        Some(Ok(_)) => json.byte_offset(),
        _ => text.len(),
    };
    let (header, data) = text.split_at(header_bytes);
    let data_bytes = data_bytes(header).unwrap_or(0).min(MAX_DATA_BYTES) as usize;
    let data_bytes = match kind {
        b'<' => data_bytes.saturating_sub(1),
        b'>' => data_bytes + 1,
        _ => data_bytes,
    };
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header);
    extend(&mut file, data, data_bytes);
    file
}

/// A file of F32 tensors with finite values.
pub fn f32_file(shapes: impl IntoIterator<Item = (String, Vec<usize>)>) -> Vec<u8> {
    let shapes = shapes.into_iter();
    let tensors = shapes.map(|(name, shape)| (name, Dtype::F32, shape));
    let header = Header::new(Vec::new(), tensors).unwrap();
    let mut file = header.to_bytes().unwrap();
    extend(&mut file, &[], header.data_len() as usize);
    file
}

/// The parts of a text between lines of `--`.
pub fn sections(text: &[u8]) -> impl Iterator<Item = &[u8]> {
    const BETWEEN: &[u8] = b"\n--\n";
    let mut rest = Some(text);
    std::iter::from_fn(move || {
        let text = rest?;
        let end = text.windows(BETWEEN.len()).position(|part| part == BETWEEN);
        rest = end.map(|end| &text[end + BETWEEN.len()..]);
        Some(end.map_or(text, |end| &text[..end]))
    })
}

fn extend(file: &mut Vec<u8>, pattern: &[u8], bytes: usize) {
    let values = [1.5_f32, -0.25].map(f32::to_le_bytes);
    let pattern = match pattern {
        [] => values.as_flattened(),
        pattern => pattern,
    };
    file.extend(pattern.iter().cycle().take(bytes));
}

/// The end of the last tensor, by the header.
fn data_bytes(header: &[u8]) -> Option<u64> {
    let header: Value = serde_json::from_slice(header).ok()?;
    let ends = header.as_object()?.values();
    ends.filter_map(|tensor| tensor.get("data_offsets")?.get(1)?.as_u64())
        .max()
}
