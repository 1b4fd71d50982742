//! Merging into folders of language models: types, larger vocabularies, heads that were the embedding table.
//!
//! What each case must give was looked at in peft 0.21.2 (`merge_and_unload`) with models of the same make.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
};

use lora_core::{
    Array,
    format::{AdapterStream, BaseModel, Component, Dtype, Merger, Strengths, TensorData, TensorFile, write_tensors},
};

const ROWS: usize = 6;
const WIDTH: usize = 4;
const TABLE: &str = "model.embed_tokens.weight";
const HEAD: &str = "lm_head.weight";
const QUERY: &str = "model.layers.0.self_attn.q_proj.weight";

/// A configuration with keys, blanks and numbers that a program would write in another way.
const CONFIG: &str = "{\n  \"vocab_size\" : 6, \"rms_norm_eps\": 1e-06,\n  \"dtype\": \"float32\",\n  \
                      \"model_type\": \"llama\",\n\t\"tie_word_embeddings\": TIED\n}";

/// Tensors of an adapter by key, less what peft puts before it.
type Tensors = Vec<(&'static str, Array)>;

/// A number that differs by seed and place.
fn value(seed: usize, place: usize) -> f32 {
    ((seed * 37 + place * 17) % 29) as f32 / 16.0 - 0.75
}

fn tensor(seed: usize, shape: &[usize]) -> Array {
    let values = (0..shape.iter().product()).map(|place| value(seed, place)).collect();
    Array::new(shape, values).unwrap()
}

fn write(path: &Path, tensors: &[(&str, Array)]) {
    let data = |array: &Array| TensorData::from_f32(Dtype::F32, &*array.shape, &array.values).unwrap();
    let tensors: Vec<_> = tensors.iter().map(|(name, array)| ((*name).to_owned(), data(array))).collect();
    write_tensors(path, &tensors, &BTreeMap::new()).unwrap();
}

/// A model in a folder of its own, and a place for what is made of it.
struct Case {
    folder: tempfile::TempDir,
}

impl Case {
    fn new(tied: bool) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let base = folder.path().join("base");
        fs::create_dir(&base).unwrap();
        fs::write(base.join("config.json"), CONFIG.replace("TIED", &tied.to_string())).unwrap();
        let mut tensors = vec![(TABLE, tensor(1, &[ROWS, WIDTH])), (QUERY, tensor(2, &[WIDTH, WIDTH]))];
        if !tied {
            tensors.push((HEAD, tensor(3, &[ROWS, WIDTH])));
        }
        write(&base.join("model.safetensors"), &tensors);
        Self { folder }
    }

    fn base(&self) -> PathBuf {
        self.folder.path().join("base")
    }

    /// Merges an adapter of peft into the model; rank 1 and alpha 2, so a scale of 2.
    fn merge(&self, fields: &str, tensors: &[(&str, Array)], dtype: Option<Dtype>) -> lora_core::Result<Merged> {
        let (out, warned) = self.merge_folder(fields, tensors, dtype)?;
        let config = fs::read_to_string(out.join("config.json")).unwrap();
        Ok(Merged { file: TensorFile::open(&out.join("model.safetensors"))?, config, warned })
    }

    /// [`merge`](Self::merge), whatever files the model lies in: the folder that is made, and whether there is a warning.
    fn merge_folder(
        &self,
        fields: &str,
        tensors: &[(&str, Array)],
        dtype: Option<Dtype>,
    ) -> lora_core::Result<(PathBuf, bool)> {
        let adapter = self.folder.path().join("adapter");
        fs::create_dir_all(&adapter).unwrap();
        let config = format!("{{\"peft_type\": \"LORA\", \"r\": 1, \"lora_alpha\": 2{fields}}}");
        fs::write(adapter.join("adapter_config.json"), config).unwrap();
        let keys: Vec<String> = tensors.iter().map(|(key, _)| format!("base_model.model.{key}")).collect();
        let keyed: Vec<_> = keys.iter().zip(tensors).map(|(key, (_, array))| (&**key, array.clone())).collect();
        write(&adapter.join("adapter_model.safetensors"), &keyed);

        let base = BaseModel::open(&self.base())?;
        let stream = AdapterStream::open(&adapter, &base)?;
        assert!(stream.summary().unapplied.is_empty(), "{:?}", stream.summary().unapplied);
        let warned = !stream.summary().warnings.is_empty();
        let adapters = [(stream, Strengths::all(1.0))];
        let out = self.folder.path().join("out");
        let _ = fs::remove_dir_all(&out);
        Merger::new(&base, &adapters, dtype)?.write_model(&self.base(), &out, &mut |_| ())?;
        Ok((out, warned))
    }
}

struct Merged {
    file: TensorFile,
    config: String,
    /// Whether the adapter came with a warning.
    warned: bool,
}

impl Merged {
    #[track_caller]
    fn holds(&self, name: &str, expected: &Array) {
        assert_eq!(&self.file.array(name).unwrap(), expected, "{name}");
    }
}

