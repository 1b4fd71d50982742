//! Models from the Hugging Face hub, into the cache that its own tools use.
//!
//! | module | holds |
//! |---|---|
//! | `settings`, `token` | what the environment says: cache, endpoint, login, offline |
//! | `client` | one request: redirects, where a token may go, what a failure means |
//! | `listing` | what a repository holds at a revision, and how each file is checked |
//! | `select` | which of these files a model needs |
//! | `store` | the cache on the disk: blobs, snapshots, refs, locks |
//! | `transfer` | one file: a half that is kept and resumed, its hash, retries |
//! | `hub` | [`Hub`]: list, plan, fetch |
//!
//! Three steps, so that a caller can say what will happen, and check that it fits on the disk, before it happens:
//!
//! ```no_run
//! use lora_core::hub::ModelName;
//! use lora_hub::{Hub, Settings, Wanted};
//!
//! let hub = Hub::new(Settings::from_env()?)?;
//! let name = ModelName::parse("Qwen/Qwen3-0.6B").expect("org/name");
//! let plan = hub.plan(&name, &Wanted::default(), &mut |_| {})?;
//! println!("{} bytes to fetch", plan.missing());
//! let fetched = hub.fetch(&plan, &mut |_| {})?;
//! println!("{}", fetched.path.display()); // a folder that `--base` takes
//! # Ok::<(), lora_hub::Error>(())
//! ```
//!
//! Nothing here knows what is in the files or draws on a terminal, and nothing is fetched that nobody asked for: finding a
//! model in the cache is `lora_core::hub`, which has no network. The layout of the cache and the variables are those of
//! `huggingface_hub` 2; the protocol is plain HTTP with ranges, which the hub serves for every file, however it stores it.

mod client;
mod error;
mod hub;
mod listing;
mod select;
mod settings;
mod store;
mod token;
mod transfer;

pub use error::{Error, Result};
pub use hub::{Event, Fetched, Hub, Plan, Planned};
pub use listing::{Hash, Listing, RemoteFile};
pub use select::Wanted;
pub use settings::{Settings, offline_by};
pub use token::{Token, TokenSource};
