//! How a finished adapter is used, here and in other programs: said at the end of a run and in its report.

use std::path::Path;

use crate::{
    failure::shell_word,
    options::{is_language_model, values::Format},
};

/// How one program takes the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Use {
    /// The program.
    pub program: &'static str,
    /// One line on what to do.
    pub how: String,
    /// What to type, if anything.
    pub code: Option<String>,
}

/// How an adapter is used.
///
/// `adapter` is its file, `base` the base as it was named, `prompt` something that shows what was learnt.
pub fn uses(adapter: &Path, base: &str, prompt: &str, format: Format) -> Vec<Use> {
    if is_language_model(base) {
        return text_uses(&folder(adapter), base, prompt);
    }
    let path = adapter.display().to_string();
    let stem = adapter.file_stem().unwrap_or_default().to_string_lossy().into_owned();
    let prompt = prompt.replace(['\n', '\r'], " ");
    let here = Use {
        program: "here",
        how: "draw a picture; the number is the strength".into(),
        code: Some(format!(
            "lora generate {} --base {} --lora {}",
            quoted(&prompt),
            shell_word(base),
            shell_word(&format!("{path}:0.8"))
        )),
    };
    let python = |text: &str| serde_json::Value::from(text).to_string();
    let diffusers = Use {
        program: "diffusers",
        how: "load it into the pipeline of the base".into(),
        code: Some(format!("pipe.load_lora_weights({})\npipe({}).images[0]", python(&path), python(&prompt))),
    };
    let comfy = Use {
        program: "ComfyUI",
        how: "copy the file to ComfyUI/models/loras and add the node “Load LoRA”".into(),
        code: None,
    };
    let a1111 = Use {
        program: "A1111",
        how: "copy the file to models/Lora and write into the prompt".into(),
        code: Some(format!("{prompt} <lora:{stem}:0.8>")),
    };
    match format {
        Format::Kohya => vec![here, comfy, a1111, diffusers],
        Format::Diffusers => vec![here, comfy, diffusers],
        Format::Peft => vec![
            here,
            Use {
                program: "peft",
                how: "load the folder onto the base's network".into(),
                code: Some(format!("PeftModel.from_pretrained(unet, {})", python(&folder(adapter)))),
            },
        ],
    }
}

/// How a language model's adapter is used; `path` is peft's folder.
fn text_uses(path: &str, base: &str, prompt: &str) -> Vec<Use> {
    let prompt = prompt.replace(['\n', '\r'], " ");
    let [base_word, path_word] = [shell_word(base), shell_word(path)];
    let python = |text: &str| serde_json::Value::from(text).to_string();
    vec![
        Use {
            program: "here",
            how: "ask it, or talk with it".into(),
            code: Some(format!(
                "lora generate {} --base {base_word} --lora {path_word}\nlora chat --base {base_word} --lora {path_word}",
                quoted(&prompt)
            )),
        },
        Use {
            program: "peft",
            how: "load the folder onto the model".into(),
            code: Some(format!("PeftModel.from_pretrained(model, {})", python(path))),
        },
        Use {
            program: "vLLM",
            how: "serve it beside the base".into(),
            code: Some(format!(
                "vllm serve {base_word} --enable-lora --lora-modules {}",
                shell_word(&format!("adapter={path}"))
            )),
        },
    ]
}

fn folder(adapter: &Path) -> String {
    adapter.parent().unwrap_or(Path::new(".")).display().to_string()
}

/// A prompt as one word for the shell, in double quotes where that is enough.
fn quoted(prompt: &str) -> String {
    match prompt.contains(['"', '$', '`', '\\', '!']) {
        true => shell_word(prompt),
        false => format!("\"{prompt}\""),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn commands_survive_names_with_quotes_and_blanks() {
        let uses = uses(Path::new("my runs/a.safetensors"), "sd15", "a \"red\" house", Format::Kohya);
        assert_eq!(
            uses[0].code.as_deref(),
            Some(r#"lora generate 'a "red" house' --base sd15 --lora 'my runs/a.safetensors:0.8'"#)
        );
        assert_eq!(uses[2].code.as_deref(), Some("a \"red\" house <lora:a:0.8>"));
        assert_eq!(
            uses[3].code.as_deref(),
            Some("pipe.load_lora_weights(\"my runs/a.safetensors\")\npipe(\"a \\\"red\\\" house\").images[0]")
        );
    }
}