/// `base + 2·up·down` for a table of rows; every number is a multiple of 1/128, so sums are exact.
fn with(base: &Array, up: &Array, down: &Array) -> Array {
    let mut sum = base.clone();
    for (place, value) in sum.values.iter_mut().enumerate() {
        *value += 2.0 * up.values[place / WIDTH] * down.values[place % WIDTH];
    }
    sum
}

#[test]
fn the_configuration_says_the_type_that_was_asked_for_and_stays_in_every_other_byte() {
    let case = Case::new(false);
    let query = [
        ("model.layers.0.self_attn.q_proj.lora_A.weight", tensor(4, &[1, WIDTH])),
        ("model.layers.0.self_attn.q_proj.lora_B.weight", tensor(5, &[WIDTH, 1])),
    ];
    let text = CONFIG.replace("TIED", "false");
    for (dtype, name) in [(Dtype::Bf16, "bfloat16"), (Dtype::F16, "float16"), (Dtype::F32, "float32")] {
        let merged = case.merge("", &query, Some(dtype)).unwrap();
        assert_eq!(merged.config, text.replace("float32", name));
        assert_eq!(merged.file.info(QUERY).unwrap().dtype, dtype);
    }
    assert_eq!(case.merge("", &query, None).unwrap().config, text);
}

#[test]
fn adapters_made_without_the_head_find_the_same_modules() {
    let case = Case::new(false);
    let (down, up) = (tensor(4, &[1, WIDTH]), tensor(5, &[WIDTH, 1]));
    let short = [
        ("layers.0.self_attn.q_proj.lora_A.weight", down.clone()),
        ("layers.0.self_attn.q_proj.lora_B.weight", up.clone()),
    ];
    let merged = case.merge("", &short, None).unwrap();
    merged.holds(QUERY, &with(&tensor(2, &[WIDTH, WIDTH]), &up, &down));
}

#[test]
fn saved_tables_of_more_tokens_are_followed_by_the_configuration() {
    let (table, head) = (tensor(6, &[8, WIDTH]), tensor(7, &[8, WIDTH]));
    let case = Case::new(false);
    let merged = case.merge("", &[(TABLE, table.clone()), (HEAD, head.clone())], None).unwrap();
    merged.holds(TABLE, &table);
    merged.holds(HEAD, &head);
    assert_eq!(merged.config, CONFIG.replace(": 6", ": 8").replace("TIED", "false"));

    // Of a table that is the head as well, both roles grow, and the person is told.
    let merged = Case::new(true).merge("", &[(TABLE, table.clone())], None).unwrap();
    merged.holds(TABLE, &table);
    assert!(merged.file.info(HEAD).is_none() && merged.warned);
    assert_eq!(merged.config, CONFIG.replace(": 6", ": 8").replace("TIED", "true"));

    // One of the two alone would be no model.
    for (tied, key, array) in [(false, TABLE, &table), (false, HEAD, &head), (true, HEAD, &head)] {
        let error = Case::new(tied).merge("", &[(key, array.clone())], None).err().unwrap().to_string();
        assert!(error.contains("rows of the new tokens are missing"), "{error}");
    }
}

#[test]
fn adapters_act_on_the_larger_tables_that_come_with_them() {
    let (table, head) = (tensor(6, &[8, WIDTH]), tensor(7, &[8, WIDTH]));
    let (embedding_down, embedding_up) = (tensor(8, &[1, 8]), tensor(9, &[WIDTH, 1]));
    let (down, up) = (tensor(10, &[1, WIDTH]), tensor(11, &[8, 1]));
    let tensors = [
        ("model.embed_tokens.base_layer.weight", table.clone()),
        ("model.embed_tokens.lora_embedding_A", embedding_down.clone()),
        ("model.embed_tokens.lora_embedding_B", embedding_up.clone()),
        ("lm_head.base_layer.weight", head.clone()),
        ("lm_head.lora_A.weight", down.clone()),
        ("lm_head.lora_B.weight", up.clone()),
    ];
    for tied in [false, true] {
        let merged = Case::new(tied).merge("", &tensors, None).unwrap();
        merged.holds(TABLE, &with(&table, &embedding_down, &embedding_up));
        merged.holds(HEAD, &with(&head, &up, &down));
        assert_eq!(merged.config, CONFIG.replace(": 6", ": 8").replace("TIED", "false"));
    }
    // No layer but table and head grows.
    let wide = [("model.layers.0.self_attn.q_proj.base_layer.weight", tensor(6, &[8, WIDTH]))];
    assert!(Case::new(false).merge("", &wide, None).is_err());
}

