//! What fuzzing and its reading of the code brought to light, one test each, so that it stays found.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, path::Path, time::Instant};

use lora_core::format::{
    AdapterFile, BaseModel, Component, Dtype, PickleFile, TensorData, TensorFile, measure, tensors_to_bytes,
};

/// One linear layer of a UNet.
fn base() -> BaseModel {
    BaseModel::from_shapes([(Component::Unet, "mid_block.q.weight".to_owned(), vec![4, 4])])
}

fn read(tensors: &[(&str, &[usize])]) -> Result<AdapterFile, lora_core::Error> {
    let tensors: Vec<_> = tensors
        .iter()
        .map(|(name, shape)| {
            let data = vec![0; Dtype::F32.bytes_of(shape).unwrap()];
            ((*name).to_owned(), TensorData::new(Dtype::F32, *shape, data).unwrap())
        })
        .collect();
    let path = Path::new("adapter.safetensors");
    let bytes = tensors_to_bytes(path, &tensors, &BTreeMap::new()).unwrap();
    AdapterFile::of(&TensorFile::from_bytes(path, bytes).unwrap(), &base())
}

fn refused(tensors: &[(&str, &[usize])]) -> String {
    read(tensors).map(|_| ()).unwrap_err().to_string()
}

#[test]
fn more_stages_than_a_butterfly_has_are_refused_by_the_reader_and_not_by_the_merge() {
    let name = "lora_unet_mid_block_q.oft_blocks";
    let error = refused(&[(name, &[3, 2, 2, 2])]);
    assert!(error.contains(name) && error.contains("do not turn"), "{error}");
    read(&[(name, &[2, 2, 2, 2])]).unwrap();
}

#[test]
fn an_axis_of_no_length_may_stand_beside_one_of_any() {
    for shape in [[0, usize::MAX / 2], [usize::MAX / 2, 0]] {
        for name in ["oft_R.weight", "lora_down.weight", "diff", "hada_w1_a", "lokr_w1", "oft_blocks", "a1.weight"] {
            let name = format!("lora_unet_mid_block_q.{name}");
            assert!(refused(&[(&name, &shape)]).contains("adapter.safetensors"), "{name}");
        }
    }
}

#[test]
fn a_whole_model_is_no_adapter_that_replaces_another() {
    let error = refused(&[("mid_block.q.weight", &[4, 4])]);
    assert!(error.contains("whole weights"), "{error}");
}

// --- pickles

/// A program for the stack machine.
#[derive(Default)]
struct Program(Vec<u8>);

