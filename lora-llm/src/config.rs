//! What a `config.json` of transformers says of a decoder, in one form for all families.
//!
//! Llama 2 and 3 (also SmolLM2 and TinyLlama, which are Llamas), Mistral, Qwen 2, 2.5 and 3. They differ in biases, norms on
//! queries and keys, attention windows and the scaling of rotary positions; each difference is a field here, and the decoder
//! knows no families. Field names are transformers'; both of its spellings of rotary options are read.

use std::{fs, path::Path};

use serde::Deserialize;
use serde_json::Value;

use crate::{Error, Result};

/// The families that are built here, as `model_type` names them.
const FAMILIES: [&str; 4] = ["llama", "mistral", "qwen2", "qwen3"];

/// The supported families, for people.
pub(crate) fn supported() -> String {
    FAMILIES.map(|family| format!("`{family}`")).join(", ")
}

/// A decoder as its configuration describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct LlmConfig {
    /// The family, as `model_type` names it.
    pub family: String,
    /// How many ids have an embedding.
    pub vocab_size: usize,
    /// Width `d` between the layers.
    pub hidden_size: usize,
    /// Width inside the MLP.
    pub intermediate_size: usize,
    /// Number of layers.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; each serves `heads / key_value_heads` query heads.
    pub key_value_heads: usize,
    /// Width of a head, even.
    pub head_dim: usize,
    /// The most ids that the model was made to read.
    pub max_positions: usize,
    /// Added to mean squares.
    pub norm_eps: f64,
    /// Whether queries, keys and values have a bias, and whether the output projection has one.
    pub attention_bias: [bool; 2],
    /// Whether the MLP's layers have a bias.
    pub mlp_bias: bool,
    /// Whether queries and keys are normalised head by head.
    pub query_key_norm: bool,
    /// Whether the head is the embedding.
    pub tied: bool,
    /// Rotary positions.
    pub rope: RopeConfig,
    /// For each layer, how many positions it sees, its own included; `None` sees all that came before.
    pub windows: Vec<Option<usize>>,
    /// The ids that end a text, as far as the configuration says.
    pub eos: Vec<u32>,
    /// Whether the weights are stored in 4 bits, in the layout of bitsandbytes.
    pub quantised: bool,
}

/// Rotary positions (Su et al. 2021, arXiv 2104.09864, eq. 34).
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct RopeConfig {
    /// Base of the wavelengths.
    pub theta: f64,
    /// How wavelengths are stretched for texts longer than those of the first training.
    pub scaling: RopeScaling,
}

/// How wavelengths are stretched.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum RopeScaling {
    /// Not at all. "Dynamic" scaling is this, too, up to the length that the configuration states.
    None,
    /// All alike (Chen et al. 2023, arXiv 2306.15595).
    Linear {
        /// By how much.
        factor: f64,
    },
    /// The long ones fully, the short ones not at all, those between in part: Llama 3.1
    /// (`_compute_llama3_parameters` in transformers' `modeling_rope_utils.py`).
    Llama3 {
        /// By how much.
        factor: f64,
        /// Wavelengths above `original / low` are stretched fully.
        low: f64,
        /// Wavelengths below `original / high` stay.
        high: f64,
        /// Positions of the first training.
        original: f64,
    },
}

/// The fields of the file that are read, under their own names.
#[derive(Debug, Deserialize)]
struct File {
    model_type: Option<String>,
    vocab_size: usize,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    max_position_embeddings: usize,
    #[serde(default = "default_eps")]
    rms_norm_eps: f64,
    #[serde(default = "default_act")]
    hidden_act: String,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    tie_word_embeddings: Option<bool>,
    rope_theta: Option<f64>,
    #[serde(alias = "rope_parameters")]
    rope_scaling: Option<Value>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    eos_token_id: Option<Value>,
    quantization_config: Option<Quantisation>,
}

/// How weights are stored in fewer bits; the names are those of `BitsAndBytesConfig` in transformers.
#[derive(Debug, Deserialize)]
struct Quantisation {
    quant_method: Option<String>,
    #[serde(default)]
    load_in_4bit: bool,
    bnb_4bit_quant_type: Option<String>,
    bnb_4bit_quant_storage: Option<String>,
}

