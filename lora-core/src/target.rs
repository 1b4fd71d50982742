//! Which modules of a model get an adapter: presets and regular expressions over checkpoint paths.
//!
//! Paths are those of diffusers (UNet), of transformers' CLIP (text encoders) and of its causal language models. Only
//! projections are asked about: every path belongs to a linear layer, a convolution, or a language model's embedding. The presets follow what the
//! field trains: sd-scripts' default is `attention+ff` here, diffusers' is `attention`.

use std::{fmt, str::FromStr};

use regex::Regex;

use crate::{Error, Result, format::Component};

/// A named choice of target modules.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Preset {
    /// Attention from the picture to the text: `attn2.{to_q, to_k, to_v, to_out.0}` of a UNet.
    CrossAttention,
    /// Every attention: also `attn1` of a UNet, and `self_attn` of a language model.
    Attention,
    /// Attention, the feed-forward layers behind it, and the projections `proj_in`, `proj_out` around a UNet's blocks.
    #[default]
    AttentionFf,
    /// Every linear layer and 1×1 convolution but a language model's head; its embedding is none.
    Linear,
    /// Those and the convolutions with a larger kernel.
    All,
}

impl Preset {
    /// Every preset.
    pub const ALL: [Self; 5] = [Self::CrossAttention, Self::Attention, Self::AttentionFf, Self::Linear, Self::All];

    /// The name that [`Targets`] reads.
    pub fn name(self) -> &'static str {
        match self {
            Self::CrossAttention => "cross-attention",
            Self::Attention => "attention",
            Self::AttentionFf => "attention+ff",
            Self::Linear => "linear",
            Self::All => "all",
        }
    }

    /// The preset of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|preset| preset.name() == name)
    }

    fn matches(self, component: Component, path: &str, is_conv_with_kernel: bool) -> bool {
        if is_conv_with_kernel {
            return self == Self::All;
        }
        let within = |module: &str, leaves: &[&str]| {
            let mut names = path.rsplit('.');
            let leaf = names.next().is_some_and(|leaf| leaves.contains(&leaf));
            leaf && names.next() == Some(module)
        };
        let (cross, own, around) = match component {
            Component::Unet => {
                // `to_out` is a list of the layer and its dropout.
                let attends = |module: &str| {
                    within(module, &["to_q", "to_k", "to_v"]) || path.ends_with(&format!(".{module}.to_out.0"))
                };
                let feeds = path.ends_with(".ff.net.0.proj") || path.ends_with(".ff.net.2");
                let surrounds = path.ends_with(".proj_in") || path.ends_with(".proj_out");
                (attends("attn2"), attends("attn1"), feeds || surrounds)
            }
            Component::TextEncoder | Component::TextEncoder2 => {
                let attends = within("self_attn", &["q_proj", "k_proj", "v_proj", "out_proj"]);
                (attends, attends, within("mlp", &["fc1", "fc2"]))
            }
            Component::LanguageModel => {
                let attends = within("self_attn", &["q_proj", "k_proj", "v_proj", "o_proj"]);
                (false, attends, within("mlp", &["gate_proj", "up_proj", "down_proj"]))
            }
            Component::Vae => return false,
        };
        match self {
            Self::CrossAttention => cross,
            Self::Attention => cross || own,
            Self::AttentionFf => cross || own || around,
            Self::Linear | Self::All => {
                component != Component::LanguageModel || (path != "lm_head" && !path.ends_with("embed_tokens"))
            }
        }
    }
}

/// Which modules get an adapter; parsed from presets (each also with `+te` for the text encoders) and patterns.
///
/// A module is a target if any of them matches. A pattern is a regular expression that is searched in
/// `<component>.<path>` (`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q`); `^` may also stand before
/// the path itself.
///
/// ```
/// use lora_core::{format::Component, target::Targets};
///
/// let targets = Targets::parse(["cross-attention", r"mid_block.*\.ff\."])?;
/// let path = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_q";
/// assert!(targets.matches(Component::Unet, path, false));
/// assert!(!targets.matches(Component::TextEncoder, "text_model.encoder.layers.0.self_attn.q_proj", false));
/// # Ok::<(), lora_core::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Targets {
    rules: Vec<Rule>,
}

#[derive(Debug, Clone)]
enum Rule {
    Preset { preset: Preset, text_encoders: bool },
    Pattern(Regex),
}

