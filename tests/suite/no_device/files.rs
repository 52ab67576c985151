//! Headers and indices, read strictly and written in one order.

use std::collections::HashMap;

use proptest::prelude::*;
use safetensors::tensor::{SafeTensors, TensorView};
use wgpu_optim::files::{
    Dtype, Header, HeaderError, Index, IndexError, OtherFormat, is_git_lfs_pointer,
};

/// A file of this header and so many bytes of data.
fn file(header: &str, data_bytes: usize) -> Vec<u8> {
    let mut file = (header.len() as u64).to_le_bytes().to_vec();
    file.extend(header.bytes());
    file.extend((0..data_bytes).map(|byte| byte as u8));
    file
}

fn refused(header: &str, data_bytes: usize) -> String {
    Header::of(&file(header, data_bytes))
        .unwrap_err()
        .to_string()
}

#[test]
fn what_a_header_says_is_kept_in_its_order() {
    let text = r#"{"__metadata__":{"z":"1","a":"2"},"y":{"dtype":"F32","shape":[2],"data_offsets":[4,12]},"b":{"dtype":"I32","shape":[],"data_offsets":[0,4]}}    "#;
    assert_eq!(text.len() % 8, 0);
    let file = file(text, 12);
    let header = Header::of(&file).unwrap();
    let entry = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    assert_eq!(header.metadata, [entry("z", "1"), entry("a", "2")]);
    let names = |tensors: Vec<&wgpu_optim::files::TensorEntry>| -> Vec<_> {
        tensors.iter().map(|tensor| tensor.name.clone()).collect()
    };
    assert_eq!(names(header.tensors().iter().collect()), ["y", "b"]);
    assert_eq!(names(header.in_place_order().collect()), ["b", "y"]);
    assert_eq!(header.tensors()[0].numel(), 2);
    assert_eq!(
        (header.data_start(), header.data_len()),
        (8 + text.len() as u64, 12)
    );
    assert_eq!(header.to_bytes().unwrap(), &file[..8 + text.len()]);
}

