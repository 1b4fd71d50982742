//! What a peft configuration says about numbers: `adapter_config.json`, and `lora_adapter_metadata` of diffusers' files.
//!
//! Source: `docs/formats.md` §7. Fields that change the model or the forward pass and are not known here are errors that
//! name them; fields without influence on the numbers are not looked at.

use std::path::PathBuf;

use regex::Regex;
use serde_json::{Map, Value};

use super::{Fault, TensorFile};
use crate::ScaleRule;

/// A peft configuration, as far as loading needs it.
#[derive(Debug, Clone)]
pub struct PeftConfig {
    /// `LORA`, `LOHA`, `LOKR`, `IA3` or `OFT`.
    pub kind: PeftKind,
    /// `r`.
    pub rank: usize,
    /// `lora_alpha` or `alpha`.
    pub alpha: f64,
    rank_pattern: Vec<(Pattern, f64)>,
    alpha_pattern: Vec<(Pattern, f64)>,
    /// How alpha and rank make the scale.
    pub rule: ScaleRule,
    /// Whether base weights of linear layers are stored `[in, out]`.
    pub fan_in_fan_out: bool,
    /// What was taken out of the base weight at the start.
    pub start: PeftStart,
    /// Rows of embeddings that the file replaces.
    token_rows: Vec<TokenRows>,
    /// OFT: terms of the truncated series; `None` for the exact form.
    pub neumann_terms: Option<usize>,
    /// The fields as they stand, for writing back.
    pub fields: Map<String, Value>,
}

/// Kinds of adapters that are read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names say it")]
pub enum PeftKind {
    Lora,
    Loha,
    Lokr,
    Ia3,
    Oft,
}

/// What the base weight lost when training began.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PeftStart {
    /// Nothing.
    None,
    /// Its leading singular triplets.
    Pissa,
    /// The leading part of its QR decomposition.
    Olora,
}

/// A key of a pattern table: a regular expression over the end of a module's name.
#[derive(Debug, Clone)]
struct Pattern(Regex);

/// Rows of the tables that a pattern fits; of every table without one.
type TokenRows = (Option<Pattern>, Vec<usize>);

/// Fields that change the model or the forward pass and are not known here, unless unset.
const UNSUPPORTED: [&str; 11] = [
    "target_parameters",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
    "velora_config",
    "megatron_config",
    "coft",
];

/// More than any rank, and more terms of a series than change a number.
const RANKS: f64 = 1e9;
const TERMS: f64 = 100.0;

/// Starts that leave the base weight as it is.
const PLAIN_STARTS: [&str; 5] = ["gaussian", "eva", "orthogonal", "mica", "true"];

impl PeftConfig {
    /// Where the configuration of a file lies, which may be missing; `None` for a file that has none of peft's.
    pub fn beside(file: &TensorFile) -> Option<PathBuf> {
        let beside = file.path().with_file_name("adapter_config.json");
        // Some programs take the beginning off the keys and leave file and configuration where peft puts them.
        let has_lost_it = || file.path().file_stem().is_some_and(|stem| stem == "adapter_model") && beside.is_file();
        (file.names().any(|name| name.starts_with("base_model.model.")) || has_lost_it()).then_some(beside)
    }

