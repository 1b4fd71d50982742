//! Arguments of `lora pull`.

use std::str::FromStr;

use clap::Args;
use lora_core::hub::ModelName;

/// Arguments of `lora pull`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples: lora pull Qwen/Qwen3-0.6B
          lora train chats.jsonl --base Qwen/Qwen3-0.6B
Nothing else fetches models. The cache is the one of Hugging Face's own tools
(HF_HOME, HF_HUB_CACHE); a login is taken from HF_TOKEN or `hf auth login`.")]
pub struct PullArgs {
    /// The model, as on its page: ORG/NAME, with @REVISION for another than main
    #[arg(value_name = "ORG/NAME")]
    pub name: RemoteName,
    /// These files of it and no others [default: what training and drawing need]
    #[arg(value_name = "FILE")]
    pub files: Vec<String>,
    /// The variant of the weights, where there are several: fp16 halves SDXL
    #[arg(long, value_name = "VARIANT")]
    pub variant: Option<String>,
    /// Say what would be fetched, and stop
    #[arg(long)]
    pub dry_run: bool,
    /// Tries after the first, if a connection breaks
    #[arg(long, value_name = "N", default_value = "5", hide_short_help = true)]
    pub retries: u32,
}

/// A model by name, or by the address of its page.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RemoteName(pub ModelName);

impl FromStr for RemoteName {
    type Err = String;

    fn from_str(word: &str) -> Result<Self, String> {
        let page = ["https://huggingface.co/", "http://huggingface.co/", "huggingface.co/", "https://hf.co/"]
            .iter()
            .find_map(|start| word.strip_prefix(start));
        let name = match page {
            None => ModelName::parse(word),
            Some(path) => match path.trim_end_matches('/').split_once("/tree/") {
                Some((name, revision)) => ModelName::parse(&format!("{name}@{revision}")),
                None => ModelName::parse(path.trim_end_matches('/')),
            },
        };
        name.map(Self).ok_or_else(|| "write ORG/NAME or ORG/NAME@REVISION, as `Qwen/Qwen3-0.6B`".to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_page_is_as_good_as_a_name() {
        for (word, name) in [
            ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
            ("a/b@v1", "a/b@v1"),
            ("https://huggingface.co/a/b", "a/b"),
            ("https://huggingface.co/a/b/", "a/b"),
            ("https://huggingface.co/a/b/tree/refs/pr/1", "a/b@refs/pr/1"),
        ] {
            assert_eq!(word.parse::<RemoteName>().unwrap().0.to_string(), name, "{word}");
        }
        for word in ["gpt2", "./a/b", "a/b/c", "https://huggingface.co/a", "https://example.org/a/b", ""] {
            word.parse::<RemoteName>().unwrap_err();
        }
    }
}
