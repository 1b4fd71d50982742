//! `lora metadata`: what a file says about itself, shown or changed; the numbers stay byte for byte.

use lora_core::format::{TensorFile, rewrite};
use serde_json::json;

use crate::{
    Failure,
    args::{Entry, MetadataArgs},
    commands::output,
    failure::{printable, shell_word},
    text,
    ui::Ui,
};

pub(crate) fn run(args: &MetadataArgs, ui: &Ui) -> Result<(), Failure> {
    let again = |(at, entry): &(usize, &Entry)| args.set[..*at].iter().any(|other| other.key == entry.key);
    if let Some((_, twice)) = args.set.iter().enumerate().find(again) {
        return Err(Failure::usage("usage", format!("--set gives `{}` twice", twice.key))
            .hint("an entry has one value: say `--set` once for each")
            .with("key", &*twice.key));
    }
    let file = TensorFile::open(&args.file)?;
    let edits = args.strip || !args.set.is_empty() || !args.remove.is_empty();
    if !edits && args.out.is_some() {
        let name = shell_word(&args.file.display().to_string());
        return Err(Failure::usage("usage", "--out is given, but nothing changes")
            .hint(format!("for example `lora metadata {name} --strip --out bare.safetensors`")));
    }
    let mut metadata = file.metadata().clone();
    if args.strip {
        metadata.clear();
    }
    for key in &args.remove {
        if metadata.remove(key).is_none() && !args.strip {
            let name = args.file.display().to_string();
            return Err(Failure::new("no_such_entry", format!("{name} has no metadata entry `{key}`"))
                .hint(format!("`lora metadata {}` shows what it has", shell_word(&name)))
                .with("key", key.as_str()));
        }
    }
    metadata.extend(args.set.iter().map(|entry| (entry.key.clone(), entry.value.clone())));
    let out = args.out.as_ref().unwrap_or(&args.file);
    if edits {
        rewrite(&file, out, &metadata, None)?;
    }
    if ui.json {
        return ui.json_data(&json!({"path": out.to_string_lossy(), "metadata": metadata})).map_err(output);
    }
    if edits {
        let name = printable(&out.display().to_string());
        return ui.data(&format!("{name}: {}", entries(metadata.len()))).map_err(output);
    }
    if metadata.is_empty() {
        ui.say(&format!("{} has no metadata", printable(&args.file.display().to_string())));
        return Ok(());
    }
    let lines: Vec<String> =
        metadata.iter().map(|(key, value)| format!("{} = {}", printable(key), printable(value))).collect();
    ui.data(&lines.join("\n")).map_err(output)
}

fn entries(count: usize) -> String {
    match count {
        1 => "1 entry".to_owned(),
        count => format!("{} entries", text::thousands(count as u64)),
    }
}