impl Quantisation {
    /// Why the weights cannot be read, if they cannot.
    fn unreadable(&self) -> Option<String> {
        let only = "only nf4 of bitsandbytes is read";
        let method = self.quant_method.as_deref().unwrap_or("bitsandbytes");
        let storage = self.bnb_4bit_quant_storage.as_deref().unwrap_or("uint8");
        match self.bnb_4bit_quant_type.as_deref().unwrap_or("fp4") {
            _ if method != "bitsandbytes" => Some(format!("says that the weights are quantised by `{method}`; {only}")),
            _ if !self.load_in_4bit => Some(format!("says that the weights are int8 of bitsandbytes; {only}")),
            "nf4" if storage == "uint8" => None,
            "nf4" => Some(format!("says that the bytes of the weights are stored as `{storage}`, expected `uint8`")),
            other => Some(format!("says that the weights are `{other}` of bitsandbytes; {only}")),
        }
    }
}

fn default_eps() -> f64 {
    1e-6
}

fn default_act() -> String {
    "silu".to_owned()
}

impl LlmConfig {
    /// Reads a `config.json`.
    ///
    /// # Errors
    /// If the file cannot be read, describes a model of another family, or one that cannot be.
    pub fn open(path: &Path) -> Result<Self> {
        let text = fs::read(path).map_err(|source| Error::Read { path: path.into(), source })?;
        let json = |source| Error::Json { path: path.into(), source };
        let value: Value = serde_json::from_slice(&text).map_err(json)?;
        // The family first: files of others may lack fields, and that would be the wrong complaint.
        let family = value["model_type"].as_str().unwrap_or("(without `model_type`)");
        if !FAMILIES.contains(&family) {
            return Err(Error::Unsupported { model: family.to_owned() });
        }
        Self::from_file(serde_json::from_value(value).map_err(json)?)
    }

    fn from_file(file: File) -> Result<Self> {
        let family = file.model_type.unwrap_or_default();
        let refuse = |option, reason: String| Err(Error::Config { option, reason });
        let quantised = file.quantization_config.is_some();
        if let Some(reason) = file.quantization_config.and_then(|config| config.unreadable()) {
            return refuse("quantization_config", reason);
        }
        if file.hidden_act != "silu" {
            return refuse("hidden_act", format!("is `{}`; only `silu` is known here", file.hidden_act));
        }
        let heads = file.num_attention_heads;
        let key_value_heads = file.num_key_value_heads.unwrap_or(heads);
        let counts = [
            ("hidden_size", file.hidden_size),
            ("intermediate_size", file.intermediate_size),
            ("num_hidden_layers", file.num_hidden_layers),
            ("num_attention_heads", heads),
            ("num_key_value_heads", key_value_heads),
            ("vocab_size", file.vocab_size),
            ("max_position_embeddings", file.max_position_embeddings),
        ];
        if let Some((option, _)) = counts.into_iter().find(|(_, count)| *count == 0) {
            return refuse(option, "is 0".to_owned());
        }
        if !heads.is_multiple_of(key_value_heads) {
            return refuse("num_key_value_heads", format!("is {key_value_heads}, which does not divide {heads} heads"));
        }
        let head_dim = file.head_dim.unwrap_or(file.hidden_size / heads);
        if head_dim == 0 || !head_dim.is_multiple_of(2) {
            return refuse("head_dim", format!("is {head_dim}, expected an even number"));
        }
        let bias = file.attention_bias.unwrap_or(false);
        let attention_bias = match family.as_str() {
            "qwen2" => [true, false],
            "mistral" => [false, false],
            _ => [bias, bias],
        };
        let tied = file.tie_word_embeddings.unwrap_or(false);
        let layers = file.num_hidden_layers;
        let window = file.sliding_window.filter(|window| *window > 0);
        let windows = match (&file.layer_types, family.as_str()) {
            (Some(types), _) if types.len() != layers => {
                return refuse("layer_types", format!("names {} layers of {layers}", types.len()));
            }
            (Some(types), _) => types.iter().map(|kind| layer_window(kind, window)).collect::<Result<_>>()?,
            (None, "mistral") => vec![window; layers],
            (None, "qwen2" | "qwen3") if file.use_sliding_window == Some(true) => {
                let first = file.max_window_layers.unwrap_or(28);
                (0..layers).map(|layer| window.filter(|_| layer >= first)).collect()
            }
            _ => vec![None; layers],
        };
        Ok(Self {
            query_key_norm: family == "qwen3",
            mlp_bias: file.mlp_bias.unwrap_or(false) && family == "llama",
            rope: rope(file.rope_theta, file.rope_scaling.as_ref(), file.max_position_embeddings)?,
            eos: ids(file.eos_token_id.as_ref()),
            quantised,
            vocab_size: file.vocab_size,
            hidden_size: file.hidden_size,
            intermediate_size: file.intermediate_size,
            max_positions: file.max_position_embeddings,
            norm_eps: file.rms_norm_eps,
            family,
            layers,
            heads,
            key_value_heads,
            head_dim,
            attention_bias,
            tied,
            windows,
        })
    }