impl Targets {
    /// Targets from presets and patterns, at least one.
    ///
    /// # Errors
    /// If there is none, or one is neither a preset nor a regular expression.
    pub fn parse<S: AsRef<str>>(rules: impl IntoIterator<Item = S>) -> Result<Self> {
        let rules = rules.into_iter().map(|rule| rule.as_ref().parse()).collect::<Result<Vec<Rule>>>()?;
        if rules.is_empty() {
            return Err(Error::Config { option: "targets", reason: "there is no preset and no pattern".into() });
        }
        Ok(Self { rules })
    }

    /// Whether the projection at `path` of `component` gets an adapter.
    ///
    /// `is_conv_with_kernel`: whether it is a convolution whose kernel is larger than 1×1.
    pub fn matches(&self, component: Component, path: &str, is_conv_with_kernel: bool) -> bool {
        self.rules.iter().any(|rule| rule.matches(component, path, is_conv_with_kernel))
    }

    /// Whether any module of `component` can be a target at all, so that it need not be loaded otherwise.
    ///
    /// Patterns may match anywhere.
    pub fn may_reach(&self, component: Component) -> bool {
        self.rules.iter().any(|rule| match rule {
            Rule::Preset { text_encoders, .. } => match component {
                Component::Unet | Component::LanguageModel => true,
                Component::TextEncoder | Component::TextEncoder2 => *text_encoders,
                Component::Vae => false,
            },
            Rule::Pattern(_) => true,
        })
    }

    /// Checks that every preset and pattern matches at least one of a model's projections (component, path, whether
    /// it is a convolution with a kernel).
    ///
    /// # Errors
    /// [`Error::NoTarget`] for the first that matches none, with the names nearest to it.
    pub fn check<'a>(&self, modules: impl IntoIterator<Item = (Component, &'a str, bool)>) -> Result<()> {
        let modules: Vec<_> = modules.into_iter().collect();
        for rule in &self.rules {
            if !modules.iter().any(|(component, path, conv)| rule.matches(*component, path, *conv)) {
                let wanted = rule.to_string();
                let near = near(&wanted, modules.iter().map(|(_, path, _)| *path));
                return Err(Error::NoTarget { wanted, near });
            }
        }
        Ok(())
    }
}

/// `attention+ff`: on a UNet with the projections around the blocks, on a language model all seven linear layers.
impl Default for Targets {
    fn default() -> Self {
        Self { rules: vec![Rule::Preset { preset: Preset::default(), text_encoders: false }] }
    }
}

/// What was parsed, separated by spaces.
impl fmt::Display for Targets {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, rule) in self.rules.iter().enumerate() {
            write!(f, "{}{rule}", if i == 0 { "" } else { " " })?;
        }
        Ok(())
    }
}

impl Rule {
    fn matches(&self, component: Component, path: &str, is_conv_with_kernel: bool) -> bool {
        match self {
            Self::Preset { text_encoders: false, .. } if component.is_text_encoder() => false,
            Self::Preset { preset, .. } => preset.matches(component, path, is_conv_with_kernel),
            Self::Pattern(pattern) => pattern.is_match(path) || pattern.is_match(&format!("{component}.{path}")),
        }
    }
}

impl FromStr for Rule {
    type Err = Error;

    fn from_str(rule: &str) -> Result<Self> {
        if let Some(preset) = Preset::from_name(rule) {
            return Ok(Self::Preset { preset, text_encoders: false });
        }
        if let Some(preset) = rule.strip_suffix("+te").and_then(Preset::from_name) {
            return Ok(Self::Preset { preset, text_encoders: true });
        }
        if rule.is_empty() {
            return Err(Error::Config { option: "targets", reason: "an empty pattern matches everything".into() });
        }
        Regex::new(rule).map(Self::Pattern).map_err(|source| Error::Pattern { pattern: rule.into(), source })
    }
}

impl fmt::Display for Rule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Preset { preset, text_encoders } => {
                write!(f, "{}{}", preset.name(), if *text_encoders { "+te" } else { "" })
            }
            Self::Pattern(pattern) => f.write_str(pattern.as_str()),
        }
    }
}