#[test]
fn a_tied_head_that_was_trained_gets_a_weight_of_its_own() {
    let base = tensor(1, &[ROWS, WIDTH]);
    let (down, up) = (tensor(10, &[1, WIDTH]), tensor(11, &[ROWS, 1]));
    let (embedding_down, embedding_up) = (tensor(8, &[1, ROWS]), tensor(9, &[WIDTH, 1]));
    let head_lora = [("lm_head.lora_A.weight", down.clone()), ("lm_head.lora_B.weight", up.clone())];
    let head_kept = [("lm_head.base_layer.weight", base.clone())];
    let table_lora = [
        ("model.embed_tokens.lora_embedding_A", embedding_down.clone()),
        ("model.embed_tokens.lora_embedding_B", embedding_up.clone()),
    ];
    let (new_table, new_head) = (tensor(6, &[ROWS, WIDTH]), tensor(7, &[ROWS, WIDTH]));
    let adapted_table = with(&base, &embedding_down, &embedding_up);
    let adapted_head = with(&base, &up, &down);
    let rows: [(&str, Tensors, &Array, &Array); 6] = [
        ("an adapter on the head", head_lora.to_vec(), &base, &adapted_head),
        ("with the table that peft keeps", [&head_lora[..], &head_kept].concat(), &base, &adapted_head),
        ("one on each", [&head_lora[..], &table_lora].concat(), &adapted_table, &adapted_head),
        ("a saved head", vec![(HEAD, new_head.clone())], &base, &new_head),
        ("both saved", vec![(HEAD, new_head.clone()), (TABLE, new_table.clone())], &new_table, &new_head),
        ("a saved table", vec![(TABLE, new_table.clone())], &new_table, &base),
    ];
    for (what, tensors, table, head) in rows {
        let merged = Case::new(true).merge("", &tensors, None).unwrap();
        assert_eq!(merged.config, CONFIG.replace("TIED", "false"), "{what}");
        merged.holds(TABLE, table);
        merged.holds(HEAD, head);
        assert!(!merged.warned, "{what}");
    }
}

#[test]
fn a_tied_head_stays_the_table_where_both_were_trained_as_one() {
    let base = tensor(1, &[ROWS, WIDTH]);
    let (embedding_down, embedding_up) = (tensor(8, &[1, ROWS]), tensor(9, &[WIDTH, 1]));
    let table_lora = [
        ("model.embed_tokens.lora_embedding_A", embedding_down.clone()),
        ("model.embed_tokens.lora_embedding_B", embedding_up.clone()),
    ];
    let turned = |array: &Array| Array::new([array.shape[1], array.shape[0]], array.values.clone()).unwrap();
    let same_on_head =
        [("lm_head.lora_A.weight", turned(&embedding_up)), ("lm_head.lora_B.weight", turned(&embedding_down))];
    let saved = tensor(6, &[ROWS, WIDTH]);
    let adapted = with(&base, &embedding_down, &embedding_up);
    let ensured = ", \"ensure_weight_tying\": true";
    let rows: [(&str, &str, Tensors, &Array, bool); 3] = [
        ("saved for both", ensured, vec![(TABLE, saved.clone()), (HEAD, saved.clone())], &saved, false),
        ("an adapter for both", ensured, [&table_lora[..], &same_on_head].concat(), &adapted, false),
        // peft merges this into both roles, too, though it was trained for one.
        ("an adapter on the table", "", table_lora.to_vec(), &adapted, true),
    ];
    for (what, fields, tensors, table, warned) in rows {
        let merged = Case::new(true).merge(fields, &tensors, None).unwrap();
        assert_eq!(merged.config, CONFIG.replace("TIED", "true"), "{what}");
        merged.holds(TABLE, table);
        assert!(merged.file.info(HEAD).is_none(), "{what}");
        assert_eq!(merged.warned, warned, "{what}");
    }
}

#[test]
fn a_tensor_of_a_wrong_shape_for_a_tied_head_is_told_the_shape_of_the_table() {
    let error = Case::new(true).merge("", &[(HEAD, tensor(6, &[ROWS, 3]))], None).err().unwrap().to_string();
    assert!(error.contains("[6, 4]") && !error.contains("[6]"), "{error}");
}

#[test]
fn a_head_of_its_own_in_shards_is_listed_beside_the_table() {
    let case = Case::new(true);
    let base = case.base();
    fs::remove_file(base.join("model.safetensors")).unwrap();
    write(&base.join("a.safetensors"), &[(QUERY, tensor(2, &[WIDTH, WIDTH]))]);
    write(&base.join("b.safetensors"), &[(TABLE, tensor(1, &[ROWS, WIDTH]))]);
    let index = serde_json::json!({
        "metadata": {"total_size": 4 * WIDTH * (ROWS + WIDTH)},
        "weight_map": {QUERY: "a.safetensors", TABLE: "b.safetensors"},
    });
    // A name as diffusers and transformers give it to the index of a variant.
    let name = "model.safetensors.index.fp16.json";
    fs::write(base.join(name), index.to_string()).unwrap();
    let head = tensor(7, &[ROWS, WIDTH]);
    let (out, _) = case.merge_folder("", &[(HEAD, head.clone())], None).unwrap();
    let index: serde_json::Value = serde_json::from_str(&fs::read_to_string(out.join(name)).unwrap()).unwrap();
    assert_eq!(
        index["weight_map"],
        serde_json::json!({QUERY: "a.safetensors", TABLE: "b.safetensors", HEAD: "b.safetensors"})
    );
    assert_eq!(index["metadata"]["total_size"], 4 * WIDTH * (2 * ROWS + WIDTH));
    let merged = BaseModel::open(&out).unwrap();
    assert_eq!(merged.read(Component::LanguageModel, HEAD).unwrap(), Some(head));
    assert!(!merged.has_tied_head());
}