    /// The shape of Llama 3 8B (meta-llama/Meta-Llama-3-8B, `config.json`), for benches with drawn weights.
    pub fn llama3_8b() -> Self {
        Self {
            family: "llama".to_owned(),
            vocab_size: 128_256,
            hidden_size: 4096,
            intermediate_size: 14_336,
            layers: 32,
            heads: 32,
            key_value_heads: 8,
            head_dim: 128,
            max_positions: 8192,
            norm_eps: 1e-5,
            attention_bias: [false; 2],
            mlp_bias: false,
            query_key_norm: false,
            tied: false,
            rope: RopeConfig { theta: 500_000.0, scaling: RopeScaling::None },
            windows: vec![None; 32],
            eos: vec![128_001],
            quantised: false,
        }
    }
}

fn layer_window(kind: &str, window: Option<usize>) -> Result<Option<usize>> {
    match kind {
        "full_attention" => Ok(None),
        "sliding_attention" => Ok(window),
        _ => Err(Error::Config { option: "layer_types", reason: format!("has an unknown kind of layer, `{kind}`") }),
    }
}

/// One id or several, as `eos_token_id` may be either.
pub(crate) fn ids(value: Option<&Value>) -> Vec<u32> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match value {
        Some(Value::Array(values)) => values.iter().filter_map(id).collect(),
        Some(value) => id(value).into_iter().collect(),
        None => Vec::new(),
    }
}

