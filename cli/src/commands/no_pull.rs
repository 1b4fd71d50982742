//! `lora pull` of a program that was built without it.

use crate::{
    Failure,
    args::{Global, PullArgs},
    ui::Ui,
};

pub(crate) fn run(args: &PullArgs, _global: &Global, _ui: &Ui) -> Result<(), Failure> {
    Err(Failure::new("no_hub", "this program was built without the feature `hub`, and opens no network connection")
        .detail(format!("{} can be put into the cache by `hf download {}`", args.name.0, args.name.0.repository))
        .hint("in a working copy: `cargo build --release -p lora-cli --features hub`"))
}
