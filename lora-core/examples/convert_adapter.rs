//! Rewrites an adapter in another dialect and says what was not applied.
//!
//! `cargo run -p lora-core --example convert_adapter -- BASE IN OUT kohya|diffusers|peft|comfy`

use std::{error::Error, path::Path};

use lora_core::format::{AdapterFile, BaseModel, Dialect, write_adapter_file};

#[expect(clippy::print_stdout, reason = "the lines are what it is for")]
fn main() -> Result<(), Box<dyn Error>> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let [base, input, output, dialect] = &arguments[..] else {
        return Err("usage: convert_adapter BASE IN OUT kohya|diffusers|peft|comfy".into());
    };
    let dialects = [Dialect::Kohya, Dialect::Diffusers, Dialect::Peft, Dialect::Comfy];
    let dialect = dialects.into_iter().find(|known| known.to_string() == **dialect).ok_or("no such dialect")?;
    let base = BaseModel::open(Path::new(base))?;
    let adapter = AdapterFile::read(Path::new(input), &base)?;
    println!("{} of {} keys of a {} file applied", adapter.applied(), adapter.keys, adapter.dialect);
    for (key, reason) in &adapter.unapplied {
        println!("not applied: {} ({reason})", key.escape_debug());
    }
    write_adapter_file(Path::new(output), dialect, base.family(), &adapter, None)?;
    Ok(())
}
