//! Which files of a repository a model needs: configurations, tokenizers, templates and one set of weights.
//!
//! Repositories hold the same weights several times over: as safetensors and pickles, in other precisions, as one file
//! beside a folder of parts, for other programs. Stable Diffusion 1.5 comes in 40 GB, of which 5 are read here. The order of
//! preference is that of the readers, `lora_core::format` and `lora_diffusion`: the plain name, shards, then a variant.

use crate::{Error, Listing, RemoteFile, Result};

/// What of a repository is wanted.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// These files and no others; empty for whatever the model needs.
    pub files: Vec<String>,
    /// The variant of the weights, where there are several: `fp16`.
    pub variant: Option<String>,
}

/// Parts of a diffusers model that are read.
const COMPONENTS: [&str; 4] = ["unet", "vae", "text_encoder", "text_encoder_2"];
/// Folders of small files beside them.
const SMALL: [&str; 3] = ["tokenizer", "tokenizer_2", "scheduler"];
/// Small files of a language model.
const TEXT: [&str; 8] = [
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.json",
    "chat_template.jinja",
];
/// Stems of weight files, in order.
const STEMS: [&str; 2] = ["diffusion_pytorch_model", "model"];
/// Variants that are taken where there is nothing else, in order.
const VARIANTS: [&str; 4] = ["fp16", "bf16", "fp32", "non_ema"];
/// What adapters are called.
const ADAPTERS: [&str; 2] = ["adapter_model.safetensors", "pytorch_lora_weights.safetensors"];
/// Kinds of files that are never fetched.
const REFUSED: [(&str, &str); 11] = [
    ("bin", PICKLE),
    ("ckpt", PICKLE),
    ("pt", PICKLE),
    ("pth", PICKLE),
    ("pkl", PICKLE),
    ("pickle", PICKLE),
    ("gguf", "a file for llama.cpp"),
    ("onnx", "a file for ONNX"),
    ("h5", "a file for Keras"),
    ("msgpack", "a file for Flax"),
    ("tflite", "a file for TensorFlow"),
];
const PICKLE: &str = "a pickle, which can run code";

/// The files to fetch, weights first and the file that marks the model as there last.
///
/// # Errors
/// If a wanted file is not there or of a kind that is not fetched, or nothing in the repository can be used.
pub(crate) fn select<'a>(repository: &str, listing: &'a Listing, wanted: &Wanted) -> Result<Vec<&'a RemoteFile>> {
    let mut files = match wanted.files.is_empty() {
        true => Repository { name: repository, listing, variant: wanted.variant.as_deref() }.needed()?,
        false => named(repository, listing, &wanted.files)?,
    };
    files.sort_by_key(|file| (rank(&file.name), file.name.as_str()));
    files.dedup_by(|one, other| one.name == other.name);
    Ok(files)
}

/// Small files before large ones, so that trouble shows early; what tells a reader that a model is there comes last.
fn rank(name: &str) -> u8 {
    match name {
        "config.json" | "model_index.json" | "adapter_config.json" => 2,
        _ if is_weights(name) => 1,
        _ => 0,
    }
}

fn named<'a>(repository: &str, listing: &'a Listing, names: &[String]) -> Result<Vec<&'a RemoteFile>> {
    let find = |name: &String| {
        if let Some(kind) = refused(name) {
            return Err(Error::Kind { file: name.clone(), kind });
        }
        listing.file(name).ok_or_else(|| Error::NoFile {
            repository: repository.to_owned(),
            file: name.clone(),
            suggestion: nearest(name, listing.files.iter().map(|file| file.name.as_str())),
        })
    };
    names.iter().map(find).collect()
}

struct Repository<'a, 'b> {
    name: &'b str,
    listing: &'a Listing,
    variant: Option<&'b str>,
}

