//! `lora convert`: an adapter in another spelling, and the only door for pickles, of which nothing is run.

use std::collections::BTreeMap;

use lora_core::format::{
    AdapterFile, BaseModel, Dialect, Dtype, Family, PickleFile, TensorFile, adapter_path, guess_family, rewrite,
    write_adapter_file, write_tensors,
};
use serde_json::json;

use crate::{
    Failure,
    args::ConvertArgs,
    commands::{
        adapters::{account, leave_embeddings},
        locate, output, spare,
    },
    failure::{as_argument, beside, printable, shell_word},
    text,
    ui::Ui,
};

/// Names that are shown; the rest is counted.
const NAMED: usize = 8;

pub(crate) fn run(args: &ConvertArgs, ui: &Ui) -> Result<(), Failure> {
    refuse_pickle_name(args)?;
    spare(&args.out, args.base.as_deref())?;
    let dtype = args.dtype.map(Dtype::from);
    let input = adapter_path(&args.input)?;
    let pickle = match PickleFile::is_one(&input) {
        true => Some(PickleFile::open(&input)?),
        false => None,
    };
    if let Some(pickle) = &pickle {
        report_unread(args, pickle, ui);
    }
    let Some(to) = args.to.map(Dialect::from) else {
        let tensors = container(args, pickle.as_ref(), dtype)?;
        let what = format!("{}, keys as they are", text::plural(tensors as u64, "tensor"));
        return said(args, &what, json!({"tensors": tensors}), ui);
    };
    let file = match &pickle {
        Some(pickle) => pickle.to_tensor_file()?,
        None => TensorFile::read_adapter(&args.input)?,
    };
    let (read, family) = read(args, &file, ui)?;
    if read.modules.is_empty() && read.replacements.is_empty() {
        let name = args.input.display().to_string();
        return Err(Failure::new("no_adapter", format!("{name} holds no adapter"))
            .hint(format!("what it is: `lora inspect {}`", shell_word(&name))));
    }
    write_adapter_file(&args.out, to, &family, &read, dtype)?;
    let what =
        format!("{} of {family}, {} spelling to {to}", text::plural(read.modules.len() as u64, "module"), read.dialect);
    let facts = json!({
        "from": read.dialect.to_string(),
        "to": to.to_string(),
        "base": family.to_string(),
        "modules": read.modules.len(),
        "keys": read.keys,
    });
    said(args, &what, facts, ui)
}

/// What is written is no pickle: called one, programs would open it as such, or refuse it.
fn refuse_pickle_name(args: &ConvertArgs) -> Result<(), Failure> {
    let end = args.out.extension().and_then(|end| end.to_str()).unwrap_or_default();
    if !["pt", "pth", "ckpt", "bin", "pkl"].contains(&end) {
        return Ok(());
    }
    let [input, out] = [&args.input, &args.out.with_extension("safetensors")].map(|path| path.display().to_string());
    let message = format!("{} would be a safetensors file under the name of a pickle", args.out.display());
    let to = args.to.map_or_else(String::new, |to| format!(" --to {}", Dialect::from(to)));
    Err(Failure::usage("usage", message).hint(format!(
        "`lora convert {} {}{to}`",
        shell_word(&input),
        shell_word(&out)
    )))
}

/// The adapter, against the base that was named or by its names alone; every key must have its place, or be left behind on
/// purpose.
fn read(args: &ConvertArgs, file: &TensorFile, ui: &Ui) -> Result<(AdapterFile, Family), Failure> {
    let (mut read, family) = match &args.base {
        None => AdapterFile::of_published(file)?,
        Some(path) => {
            let base = BaseModel::open(&locate(path)?)?;
            (AdapterFile::of(file, &base)?, base.family().clone())
        }
    };
    account(&read, args.allow_unmatched, ui)?;
    if args.allow_unmatched {
        leave_embeddings(&args.input.display().to_string(), &read.embeddings, ui);
        read.embeddings.clear();
    }
    Ok((read, family))
}

/// Writes the tensors as they are called, and says how many they are.
fn container(args: &ConvertArgs, pickle: Option<&PickleFile>, dtype: Option<Dtype>) -> Result<usize, Failure> {
    Ok(match pickle {
        None if dtype.is_none() => {
            // A file that is not there, or broken, is the first thing to say.
            let file = TensorFile::read_adapter(&args.input)?;
            let to = match guess_family(&file) {
                Some("a language model") => Dialect::Peft,
                _ => Dialect::Kohya,
            };
            let out = if args.out == args.input { beside(&args.input, "safetensors") } else { as_argument(&args.out) };
            let example =
                format!("lora convert {} {} --to {to}", shell_word(&as_argument(&args.input)), shell_word(&out));
            return Err(Failure::usage("usage", "nothing to do: neither --to nor --dtype is given")
                .hint(format!("for example `{example}`")));
        }
        None => {
            let file = TensorFile::open(&args.input)?;
            rewrite(&file, &args.out, file.metadata(), dtype)?;
            file.names().len()
        }
        Some(pickle) => {
            let tensors = pickle.tensors()?;
            match dtype {
                // Written once as it is, then again in the other type, a tile at a time.
                Some(dtype) => {
                    write_tensors(&args.out, &tensors, &BTreeMap::new())?;
                    rewrite(&TensorFile::open(&args.out)?, &args.out, &BTreeMap::new(), Some(dtype))?;
                }
                None => write_tensors(&args.out, &tensors, &BTreeMap::new())?,
            }
            tensors.len()
        }
    })
}

/// What of a pickle is left behind: tensors beside the weights, and names of what it would have called.
fn report_unread(args: &ConvertArgs, pickle: &PickleFile, ui: &Ui) {
    let beside = pickle.beside().iter();
    let beside: Vec<String> = beside
        .map(|(name, count)| format!("{} ({})", printable(name), text::plural(*count as u64, "tensor")))
        .collect();
    if !beside.is_empty() {
        let shown = beside.iter().take(NAMED).cloned().collect::<Vec<_>>().join(", ");
        let more = if beside.len() > NAMED { format!(" and {} more", beside.len() - NAMED) } else { String::new() };
        let name = printable(&args.input.display().to_string());
        ui.warn(&format!("{name}: left behind, beside the weights: {shown}{more}"));
    }
    let names: Vec<&str> = pickle.unread().collect();
    if !names.is_empty() {
        let shown = names.iter().take(NAMED).map(|name| printable(name)).collect::<Vec<_>>().join(", ");
        let more = if names.len() > NAMED { format!(" and {} more", names.len() - NAMED) } else { String::new() };
        ui.warn(&format!("{}: left alone, not called: {shown}{more}", printable(&args.input.display().to_string())));
    }
}

fn said(args: &ConvertArgs, what: &str, mut facts: serde_json::Value, ui: &Ui) -> Result<(), Failure> {
    if ui.json {
        facts["out"] = json!(args.out.to_string_lossy());
        return ui.json_data(&facts).map_err(output);
    }
    ui.data(&format!("Converted  {what}\nOutput     {}", printable(&args.out.display().to_string()))).map_err(output)
}
