//! Any bytes are a pickle whose tensors fit into the file, or an error.
#![no_main]

use std::path::Path;

use libfuzzer_sys::fuzz_target;
use lora_core::format::PickleFile;

// The first byte tells whether the rest is a whole archive, or the program inside one that has two storages.
fuzz_target!(|input: &[u8]| {
    let Some((kind, rest)) = input.split_first() else { return };
    let archive = match kind % 2 {
        0 => rest.to_vec(),
        _ => archive(&[("a/data.pkl", rest), ("a/data/0", &[7; 64]), ("a/data/1", &[0x3C; 24])]),
    };
    let length = archive.len();
    let pickle = match PickleFile::from_bytes(Path::new("input.pt"), archive) {
        Ok(pickle) => pickle,
        Err(error) => return drop(error.to_string()),
    };
    let Ok(tensors) = pickle.tensors() else { return };
    let bytes: usize = tensors.iter().map(|(_, data)| data.bytes().len()).sum();
    assert!(bytes <= 16 * length, "{bytes} bytes out of {length}");
    let _ = pickle.unread().count();
    if let Ok(file) = pickle.to_tensor_file() {
        assert_eq!(file.names().len(), tensors.len());
    }
});

/// A zip archive that stores its entries as they are.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    for (name, content) in entries {
        let (size, length, at) = (content.len() as u32, name.len() as u16, file.len() as u32);
        file.extend_from_slice(b"PK\x03\x04\x14\0\0\0\0\0\0\0\0\0\0\0\0\0");
        file.extend([size, size].iter().flat_map(|size| size.to_le_bytes()));
        file.extend([length, 0].iter().flat_map(|length| length.to_le_bytes()));
        file.extend_from_slice(name.as_bytes());
        file.extend_from_slice(content);
        directory.extend_from_slice(b"PK\x01\x02\x14\0\x14\0\0\0\0\0\0\0\0\0\0\0\0\0");
        directory.extend([size, size].iter().flat_map(|size| size.to_le_bytes()));
        directory.extend([length, 0, 0, 0, 0, 0, 0].iter().flat_map(|number| number.to_le_bytes()));
        directory.extend_from_slice(&at.to_le_bytes());
        directory.extend_from_slice(name.as_bytes());
    }
    let (count, size, at) = (entries.len() as u16, directory.len() as u32, file.len() as u32);
    file.extend_from_slice(&directory);
    file.extend_from_slice(b"PK\x05\x06\0\0\0\0");
    file.extend([count, count].iter().flat_map(|count| count.to_le_bytes()));
    file.extend([size, at].iter().flat_map(|number| number.to_le_bytes()));
    file.extend_from_slice(&[0, 0]);
    file
}