impl<'a> Repository<'a, '_> {
    fn needed(&self) -> Result<Vec<&'a RemoteFile>> {
        if self.has("model_index.json") {
            return self.pipeline();
        }
        if let Some(adapter) =
            ADAPTERS.iter().find_map(|name| self.listing.file(name)).filter(|_| !self.has("config.json"))
        {
            return Ok([Some(adapter), self.listing.file("adapter_config.json")].into_iter().flatten().collect());
        }
        if self.has("config.json") {
            let mut files: Vec<_> = TEXT.iter().filter_map(|name| self.listing.file(name)).collect();
            files.extend(self.files().filter(|file| {
                file.name.strip_prefix("additional_chat_templates/").is_some_and(|name| name.ends_with(".jinja"))
            }));
            files.extend(self.weights("")?);
            return Ok(files);
        }
        let loose: Vec<_> = self.files().filter(|file| !file.name.contains('/') && is_weights(&file.name)).collect();
        match loose.len() {
            0 => Err(self.nothing("")),
            1 => Ok(loose),
            _ => Err(Error::Several {
                repository: self.name.to_owned(),
                files: loose.iter().map(|file| file.name.clone()).collect(),
            }),
        }
    }

    /// The parts of a diffusers folder.
    fn pipeline(&self) -> Result<Vec<&'a RemoteFile>> {
        if !self.files().any(|file| file.name.starts_with("unet/")) {
            return Err(Error::Nothing {
                repository: self.name.to_owned(),
                reason:
                    "it is a diffusers model without a UNet, and only Stable Diffusion 1.x, 2.x and XL are read here"
                        .into(),
            });
        }
        let mut files: Vec<_> = self.listing.file("model_index.json").into_iter().collect();
        for folder in SMALL {
            files.extend(
                self.inside(folder)
                    .filter(|(_, name)| name.ends_with(".json") || name.ends_with(".txt"))
                    .map(|(file, _)| file),
            );
        }
        for folder in COMPONENTS {
            if let Some(config) = self.listing.file(&format!("{folder}/config.json")) {
                files.push(config);
                files.extend(self.weights(&format!("{folder}/"))?);
            }
        }
        Ok(files)
    }

    /// The weights of one folder, `folder` with its slash: the wanted variant, one file, shards, or another variant.
    fn weights(&self, folder: &str) -> Result<Vec<&'a RemoteFile>> {
        for stem in STEMS {
            let plain = || self.set(folder, stem, None);
            let wanted = || self.variant.and_then(|variant| self.set(folder, stem, Some(variant)));
            let other = || VARIANTS.iter().find_map(|variant| self.set(folder, stem, Some(variant)));
            if let Some(files) = wanted().or_else(plain).or_else(other) {
                return Ok(files);
            }
        }
        let mut loose = self.inside(folder.trim_end_matches('/')).filter(|(_, name)| is_weights(name));
        match (loose.next(), loose.next()) {
            (Some((only, _)), None) => Ok(vec![only]),
            _ => Err(self.nothing(folder)),
        }
    }

    /// One spelling of the weights: a file, or shards with their index.
    fn set(&self, folder: &str, stem: &str, variant: Option<&str>) -> Option<Vec<&'a RemoteFile>> {
        let dotted = variant.map(|variant| format!(".{variant}")).unwrap_or_default();
        if let Some(file) = self.listing.file(&format!("{folder}{stem}{dotted}.safetensors")) {
            return Some(vec![file]);
        }
        // The readers know shards of the plain name alone.
        let index =
            self.listing.file(&format!("{folder}{stem}.safetensors.index.json")).filter(|_| variant.is_none())?;
        let start = format!("{folder}{stem}-");
        let shard = |file: &&RemoteFile| {
            let middle = file.name.strip_prefix(&start).and_then(|rest| rest.strip_suffix(".safetensors"));
            let numbers = middle.and_then(|middle| middle.split_once("-of-"));
            let is_number = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
            numbers.is_some_and(|(number, of)| is_number(number) && is_number(of))
        };
        let shards: Vec<_> = self.files().filter(shard).collect();
        (!shards.is_empty()).then(|| [vec![index], shards].concat())
    }

    fn nothing(&self, folder: &str) -> Error {
        let inside = |file: &&RemoteFile| file.name.strip_prefix(folder).is_some_and(|name| !name.contains('/'));
        let other = self.files().filter(inside).find_map(|file| Some((&file.name, refused(&file.name)?)));
        let place = if folder.is_empty() { "it".to_owned() } else { format!("`{folder}`") };
        Error::Nothing {
            repository: self.name.to_owned(),
            reason: match other {
                Some((name, kind)) => format!("{place} has no .safetensors, and `{name}` is {kind}"),
                None => format!("{place} has no weights in .safetensors"),
            },
        }
    }

    fn has(&self, name: &str) -> bool {
        self.listing.file(name).is_some()
    }

    fn files(&self) -> impl Iterator<Item = &'a RemoteFile> {
        self.listing.files.iter()
    }

    /// The files right in a folder, each with its name there; the root is `""`.
    fn inside(&self, folder: &str) -> impl Iterator<Item = (&'a RemoteFile, &'a str)> {
        let start = if folder.is_empty() { String::new() } else { format!("{folder}/") };
        self.files().filter_map(move |file| {
            let name = file.name.strip_prefix(&start)?;
            (!name.contains('/')).then_some((file, name))
        })
    }
}