/// Rotary options: `rope_parameters` of transformers 5, or `rope_theta` and `rope_scaling` of those before.
fn rope(theta: Option<f64>, options: Option<&Value>, max_positions: usize) -> Result<RopeConfig> {
    let number = |key: &str| options.and_then(|options| options[key].as_f64());
    let theta = theta.or_else(|| number("rope_theta")).unwrap_or(10_000.0);
    if !(theta.is_finite() && theta > 1.0) {
        return Err(Error::Config { option: "rope_theta", reason: format!("is {theta}, expected more than 1") });
    }
    let kind = options.and_then(|options| options["rope_type"].as_str().or_else(|| options["type"].as_str()));
    let needed = |key: &'static str| {
        number(key).filter(|value| *value > 0.0).ok_or_else(|| Error::Config {
            option: "rope_scaling",
            reason: format!("needs `{key}`, a number greater than 0"),
        })
    };
    let scaling = match kind {
        None | Some("default" | "dynamic") => RopeScaling::None,
        Some("linear") => RopeScaling::Linear { factor: needed("factor")? },
        Some("llama3") => RopeScaling::Llama3 {
            factor: needed("factor")?,
            low: needed("low_freq_factor")?,
            high: needed("high_freq_factor")?,
            original: number("original_max_position_embeddings").unwrap_or(max_positions as f64),
        },
        Some(other) => {
            let reason = format!("is of the kind `{other}`; known are default, linear, dynamic and llama3");
            return Err(Error::Config { option: "rope_scaling", reason });
        }
    };
    if let RopeScaling::Llama3 { low, high, .. } = scaling
        && high <= low
    {
        let reason = "has a `high_freq_factor` that is not greater than its `low_freq_factor`".to_owned();
        return Err(Error::Config { option: "rope_scaling", reason });
    }
    Ok(RopeConfig { theta, scaling })
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn read(changes: Value) -> Result<LlmConfig> {
        let mut config = json!({
            "model_type": "llama", "vocab_size": 48, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 3,
            "num_attention_heads": 4, "max_position_embeddings": 64,
        });
        for (key, value) in changes.as_object().unwrap() {
            config[key] = value.clone();
        }
        let file = tempfile::NamedTempFile::new().unwrap();
        fs::write(file.path(), config.to_string()).unwrap();
        LlmConfig::open(file.path())
    }

    #[test]
    fn other_families_are_refused_by_name() {
        for family in ["gemma2", "phi3", "mixtral", "gpt2"] {
            let error = read(json!({ "model_type": family })).unwrap_err().to_string();
            assert!(error.starts_with(&format!("`{family}` is a kind of model that is not supported")), "{error}");
            assert!(error.contains("`llama`"), "{error}");
        }
    }

    #[test]
    fn both_spellings_of_rotary_options_say_the_same() {
        let new = read(json!({ "rope_parameters": { "rope_theta": 5e5, "rope_type": "linear", "factor": 2.0 } }));
        let old = read(json!({ "rope_theta": 5e5, "rope_scaling": { "type": "linear", "factor": 2.0 } }));
        let expected = RopeConfig { theta: 5e5, scaling: RopeScaling::Linear { factor: 2.0 } };
        assert_eq!((new.unwrap().rope, old.unwrap().rope), (expected, expected));
        let error = read(json!({ "rope_scaling": { "type": "yarn", "factor": 2.0 } })).unwrap_err().to_string();
        assert!(error.contains("`yarn`"), "{error}");
    }

    #[test]
    fn windows_follow_each_familys_rule() {
        let windows = |changes| read(changes).unwrap().windows;
        assert_eq!(windows(json!({ "model_type": "mistral", "sliding_window": 5 })), [Some(5); 3]);
        assert_eq!(windows(json!({ "model_type": "mistral", "sliding_window": null })), [None; 3]);
        let qwen = json!({
            "model_type": "qwen2", "use_sliding_window": true, "sliding_window": 4, "max_window_layers": 1,
        });
        assert_eq!(windows(qwen), [None, Some(4), Some(4)]);
        assert_eq!(windows(json!({ "model_type": "qwen2", "sliding_window": 4 })), [None; 3]);
    }

    #[test]
    fn of_quantised_weights_only_nf4_is_taken() {
        let nf4 = json!({ "quant_method": "bitsandbytes", "load_in_4bit": true, "bnb_4bit_quant_type": "nf4" });
        assert!(read(json!({ "quantization_config": nf4 })).unwrap().quantised);
        assert!(!read(json!({ "quantization_config": null })).unwrap().quantised);
        for (config, named) in [
            (json!({ "quant_method": "gptq", "bits": 4 }), "`gptq`"),
            (json!({ "quant_method": "awq", "bits": 4 }), "`awq`"),
            (json!({ "quant_method": "bitsandbytes", "load_in_8bit": true }), "int8"),
            (json!({ "quant_method": "bitsandbytes", "load_in_4bit": true }), "`fp4`"),
            (
                json!({ "load_in_4bit": true, "bnb_4bit_quant_type": "nf4", "bnb_4bit_quant_storage": "bfloat16" }),
                "`bfloat16`",
            ),
        ] {
            let error = read(json!({ "quantization_config": config })).unwrap_err().to_string();
            assert!(error.starts_with("config.json: `quantization_config` ") && error.contains(named), "{error}");
        }
    }

    #[test]
    fn sizes_that_do_not_fit_are_named() {
        for (changes, option) in [
            (json!({ "num_key_value_heads": 3 }), "num_key_value_heads"),
            (json!({ "head_dim": 3 }), "head_dim"),
            (json!({ "num_hidden_layers": 0 }), "num_hidden_layers"),
            (json!({ "hidden_act": "gelu" }), "hidden_act"),
            (json!({ "rope_theta": 0.0 }), "rope_theta"),
            (json!({ "layer_types": ["full_attention"] }), "layer_types"),
        ] {
            let error = read(changes).unwrap_err().to_string();
            assert!(error.starts_with(&format!("config.json: `{option}` ")), "{error}");
        }
    }
}