#[test]
fn what_is_no_header_is_refused_by_name() {
    let tensor = |shape: &str, offsets: &str| {
        format!(r#"{{"a":{{"dtype":"F32","shape":{shape},"data_offsets":{offsets}}}}}"#)
    };
    assert!(
        refused(&tensor("[2]", "[0,4]"), 4)
            .contains(r#"tensor "a": its data lie in bytes 0..4, expected 0..8"#)
    );
    assert!(refused(&tensor("[1]", "[4,8]"), 8).contains("in bytes 4..8, expected 0..4"));
    assert!(refused(&tensor("[1]", "[8,4]"), 8).contains("in bytes 8..4, expected 0..4"));
    assert!(refused(&tensor("[2]", "[0,8]"), 7).contains("bytes, expected"));
    assert!(refused(&tensor("[2]", "[0,8]"), 9).contains("bytes, expected"));
    let huge = "[4294967296,4294967296,4294967296]";
    assert!(refused(&tensor(huge, "[0,8]"), 8).contains(r#"tensor "a": its shape"#));
    assert!(
        refused(
            r#"{"a":{"dtype":"F4","shape":[3],"data_offsets":[0,1]}}"#,
            1
        )
        .contains(r#"tensor "a": its shape"#)
    );
    assert!(refused("[]", 0).contains("a map of tensors"));
    assert!(refused(&tensor("[-1]", "[0,8]"), 8).contains("its header"));
    assert!(refused(r#"{"a":1}"#, 0).contains("its header"));

    let twice = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#;
    assert_eq!(refused(twice, 4), r#"tensor "a" comes twice in the header"#);
    let twice = r#"{"__metadata__":{"k":"1","k":"1"}}"#;
    assert_eq!(
        refused(twice, 0),
        r#"metadata key "k" comes twice in the header"#
    );
    assert!(
        refused(r#"{"__metadata__":{},"__metadata__":{}}"#, 0)
            .contains("duplicate field `__metadata__`")
    );

    let short = Header::of(&[0; 7]);
    assert!(
        matches!(short, Err(HeaderError::TooShort { file_bytes: 7 })),
        "{short:?}"
    );
    let cut = Header::of(&file("{}      ", 0)[..12]);
    assert!(
        matches!(
            cut,
            Err(HeaderError::Length {
                expected_bytes: 16,
                actual_bytes: 12
            })
        ),
        "{cut:?}"
    );
    let noise = Header::of(b"\xff\x00 is no length, and no format that is known");
    assert!(
        matches!(noise, Err(HeaderError::TooLarge { .. })),
        "{noise:?}"
    );
}

/// Tensors that a file could have one by one, and that end where numbers do.
#[test]
fn data_that_end_past_every_number_are_refused() {
    let each = (1_u64 << 61) - 1;
    let tensor = |index: u64, start: u64, end: u64| {
        format!(r#""{index}":{{"dtype":"U8","shape":[{each}],"data_offsets":[{start},{end}]}}"#)
    };
    let mut tensors: Vec<_> = (0..8)
        .map(|index| tensor(index, index * each, (index + 1) * each))
        .collect();
    let full = format!("{{{}}}", tensors.join(","));
    assert!(refused(&full, 0).contains("it has"));
    tensors.push(tensor(8, 8 * each, u64::MAX));
    let past = format!("{{{}}}", tensors.join(","));
    assert!(refused(&past, 0).contains("it has"));
}

#[test]
fn a_git_lfs_pointer_is_named() {
    let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 1234\n";
    assert!(is_git_lfs_pointer(pointer));
    assert!(matches!(
        Header::of(pointer),
        Err(HeaderError::GitLfsPointer)
    ));
    assert!(matches!(
        Index::parse(pointer),
        Err(IndexError::GitLfsPointer)
    ));
    assert!(
        HeaderError::GitLfsPointer
            .to_string()
            .contains("git lfs pull")
    );
}

#[test]
fn other_formats_are_told_by_how_they_start() {
    let text = |text: &str| OtherFormat::Text(text.to_owned());
    for (start, expected, cure) in [
        (
            &b"PK\x03\x04\x00\x00\x08\x08\x00\x00"[..],
            OtherFormat::Zip,
            "save_file",
        ),
        // Where the next four bytes are zero, they make a length that a header might have.
        (
            b"PK\x03\x04\x00\x00\x00\x00\x00\x00",
            OtherFormat::Zip,
            "save_file",
        ),
        (
            b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
            OtherFormat::Pickle,
            "save_file",
        ),
        (
            b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00}",
            OtherFormat::Pickle,
            "save_file",
        ),
        (
            b"GGUF\x03\x00\x00\x00\x23\x01\x00\x00",
            OtherFormat::Gguf,
            "safetensors files",
        ),
        (b"\x89HDF\r\n\x1a\n\x00\x00", OtherFormat::Hdf5, "save_file"),
        (b"<!DOCTYPE html><html>", OtherFormat::WebPage, "logged in"),
        (
            b"\xef\xbb\xbf\n  <HTML lang=\"en\">",
            OtherFormat::WebPage,
            "logged in",
        ),
        (
            b"<?xml version=\"1.0\"?><Error>",
            OtherFormat::WebPage,
            "logged in",
        ),
        (b"{\"metadata\": {}}", OtherFormat::Json, ".json"),
        (
            b"Entry not found",
            text("Entry not found"),
            "\"Entry not found\"",
        ),
    ] {
        let mut file = start.to_vec();
        for padding in [0, 1000] {
            file.resize(start.len() + padding, b' ');
            match Header::of(&file) {
                Err(HeaderError::OtherFormat { format }) => {
                    assert_eq!(format, expected);
                    assert!(format.to_string().contains(cure), "{format}");
                }
                other => panic!("{expected:?}: {other:?}"),
            }
        }
        match (Index::parse(start), &expected) {
            (Err(IndexError::Json(_)), OtherFormat::Json) => {}
            (Err(IndexError::OtherFormat { format }), _) => assert_eq!(format, expected),
            (other, _) => panic!("{expected:?}: {other:?}"),
        }
    }
    // Cut within a character.
    let long = format!("{}\u{e4}", "x".repeat(71));
    let expected = text(&"x".repeat(71));
    assert_eq!(OtherFormat::of(long.as_bytes()), Some(expected));

    // A header of 640 bytes starts as a pickle does, cut off or not.
    let header = format!("{{}}{}", " ".repeat(638));
    let whole = file(&header, 0);
    assert_eq!(OtherFormat::of(&whole), Some(OtherFormat::Pickle));
    assert!(Header::of(&whole).is_ok());
    let cut = Header::of(&whole[..100]);
    assert!(matches!(cut, Err(HeaderError::Length { .. })), "{cut:?}");
}

#[test]
fn an_index_is_read_and_written() {
    let json = br#"{"weight_map":{"w":"m-2.safetensors","b":"m-1.safetensors","a":"m-2.safetensors"},"metadata":{"z":"1","total_size":12,"more":[1],"a":"2"}}"#;
    let index = Index::parse(json).unwrap();
    let text = |key: &str, value: &str| (key.to_owned(), value.to_owned());
    assert_eq!(index.metadata, [text("z", "1"), text("a", "2")]);
    assert_eq!(index.shards(), ["m-1.safetensors", "m-2.safetensors"]);
    let written = index.to_bytes(12).unwrap();
    let text = String::from_utf8(written.clone()).unwrap();
    assert!(text.find("\"a\"") < text.find("\"b\"") && text.find("\"b\"") < text.find("\"w\""));
    assert!(text.contains("\"total_size\": 12"));
    let again = Index::parse(&written).unwrap();
    let places = |index: &Index| -> HashMap<_, _> { index.tensors().iter().cloned().collect() };
    assert_eq!(places(&again), places(&index));
    assert_eq!(again.metadata, index.metadata);
}

#[test]
fn an_index_names_files_in_its_own_folder_only() {
    for name in [
        "",
        ".",
        "..",
        "../m",
        "/m",
        "a/m",
        "..\\\\m",
        "C:m",
        "a\\u0000b",
    ] {
        let json = format!(r#"{{"weight_map":{{"w":"{name}"}}}}"#);
        let refused = Index::parse(json.as_bytes());
        assert!(
            matches!(&refused, Err(IndexError::LeavesFolder { tensor, .. }) if tensor == "w"),
            "{name}: {refused:?}"
        );
    }
    let twice = Index::parse(br#"{"weight_map":{"w":"m","w":"m"}}"#);
    assert!(matches!(&twice, Err(IndexError::DuplicateTensor { tensor }) if tensor == "w"));
    for json in [&b"{}"[..], b"{\"weight_map\":[]}", b"{\"weight_map\":", b""] {
        assert!(matches!(Index::parse(json), Err(IndexError::Json(_))));
    }
    assert!(Index::parse(br#"{"weight_map":{"w":"..m"}}"#).is_ok());
}

fn dtype() -> impl Strategy<Value = Dtype> {
    prop_oneof![
        Just(Dtype::F32),
        Just(Dtype::F16),
        Just(Dtype::I64),
        Just(Dtype::BOOL)
    ]
}

proptest! {
    /// The same bytes as `safetensors` writes, but for metadata, whose order it does not keep.
    #[test]
    fn a_file_is_laid_out_as_safetensors_does(
        tensors in proptest::collection::hash_map("[a-z_.\"é]{0,4}", (dtype(), proptest::collection::vec(0_usize..4, 0..3)), 0..6),
        metadata in proptest::option::of(("[a-z]{1,3}", ".{0,5}")),
    ) {
        let header = Header::new(
            metadata.clone().into_iter().collect(),
            tensors.iter().map(|(name, (dtype, shape))| (name.clone(), *dtype, shape.clone())),
        ).unwrap();
        let mut ours = header.to_bytes().unwrap();
        ours.resize(ours.len() + header.data_len() as usize, 0);
        let zeros = [0; 128];
        let views = tensors.iter().map(|(name, (dtype, shape))| {
            let bytes = shape.iter().product::<usize>() * dtype.bitsize() / 8;
            (name.clone(), TensorView::new(*dtype, shape.clone(), &zeros[..bytes]).unwrap())
        });
        let theirs = safetensors::serialize(views, metadata.map(|entry| HashMap::from([entry]))).unwrap();
        prop_assert_eq!(&ours, &theirs);
        prop_assert_eq!(Header::of(&theirs).unwrap().to_bytes().unwrap(), header.to_bytes().unwrap());
    }

    /// Whatever the bytes: no panic, and what reads is what `safetensors` reads.
    #[test]
    fn any_bytes_read_as_safetensors_reads_them_or_not_at_all(
        header in "\\{(\"[ab]\":\\{\"dtype\":\"(F32|F4|U8)\",\"shape\":\\[[0-3]?\\],\"data_offsets\":\\[[0-9],[0-9]{1,2}\\]\\},?){0,2}\\}",
        data_bytes in 0_usize..16,
    ) {
        let file = file(&header, data_bytes);
        let theirs = SafeTensors::deserialize(&file);
        match Header::of(&file) {
            Ok(ours) => {
                let theirs = theirs.unwrap();
                prop_assert_eq!(ours.tensors().len(), theirs.len());
                for tensor in ours.tensors() {
                    let view = theirs.tensor(&tensor.name).unwrap();
                    prop_assert_eq!((tensor.dtype, &tensor.shape[..]), (view.dtype(), view.shape()));
                    let data = &file[ours.data_start() as usize..];
                    let bytes = tensor.data_bytes.start as usize..tensor.data_bytes.end as usize;
                    prop_assert_eq!(&data[bytes], view.data());
                }
            }
            // A name that comes twice is taken by safetensors, where the data fit.
            Err(HeaderError::DuplicateTensor { .. }) => {}
            Err(_) => prop_assert!(theirs.is_err()),
        }
    }
}