    /// From the fields of a configuration.
    ///
    /// # Errors
    /// If a field has a type or value that cannot be followed.
    pub fn of(fields: Map<String, Value>) -> Result<Self, Fault> {
        let wrong = |field: &str, problem: String| Fault::PeftField { field: field.to_owned(), problem };
        let get = |field: &str| fields.get(field).filter(|value| !value.is_null());
        let number = |field: &str, default: f64| match get(field) {
            None => Ok(default),
            Some(value) => match value.as_f64().filter(|number| number.is_finite()) {
                Some(number) => Ok(number),
                None => Err(wrong(field, format!("{value} is not a number"))),
            },
        };
        let whole = |field: &str, value: f64, least: f64, most: f64| match value.fract() == 0.0
            && (least..=most).contains(&value)
        {
            true => Ok(value as usize),
            false => Err(wrong(field, format!("{value} is not a whole number from {least} to {most}"))),
        };
        let flag = |field: &str| match get(field) {
            None => Ok(false),
            Some(Value::Bool(flag)) => Ok(*flag),
            Some(value) => Err(wrong(field, format!("{value} is neither true nor false"))),
        };
        let kind = match get("peft_type").and_then(Value::as_str).unwrap_or("LORA") {
            "LORA" => PeftKind::Lora,
            "LOHA" => PeftKind::Loha,
            "LOKR" => PeftKind::Lokr,
            "IA3" => PeftKind::Ia3,
            "OFT" => PeftKind::Oft,
            other => return Err(wrong("peft_type", format!("{other} adapters are not known here"))),
        };
        for field in UNSUPPORTED {
            let unset = |value: &&Value| {
                matches!(value, Value::Bool(false))
                    || value.as_object().is_some_and(Map::is_empty)
                    || **value == Value::Array(Vec::new())
            };
            if let Some(value) = get(field).filter(|value| !unset(value)) {
                return Err(wrong(field, format!("{value} changes the model in a way that is not known here")));
            }
        }
        // OFT keeps 0 where the size of its blocks is given instead.
        let least = if matches!(kind, PeftKind::Lora | PeftKind::Loha | PeftKind::Lokr) { 1.0 } else { 0.0 };
        let rank = whole("r", number("r", 8.0)?, least, RANKS)?;
        let patterns = |field: &str| -> Result<Vec<(Pattern, f64)>, Fault> {
            let Some(value) = get(field) else { return Ok(Vec::new()) };
            let table = value.as_object().ok_or_else(|| wrong(field, format!("{value} is no table")))?;
            let entry = |(key, value): (&String, &Value)| {
                let number = value.as_f64().filter(|number| number.is_finite());
                let number = number.ok_or_else(|| wrong(field, format!("{value} is not a number")))?;
                Ok((Pattern::of(field, key)?, number))
            };
            table.iter().map(entry).collect()
        };
        let rank_pattern = patterns("rank_pattern")?;
        rank_pattern.iter().try_for_each(|(_, rank)| whole("rank_pattern", *rank, least, RANKS).map(drop))?;
        let truncated = kind == PeftKind::Oft && flag("use_cayley_neumann")?;
        let terms = whole("num_cayley_neumann_terms", number("num_cayley_neumann_terms", 5.0)?, 0.0, TERMS)?;
        Ok(Self {
            kind,
            rank,
            alpha: number(if matches!(kind, PeftKind::Loha | PeftKind::Lokr) { "alpha" } else { "lora_alpha" }, 8.0)?,
            rank_pattern,
            alpha_pattern: patterns("alpha_pattern")?,
            rule: if flag("use_rslora")? { ScaleRule::RankRoot } else { ScaleRule::Rank },
            fan_in_fan_out: flag("fan_in_fan_out")?,
            start: start(get("init_lora_weights"))?,
            token_rows: token_rows(get("trainable_token_indices"))?,
            neumann_terms: truncated.then_some(terms),
            fields,
        })
    }

    /// The configuration of one component out of diffusers' metadata (`unet.r`, `unet.lora_alpha`, …).
    ///
    /// # Errors
    /// As [`of`](Self::of).
    pub fn of_component(all: &Map<String, Value>, component: &str) -> Result<Option<Self>, Fault> {
        let own = |(key, value): (&String, &Value)| {
            let field = key.strip_prefix(component)?.strip_prefix('.')?;
            Some((field.to_owned(), value.clone()))
        };
        let fields: Map<String, Value> = all.iter().filter_map(own).collect();
        if fields.is_empty() { Ok(None) } else { Self::of(fields).map(Some) }
    }

    /// The scale of a module, by any of the names that peft may know it under.
    ///
    /// `rank` is that of the tensors where the file has one; the configuration's own serves where it has none.
    pub fn scale(&self, names: &[&str], rank: Option<usize>) -> f64 {
        self.rule.scale(self.module_alpha(names), rank.unwrap_or_else(|| self.module_rank(names)))
    }

    /// The alpha that the configuration gives a module, by any of the names that peft may know it under.
    pub fn module_alpha(&self, names: &[&str]) -> f64 {
        first(&self.alpha_pattern, names).unwrap_or(self.alpha)
    }

    /// The rank that the configuration gives a module.
    pub fn module_rank(&self, names: &[&str]) -> usize {
        first(&self.rank_pattern, names).map_or(self.rank, |rank| rank as usize)
    }

    /// Whether table and head of a model that ties them were trained as one (`ensure_weight_tying`): the file then holds
    /// the same change for both.
    pub(super) fn ties_head(&self) -> bool {
        self.fields.get("ensure_weight_tying") == Some(&Value::Bool(true))
    }

    /// The rows of a module's table that the file replaces, in the order of the file.
    pub fn token_rows(&self, name: &str) -> Option<&[usize]> {
        let fits = |pattern: &Option<Pattern>| pattern.as_ref().is_none_or(|pattern| pattern.matches(name));
        self.token_rows.iter().find(|(pattern, _)| fits(pattern)).map(|(_, rows)| &**rows)
    }
}

impl Pattern {
    fn of(field: &str, key: &str) -> Result<Self, Fault> {
        let wrong = |error: regex::Error| Fault::PeftField {
            field: field.to_owned(),
            problem: format!("`{}` is no regular expression that is known here: {error}", key.escape_debug()),
        };
        Regex::new(&format!(r"^(?:.*\.)?(?:{key})$")).map(Self).map_err(wrong)
    }