/// Up to three names, presets and endings of the paths, that look most like what was wanted.
fn near<'a>(wanted: &str, paths: impl Iterator<Item = &'a str>) -> Vec<String> {
    const LEAST_ALIKE: f64 = 0.55;
    let wanted = wanted.replace(['\\', '^', '$', '(', ')', '*', '?', '[', ']'], "");
    let depth = wanted.matches('.').count();
    let ending = |path: &'a str| {
        let start = path.rmatch_indices('.').nth(depth).map_or(0, |(dot, _)| dot + 1);
        &path[start..]
    };
    let mut names: Vec<&str> = Preset::ALL.map(Preset::name).to_vec();
    names.extend(paths.map(ending));
    names.sort_unstable();
    names.dedup();
    let mut scored: Vec<(f64, &str)> =
        names.into_iter().map(|name| (strsim::normalized_damerau_levenshtein(&wanted, name), name)).collect();
    scored.retain(|(likeness, name)| *likeness >= LEAST_ALIKE && *name != wanted);
    scored.sort_by(|a, b| b.0.total_cmp(&a.0));
    scored.into_iter().take(3).map(|(_, name)| name.to_owned()).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const BLOCK: &str = "down_blocks.0.attentions.0.transformer_blocks.0";
    const CLIP: &str = "text_model.encoder.layers.0";

    /// The modules that one preset picks out of a few of each kind, as (component, path, conv).
    fn modules() -> Vec<(Component, String, bool)> {
        let unet = [
            ("conv_in".into(), true),
            ("time_embedding.linear_1".into(), false),
            ("down_blocks.0.resnets.0.conv1".into(), true),
            ("down_blocks.0.resnets.0.time_emb_proj".into(), false),
            ("down_blocks.0.attentions.0.proj_in".into(), false),
            (format!("{BLOCK}.attn1.to_q"), false),
            (format!("{BLOCK}.attn1.to_out.0"), false),
            (format!("{BLOCK}.attn2.to_k"), false),
            (format!("{BLOCK}.attn2.to_out.0"), false),
            (format!("{BLOCK}.ff.net.0.proj"), false),
            (format!("{BLOCK}.ff.net.2"), false),
        ];
        let text = [format!("{CLIP}.self_attn.q_proj"), format!("{CLIP}.mlp.fc1")];
        let language = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.gate_proj", "lm_head"];
        let unet = unet.into_iter().map(|(path, conv)| (Component::Unet, path, conv));
        let text = text.into_iter().map(|path| (Component::TextEncoder, path, false));
        let language = language.into_iter().map(|path| (Component::LanguageModel, path.to_owned(), false));
        unet.chain(text).chain(language).collect()
    }

    #[track_caller]
    fn check(rules: &[&str], expected: &[usize]) {
        let targets = Targets::parse(rules).unwrap();
        let found: Vec<usize> = modules()
            .iter()
            .enumerate()
            .filter(|(_, (component, path, conv))| targets.matches(*component, path, *conv))
            .map(|(i, _)| i)
            .collect();
        assert_eq!(found, expected, "{rules:?}");
    }

    #[test]
    fn presets_choose_their_kinds_of_modules() {
        check(&["cross-attention"], &[7, 8]);
        check(&["attention"], &[5, 6, 7, 8, 13]);
        check(&["attention+ff"], &[4, 5, 6, 7, 8, 9, 10, 13, 14]);
        check(&["attention+ff+te"], &[4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14]);
        check(&["attention+te"], &[5, 6, 7, 8, 11, 13]);
        check(&["linear"], &[1, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14]);
        check(&["all"], &[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 13, 14]);
    }

    #[test]
    fn patterns_reach_paths_with_and_without_their_component() {
        check(&[r"attn2\.to_k$"], &[7]);
        check(&["^conv_in$"], &[0]);
        check(&[r"^unet\.conv_in$", r"^text_encoder\..*fc1"], &[0, 12]);
        check(&["cross-attention", "lm_head"], &[7, 8, 15]);
    }

    #[test]
    fn a_rule_that_matches_nothing_is_an_error_that_shows_near_names() {
        let names = modules();
        let all = || names.iter().map(|(component, path, conv)| (*component, path.as_str(), *conv));
        let near = |rule: &str| match Targets::parse([rule]).unwrap().check(all()) {
            Err(Error::NoTarget { near, wanted }) if wanted == rule => near,
            other => panic!("{other:?}"),
        };
        assert!(near("atention").contains(&"attention".to_owned()));
        assert!(near(r"attn2\.to_kk$").contains(&"attn2.to_k".to_owned()));
        assert!(near("xyzzy").is_empty());
        assert!(Targets::default().check(all()).is_ok());
    }

    #[test]
    fn broken_and_empty_patterns_are_refused() {
        assert!(matches!(Targets::parse(["attn[2"]), Err(Error::Pattern { .. })));
        assert!(Targets::parse([""]).is_err());
        assert!(Targets::parse(Vec::<String>::new()).is_err());
    }

    #[test]
    fn targets_print_as_they_were_written() {
        let rules = ["attention+ff+te", r"conv_in$"];
        assert_eq!(Targets::parse(rules).unwrap().to_string(), r"attention+ff+te conv_in$");
        assert!(!Targets::default().may_reach(Component::TextEncoder));
        assert!(Targets::parse(rules).unwrap().may_reach(Component::TextEncoder2));
    }
}