impl Program {
    fn op(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn text(self, text: &str) -> Self {
        let length = (text.len() as u32).to_le_bytes();
        self.op(b"X").op(&length).op(text.as_bytes())
    }

    fn number(self, number: u64) -> Self {
        self.op(b"\x8A\x08").op(&number.to_le_bytes())
    }

    fn numbers(self, numbers: &[u64]) -> Self {
        numbers.iter().fold(self.op(b"("), |program, number| program.number(*number)).op(b"t")
    }

    /// A tensor of the storage `0`, which is said to hold `count` numbers.
    fn tensor(self, count: u64, shape: &[u64], strides: &[u64]) -> Self {
        self.op(b"ctorch._utils\n_rebuild_tensor_v2\n((")
            .text("storage")
            .op(b"ctorch\nFloatStorage\n")
            .text("0")
            .text("cpu")
            .number(count)
            .op(b"tQ")
            .number(0)
            .numbers(shape)
            .numbers(strides)
            .op(b"tR")
    }

    /// Opened as an archive whose storage `0` holds 16 numbers.
    fn open(&self) -> Result<PickleFile, lora_core::Error> {
        self.open_with(&[0; 64])
    }

    fn open_with(&self, storage: &[u8]) -> Result<PickleFile, lora_core::Error> {
        PickleFile::from_bytes(Path::new("model.pt"), archive(&[("a/data.pkl", &self.0), ("a/data/0", storage)]))
    }
}

/// A zip archive that stores its entries as they are.
fn archive(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let (mut file, mut directory) = (Vec::new(), Vec::new());
    let sizes = |content: &[u8]| (content.len() as u32).to_le_bytes();
    for (name, content) in entries {
        let (at, length) = ((file.len() as u32).to_le_bytes(), (name.len() as u16).to_le_bytes());
        let size = [sizes(content), sizes(content)].concat();
        file.extend([b"PK\x03\x04\x14", &[0; 13][..], &size, &length, &[0; 2], name.as_bytes(), content].concat());
        let fields = [b"PK\x01\x02\x14\0\x14", &[0; 13][..], &size, &length, &[0; 12], &at, name.as_bytes()];
        directory.extend(fields.concat());
    }
    let count = (entries.len() as u16).to_le_bytes();
    let end = [b"PK\x05\x06", &[0; 4][..], &count, &count, &sizes(&directory), &sizes(&file), &[0; 2]].concat();
    [file, directory, end].concat()
}

#[test]
fn a_small_pickle_of_one_tensor_is_read() {
    let program = Program::default().op(b"\x80\x02}(").text("w").tensor(16, &[4, 4], &[1, 4]).op(b"u.");
    let pickle = program.open().unwrap();
    assert_eq!(pickle.tensors().unwrap()[0].1.shape(), [4, 4]);
}

#[test]
fn a_storage_that_is_said_to_be_larger_than_it_is_gives_no_larger_tensor() {
    let program = Program::default().op(b"}(").text("w").tensor(1 << 40, &[1 << 40], &[0]).op(b"u.");
    let error = program.open().unwrap_err().to_string();
    assert!(error.contains("`w` reaches beyond its storage"), "{error}");
}

#[test]
fn the_work_of_measuring_an_empty_tensor_with_boundless_axes_overflows_nothing() {
    const HUGE: usize = usize::MAX / 2;
    let empty = |name: &str, shape: &[usize]| {
        (format!("lora_unet_mid_block_q.{name}"), TensorData::new(Dtype::F32, shape, Vec::new()).unwrap())
    };
    let cases = [
        vec![empty("oft_blocks", &[0, HUGE, HUGE, 2, 2])],
        vec![empty("oft_blocks", &[0, HUGE, HUGE, 2])],
        vec![
            empty("hada_w1_a", &[0, 4]),
            empty("hada_w1_b", &[0, 4]),
            empty("hada_w2_a", &[0, 4]),
            empty("hada_w2_b", &[0, 4]),
            empty("hada_t1", &[0, 2, HUGE, HUGE]),
        ],
    ];
    for tensors in cases {
        let path = Path::new("adapter.safetensors");
        let bytes = tensors_to_bytes(path, &tensors, &BTreeMap::new()).unwrap();
        // No file of these is an adapter; what counts is that nothing panics, and that no size is made up.
        let measured = measure(&TensorFile::from_bytes(path, bytes).unwrap()).unwrap_or_default();
        assert!(measured.iter().all(|module| !matches!(module.size, Ok(Some(_)))), "{measured:?}");
    }
}

#[test]
fn an_empty_tensor_with_a_boundless_axis_overflows_nothing() {
    let huge = i64::MAX as u64;
    let program = Program::default().op(b"}(").text("w").tensor(16, &[huge, huge, 0], &[huge, 1, 1]).op(b"u.");
    // The container has no words for such a shape; what counts is that nothing panics.
    assert!(program.open().unwrap().tensors().is_err());
}

#[test]
fn one_storage_under_many_names_is_no_larger_file() {
    let mut program = Program::default().op(b"}(").text("0").tensor(1024, &[1024], &[1]).op(b"q\0");
    for name in 1..2000 {
        program = program.text(&name.to_string()).op(b"h\0");
    }
    let error = program.op(b"u.").open_with(&[0; 4096]).unwrap_err().to_string();
    assert!(error.contains("its tensors name 8192000 bytes"), "{error}");
}

#[test]
fn a_long_name_above_many_short_ones_is_not_copied_into_each() {
    let mut program = Program::default().op(b"}(").text(&"x".repeat(100_000)).op(b"}(");
    for name in 0..20_000 {
        program = program.text(&name.to_string()).op(b"N");
    }
    let error = program.op(b"uu.").open().unwrap_err().to_string();
    assert!(error.contains("repeated without end"), "{error}");
}

#[test]
fn lists_that_name_each_other_are_walked_no_longer_than_the_file_is() {
    // Each list names the one before it twelve times: 12²⁰ ways through.
    let mut program = Program::default().op(b"]q\0");
    for _ in 0..20 {
        program = program.op(b"0](").op(&b"h\0".repeat(12)).op(b"eq\0");
    }
    let start = Instant::now();
    let error = program.op(b".").open().unwrap_err().to_string();
    assert!(error.contains("repeated without end"), "{error}");
    assert!(start.elapsed().as_secs() < 5, "{:?}", start.elapsed());
}