fn is_weights(name: &str) -> bool {
    name.ends_with(".safetensors")
}

/// What a file is, if it is of a kind that is not fetched.
fn refused(name: &str) -> Option<&'static str> {
    let (_, ending) = name.rsplit_once('.')?;
    REFUSED.iter().find(|(refused, _)| ending.eq_ignore_ascii_case(refused)).map(|(_, kind)| *kind)
}

/// The name that is most like `wanted`, if one is like it.
pub(crate) fn nearest<'a>(wanted: &str, known: impl Iterator<Item = &'a str>) -> Option<String> {
    let wanted = wanted.to_lowercase();
    known
        .map(|name| (strsim::damerau_levenshtein(&wanted, &name.to_lowercase()), name))
        .filter(|(distance, name)| *distance <= (name.chars().count() / 4).max(1))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, name)| name.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn listing(names: &[&str]) -> Listing {
        let mut files: Vec<_> =
            names.iter().map(|name| RemoteFile { name: (*name).to_owned(), size: Some(1), hash: None }).collect();
        files.sort_by(|one, other| one.name.cmp(&other.name));
        Listing { commit: "0".repeat(40), gated: false, files }
    }

    fn selected(names: &[&str], wanted: &Wanted) -> Result<Vec<String>> {
        let listing = listing(names);
        let files = select("a/b", &listing, wanted)?;
        Ok(files.into_iter().map(|file| file.name.clone()).collect())
    }

    fn needed(names: &[&str]) -> Vec<String> {
        selected(names, &Wanted::default()).unwrap()
    }

    const SD15: [&str; 27] = [
        ".gitattributes",
        "README.md",
        "feature_extractor/preprocessor_config.json",
        "model_index.json",
        "safety_checker/config.json",
        "safety_checker/model.safetensors",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.fp16.safetensors",
        "text_encoder/model.safetensors",
        "text_encoder/pytorch_model.bin",
        "tokenizer/merges.txt",
        "tokenizer/special_tokens_map.json",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.bin",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/diffusion_pytorch_model.non_ema.safetensors",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/model.onnx",
        "v1-5-pruned-emaonly.ckpt",
        "v1-5-pruned-emaonly.safetensors",
        "v1-5-pruned.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.fp16.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ];

    #[test]
    fn of_stable_diffusion_one_set_of_weights_is_taken_and_its_mark_comes_last() {
        let files = needed(&SD15);
        assert_eq!(files.iter().filter(|name| is_weights(name)).count(), 3);
        assert!(files.contains(&"unet/diffusion_pytorch_model.safetensors".to_owned()));
        assert!(files.contains(&"tokenizer/merges.txt".to_owned()));
        assert_eq!(files.last().map(String::as_str), Some("model_index.json"));
        let unwanted = |name: &String| name.contains("safety") || name.contains("v1-5") || refused(name).is_some();
        assert!(!files.iter().any(unwanted), "{files:?}");
        assert_eq!(files.len(), 12);
    }

    #[test]
    fn a_variant_is_taken_where_there_is_one() {
        let wanted = Wanted { variant: Some("fp16".to_owned()), ..Wanted::default() };
        let files = selected(&SD15, &wanted).unwrap();
        let weights: Vec<_> = files.iter().filter(|name| is_weights(name)).collect();
        assert!(weights.iter().all(|name| name.contains(".fp16.")) && weights.len() == 3, "{weights:?}");
        let only = needed(&["model_index.json", "unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors"]);
        assert!(only.iter().any(|name| name.contains(".fp16.")));
    }

    #[test]
    fn of_a_language_model_tokenizer_templates_and_shards_are_taken() {
        let files = needed(&[
            "LICENSE",
            "additional_chat_templates/tools.jinja",
            "chat_template.jinja",
            "config.json",
            "consolidated.safetensors",
            "generation_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "model.safetensors.index.json",
            "original/consolidated.00.pth",
            "pytorch_model.bin",
            "tokenizer.json",
            "tokenizer.model",
            "tokenizer_config.json",
        ]);
        let expected = [
            "additional_chat_templates/tools.jinja",
            "chat_template.jinja",
            "generation_config.json",
            "model.safetensors.index.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "model-00001-of-00002.safetensors",
            "model-00002-of-00002.safetensors",
            "config.json",
        ];
        assert_eq!(files, expected);
    }

    #[test]
    fn of_adapters_and_single_checkpoints_the_file_is_taken() {
        assert_eq!(
            needed(&["README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"]).len(),
            2
        );
        assert_eq!(needed(&["pytorch_lora_weights.safetensors", "a.png"]), ["pytorch_lora_weights.safetensors"]);
        assert_eq!(needed(&["neon.safetensors", "neon.png"]), ["neon.safetensors"]);
    }

    #[test]
    fn what_cannot_be_used_is_refused_with_what_is_there() {
        let refused = |names: &[&str]| selected(names, &Wanted::default()).unwrap_err().to_string();
        let pickled = refused(&["config.json", "pytorch_model.bin"]);
        assert!(pickled.contains("`pytorch_model.bin` is a pickle"), "{pickled}");
        assert!(refused(&["model-q4.gguf"]).contains("llama.cpp"));
        assert!(refused(&["model_index.json", "transformer/config.json"]).contains("without a UNet"));
        assert!(refused(&["README.md"]).contains("no weights"));
        assert!(matches!(
            selected(&["a.safetensors", "b.safetensors"], &Wanted::default()),
            Err(Error::Several { .. })
        ));
    }

    #[test]
    fn named_files_are_taken_as_named_and_a_slip_gets_the_nearest() {
        let named = |name: &str| selected(&SD15, &Wanted { files: vec![name.to_owned()], ..Wanted::default() });
        assert_eq!(named("v1-5-pruned.safetensors").unwrap(), ["v1-5-pruned.safetensors"]);
        match named("v1-5-prunned.safetensors") {
            Err(Error::NoFile { suggestion, .. }) => assert_eq!(suggestion.as_deref(), Some("v1-5-pruned.safetensors")),
            other => panic!("{other:?}"),
        }
        match named("something-else") {
            Err(Error::NoFile { suggestion: None, .. }) => {}
            other => panic!("{other:?}"),
        }
        assert!(matches!(named("v1-5-pruned-emaonly.ckpt"), Err(Error::Kind { .. })));
    }
}
