//! Any bytes are a container whose tensors lie inside the file, or an error.
#![no_main]

use libfuzzer_sys::fuzz_target;
use lora_core::format::{FileKind, Header, TensorData, TensorFile, tensors_to_bytes};
use lora_fuzz::path;

fuzz_target!(|input: &[u8]| {
    let _ = FileKind::of(input);
    let header = Header::parse(input);
    let file = match TensorFile::from_bytes(path(), input.to_vec()) {
        Ok(file) => file,
        Err(error) => {
            assert!(header.is_err());
            return drop(error.to_string());
        }
    };
    let mut tensors = Vec::new();
    for name in file.names() {
        let (info, bytes) = (file.info(name).expect("it was named"), file.bytes(name).expect("it was named"));
        assert_eq!(info.dtype.bytes_of(&info.shape), Some(bytes.len()));
        let (array, doubles) = (file.array(name), file.doubles(name));
        if let Ok(array) = array {
            assert_eq!(array.values.len(), info.elements());
        }
        if let Ok(doubles) = doubles {
            assert_eq!(doubles.len(), info.elements());
        }
        tensors.push((name.to_owned(), TensorData::new(info.dtype, &*info.shape, bytes).expect("the sizes agree")));
    }
    // Written again, it is the same file but for order and padding.
    let again = tensors_to_bytes(path(), &tensors, file.metadata()).expect("what was read can be written");
    let again = TensorFile::from_bytes(path(), again).expect("what was written can be read");
    assert_eq!(again.metadata(), file.metadata());
    assert!(again.names().eq(file.names()));
    assert!(file.names().all(|name| again.bytes(name) == file.bytes(name)));
});