    fn matches(&self, name: &str) -> bool {
        self.0.is_match(name)
    }
}

/// The value of the first pattern, in the order of the file, that fits one of the names.
fn first(patterns: &[(Pattern, f64)], names: &[&str]) -> Option<f64> {
    patterns.iter().find(|(pattern, _)| names.iter().any(|name| pattern.matches(name))).map(|(_, value)| *value)
}

fn start(value: Option<&Value>) -> Result<PeftStart, Fault> {
    let refused = |problem: String| Fault::PeftField { field: "init_lora_weights".to_owned(), problem };
    match value {
        None | Some(Value::Bool(_)) => Ok(PeftStart::None),
        Some(Value::String(name)) => match &**name {
            "pissa" => Ok(PeftStart::Pissa),
            "olora" => Ok(PeftStart::Olora),
            name if PLAIN_STARTS.contains(&name) => Ok(PeftStart::None),
            name => Err(refused(format!(
                "what `{}` took out of the base weight cannot be computed again; save the adapter with \
                 `path_initial_model_for_weight_conversion` and use that file",
                name.escape_debug()
            ))),
        },
        Some(other) => Err(refused(format!("{other} is not known here"))),
    }
}

fn token_rows(value: Option<&Value>) -> Result<Vec<TokenRows>, Fault> {
    let field = "trainable_token_indices";
    let rows = |value: &Value| -> Option<Vec<usize>> {
        value.as_array()?.iter().map(|row| usize::try_from(row.as_u64()?).ok()).collect()
    };
    let wrong = |value: &Value| Fault::PeftField {
        field: field.to_owned(),
        problem: format!("{value} is no list of token numbers"),
    };
    match value {
        None => Ok(Vec::new()),
        Some(Value::Object(table)) => table
            .iter()
            .map(|(key, value)| Ok((Some(Pattern::of(field, key)?), rows(value).ok_or_else(|| wrong(value))?)))
            .collect(),
        Some(list) => Ok(vec![(None, rows(list).ok_or_else(|| wrong(list))?)]),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn config(value: Value) -> Result<PeftConfig, Fault> {
        PeftConfig::of(value.as_object().unwrap().clone())
    }

    #[test]
    fn the_first_pattern_that_fits_the_end_of_a_name_wins() {
        let config = config(json!({
            "r": 4, "lora_alpha": 4, "rank_pattern": {"q_proj": 2, "layers.0.self_attn.q_proj": 8},
            "alpha_pattern": {".*layers\\.1.*o_proj": 3, "v_proj": 16},
        }))
        .unwrap();
        assert_eq!(config.module_rank(&["model.layers.0.self_attn.q_proj"]), 2);
        assert_eq!(config.module_rank(&["model.layers.0.self_attn.xq_proj"]), 4, "a name ends at a dot");
        assert_eq!(config.scale(&["model.layers.1.self_attn.o_proj"], None), 0.75);
        assert_eq!(config.scale(&["model.layers.0.self_attn.v_proj"], Some(8)), 2.0);
    }

    #[test]
    fn rank_stabilised_scale_takes_the_root_of_the_modules_own_rank() {
        let config = config(json!({"r": 4, "lora_alpha": 6, "use_rslora": true, "rank_pattern": {"q": 9}})).unwrap();
        assert_eq!(config.scale(&["q"], None), 2.0);
        assert_eq!(config.scale(&["v"], None), 3.0);
    }

    #[test]
    fn what_changes_the_model_is_refused_by_name() {
        for (fields, name) in [
            (json!({"peft_type": "VERA"}), "VERA"),
            (json!({"layer_replication": [[0, 2]]}), "layer_replication"),
            (json!({"use_qalora": true}), "use_qalora"),
            (json!({"init_lora_weights": "pissa_niter_4"}), "pissa_niter_4"),
            (json!({"lora_alpha": "many"}), "lora_alpha"),
            (json!({"rank_pattern": {"(": 3}}), "rank_pattern"),
            (json!({"r": 0}), "r"),
            (json!({"r": 2.5}), "2.5"),
            (json!({"rank_pattern": {"q_proj": -3}}), "-3"),
            (json!({"peft_type": "OFT", "use_cayley_neumann": true, "num_cayley_neumann_terms": 1e18}), "num_cayley"),
        ] {
            let error = config(fields).unwrap_err().to_string();
            assert!(error.contains(name), "{error}");
        }
        assert!(
            config(json!({"use_qalora": false, "layer_replication": null, "init_lora_weights": "gaussian"})).is_ok()
        );
    }
}
