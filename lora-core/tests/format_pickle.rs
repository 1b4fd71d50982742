//! Pickles that torch wrote, and ones that nobody should open.

use std::path::{Path, PathBuf};

use lora_core::format::{PickleFile, TensorFile};
use proptest::prelude::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pickles").join(name)
}

#[test]
fn tensors_of_a_trainer_s_checkpoint_are_those_that_torch_has() {
    let pickle = PickleFile::open(&fixture("nested.ckpt")).unwrap();
    let expected = TensorFile::open(&fixture("nested.safetensors")).unwrap();
    let tensors = pickle.tensors().unwrap();
    assert_eq!(tensors.len(), expected.names().len());
    for (name, data) in &tensors {
        let info = expected.info(name).unwrap();
        assert_eq!((data.dtype(), data.shape()), (info.dtype, &*info.shape), "{name}");
        assert_eq!(Some(data.bytes()), expected.bytes(name), "{name}");
    }
    assert_eq!(pickle.unread().collect::<Vec<_>>(), ["pathlib.PosixPath"]);
}

#[test]
fn weights_are_found_under_their_wrappers_and_what_lies_beside_them_is_counted() {
    let pickle = PickleFile::open(&fixture("wrapped.pt")).unwrap();
    let file = pickle.to_tensor_file().unwrap();
    assert_eq!(file.names().collect::<Vec<_>>(), ["a.bias", "a.weight"]);
    assert_eq!(file.array("a.weight").unwrap().values, [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]);
    let beside: Vec<_> = pickle.beside().iter().map(|(name, count)| (&**name, *count)).collect();
    assert_eq!(beside, [("optimizer", 2), ("shadow", 1)]);
}

#[test]
fn an_adapter_reads_as_its_safetensors_twin() {
    let twin = fixture("../formats/kohya_sd15_bf16_base/adapter.safetensors");
    let (pickle, twin) = (PickleFile::open(&fixture("adapter.pt")).unwrap(), TensorFile::open(&twin).unwrap());
    let read = pickle.to_tensor_file().unwrap();
    assert!(read.names().eq(twin.names()));
    assert!(twin.names().all(|name| read.bytes(name) == twin.bytes(name)));
}

#[test]
fn what_is_no_plain_model_is_refused_by_name() {
    for (name, reason) in [
        ("attack.pt", "it calls posix.system"),
        ("beyond.pt", "`w` reaches beyond its storage"),
        ("stretched.pt", "`w` reaches beyond its storage"),
        ("bomb.pt", "repeated without end"),
        ("deep.pt", "nested more than 64 deep"),
        ("compressed.pt", "compressed or encrypted"),
        ("old.pt", "before version 1.6"),
    ] {
        let error = PickleFile::open(&fixture(name)).map(|_| ()).unwrap_err().to_string();
        assert!(error.contains(reason), "{name}: {error}");
        assert!(PickleFile::is_one(&fixture(name)), "{name}");
    }
    assert!(!PickleFile::is_one(&fixture("nested.safetensors")));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// Cut anywhere, or with some bytes changed, a pickle ends in a result or an error.
    #[test]
    fn damaged_pickles_never_panic(
        length in 0_usize..3332,
        changes in proptest::collection::vec((0_usize..3332, any::<u8>()), 0..6),
        cut in any::<bool>(),
    ) {
        let mut bytes = std::fs::read(fixture("nested.ckpt")).unwrap();
        for (at, byte) in changes {
            let length = bytes.len();
            bytes[at % length] = byte;
        }
        if cut {
            bytes.truncate(length);
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("damaged.ckpt");
        std::fs::write(&path, &bytes).unwrap();
        if let Ok(pickle) = PickleFile::open(&path) {
            let _ = pickle.tensors();
        }
    }
}
