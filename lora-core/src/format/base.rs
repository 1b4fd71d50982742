//! A base model as its files describe it: every module with its shape, from headers alone.
//!
//! Opened from a diffusers folder, a transformers folder (single or sharded), or a single file; names are brought to one
//! spelling (diffusers and transformers, `text_model.` always there). Numbers are read only when asked for.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::{Path, PathBuf},
};

use serde_json::Value;

use super::{
    Component, Dtype, Family, Fault, TensorFile, bitsandbytes,
    checkpoint::{Checkpoint, Source},
    json,
    names::Place,
    recognise::{component_of, described, transformers_family},
};
use crate::{Array, Error, Result};

/// What a module is, as far as its tensors tell.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ModuleKind {
    /// `[out, in]`.
    Linear,
    /// `[out, in, kh, kw]`.
    Conv,
    /// A table of rows, `[rows, width]`.
    Embedding,
    /// `[channels]`.
    Norm,
    /// Anything else.
    Other,
}

/// A module that an adapter may name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Module {
    /// What it is.
    pub kind: ModuleKind,
    /// Shape of its weight.
    pub weight: Vec<usize>,
    /// Whether it has a bias.
    pub bias: bool,
}

/// A base model, known by its headers.
#[derive(Debug)]
pub struct BaseModel {
    family: Family,
    layout: Layout,
    files: Vec<TensorFile>,
    tensors: BTreeMap<Component, BTreeMap<String, Tensor>>,
    modules: BTreeMap<Component, BTreeMap<String, Module>>,
    unused: Vec<String>,
    /// The matrices that are stored in 4 bits; their shapes are those of their numbers.
    packed: BTreeSet<(Component, String)>,
    tied_head: bool,
    /// Names that stand for a module beside its own.
    spellings: BTreeMap<String, Place>,
}

/// How the files of a base lie.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// A folder with one folder a component.
    Diffusers,
    /// A single LDM file.
    SingleFile,
    /// A folder of one model of transformers, as a language model is.
    Transformers,
    /// Files that were named one by one, the folder of a single component, or shapes without files.
    Parts,
}

#[derive(Debug)]
struct Tensor {
    /// Index into the files; `None` for a shape without numbers.
    file: Option<usize>,
    source: Source,
    dtype: Dtype,
}

impl BaseModel {
    /// Opens a base model: a folder or a single file.
    ///
    /// # Errors
    /// If nothing there is a model in safetensors files, or a file is broken, or a shard is missing.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.is_dir() {
            return Self::open_file(path);
        }
        let components: Vec<(Component, Vec<PathBuf>)> =
            [Component::Unet, Component::TextEncoder, Component::TextEncoder2, Component::Vae]
                .into_iter()
                .filter(|component| path.join(component.name()).is_dir())
                .map(|component| Ok((component, weight_files(&path.join(component.name()))?)))
                .collect::<Result<_>>()?;
        if !components.is_empty() {
            return Ok(Self { layout: Layout::Diffusers, ..Self::from_parts(components)? });
        }
        if path.join("unet.safetensors").is_file() {
            let present = Component::ALL.into_iter().filter_map(|component| {
                let file = path.join(format!("{}.safetensors", component.name()));
                file.is_file().then(|| (component, vec![file]))
            });
            return Self::from_parts(present);
        }
        Self::open_flat(path)
    }

    /// A folder of weights without folders of components in it: a language model, or one component of a Stable Diffusion.
    fn open_flat(folder: &Path) -> Result<Self> {
        let files = weight_files(folder)?;
        let component = match described(&read_config(&folder.join("config.json"))?) {
            Some(component) => Some(component),
            None => {
                let opened = files.iter().map(|file| TensorFile::open(file)).collect::<Result<Vec<_>>>()?;
                let names: Vec<&str> = opened.iter().flat_map(TensorFile::names).collect();
                component_of(&names)
            }
        };
        let Some(component) = component else { return Err(not_a_base(&files)) };
        let base = Self::from_parts([(component, files)])?;
        Ok(match component {
            Component::LanguageModel => Self { layout: Layout::Transformers, ..base },
            _ => base,
        })
    }

    /// Opens the files of each component.
    ///
    /// # Errors
    /// If a file is broken, or two hold one tensor.
    pub fn from_parts(components: impl IntoIterator<Item = (Component, Vec<PathBuf>)>) -> Result<Self> {
        let mut base = Self::empty(Layout::Parts);
        let mut config = Value::Null;
        for (component, paths) in components {
            if component == Component::LanguageModel {
                let path = paths.first().and_then(|path| path.parent()).map(|folder| folder.join("config.json"));
                config = path.map(|path| read_config(&path)).transpose()?.unwrap_or_default();
                base.tied_head = config["tie_word_embeddings"].as_bool().unwrap_or(false);
            }
            for path in paths {
                let file = TensorFile::open(&path)?;
                for name in file.names() {
                    let Some(info) = file.info(name) else { continue };
                    let tensor = Tensor {
                        file: Some(base.files.len()),
                        source: Source::plain(name, &info.shape),
                        dtype: info.dtype,
                    };
                    let named = base.tensors.entry(component).or_default();
                    if name.ends_with("position_ids") {
                        base.unused.push(name.to_owned());
                    } else if named.insert(canonical(component, name), tensor).is_some() {
                        return Err(Error::file(&path, Fault::Duplicate { name: name.to_owned() }));
                    }
                }
                base.files.push(file);
            }
        }
        base.unpack()?;
        base.finish(&config);
        Ok(base)
    }

    /// Gives matrices that are stored in 4 bits the shapes of their numbers, and takes what describes them for no tensors.
    fn unpack(&mut self) -> Result<()> {
        for (component, tensors) in &mut self.tensors {
            let mut shapes = Vec::new();
            for (name, tensor) in tensors.iter() {
                let (Some(weight), Some(file)) = (bitsandbytes::described(name), tensor.file) else { continue };
                let file = &self.files[file];
                let bytes = tensor.source.bytes(file).unwrap_or_default();
                shapes.push((weight.to_owned(), bitsandbytes::QuantState::parse(file.path(), name, bytes)?.shape));
            }
            for (weight, shape) in shapes {
                let Some(tensor) = tensors.get_mut(&weight) else { continue };
                tensor.source.shape = shape;
                self.packed.insert((*component, weight));
            }
            let packed = &self.packed;
            tensors.retain(|name, _| {
                bitsandbytes::owner(name).is_none_or(|weight| !packed.contains(&(*component, weight.to_owned())))
            });
        }
        Ok(())
    }

    /// A base without numbers, from names and shapes alone (`conv_in.weight`, `[320, 4, 3, 3]`).
    pub fn from_shapes(tensors: impl IntoIterator<Item = (Component, String, Vec<usize>)>) -> Self {
        let named =
            |(component, name, shape): (Component, String, Vec<usize>)| (component, canonical(component, &name), shape);
        Self::from_canonical(tensors.into_iter().map(named))
    }

    fn from_canonical(tensors: impl Iterator<Item = (Component, String, Vec<usize>)>) -> Self {
        let mut base = Self::empty(Layout::Parts);
        for (component, name, shape) in tensors {
            let tensor = Tensor { file: None, source: Source::plain(&name, &shape), dtype: Dtype::F32 };
            base.tensors.entry(component).or_default().insert(name, tensor);
        }
        base.finish(&Value::Null);
        base
    }

    /// A base without numbers whose modules a file may also call by other names.
    pub(super) fn from_spellings(
        tensors: impl IntoIterator<Item = (Component, String, Vec<usize>)>,
        spellings: BTreeMap<String, Place>,
        family: Family,
    ) -> Self {
        Self { spellings, family, ..Self::from_canonical(tensors.into_iter()) }
    }

    fn open_file(path: &Path) -> Result<Self> {
        let file = TensorFile::open(path)?;
        if let Some(checkpoint) = Checkpoint::of(&file)? {
            let mut base = Self::empty(Layout::SingleFile);
            for component in checkpoint.components() {
                let tensors = checkpoint.tensors(component).map(|(name, source)| {
                    let dtype = file.info(&source.key).map_or(Dtype::F32, |info| info.dtype);
                    (name.to_owned(), Tensor { file: Some(0), source: source.clone(), dtype })
                });
                base.tensors.insert(component, tensors.collect());
            }
            base.unused = checkpoint.unused().to_vec();
            base.files.push(file);
            base.finish(&Value::Null);
            base.family = checkpoint.family().clone();
            return Ok(base);
        }
        let names: Vec<&str> = file.names().collect();
        match component_of(&names) {
            Some(component) => Self::from_parts([(component, vec![path.to_owned()])]),
            None => {
                let first = names.first().copied().unwrap_or_default().to_owned();
                Err(Error::file(path, Fault::NotABase { first }))
            }
        }
    }

    fn empty(layout: Layout) -> Self {
        Self {
            family: Family::Sd1,
            layout,
            files: Vec::new(),
            tensors: BTreeMap::new(),
            modules: BTreeMap::new(),
            unused: Vec::new(),
            packed: BTreeSet::new(),
            tied_head: false,
            spellings: BTreeMap::new(),
        }
    }

    /// Gathers tensors into modules and tells the family; `config` is that of a language model.
    fn finish(&mut self, config: &Value) {
        for (component, tensors) in &self.tensors {
            let modules = self.modules.entry(*component).or_default();
            for (name, tensor) in tensors {
                let Some((path, kind)) = name.rsplit_once('.') else { continue };
                let module = modules.entry(path.to_owned()).or_insert(Module {
                    kind: ModuleKind::Other,
                    weight: Vec::new(),
                    bias: false,
                });
                match kind {
                    "weight" => {
                        module.weight = tensor.source.shape.clone();
                        module.kind = kind_of(path, &module.weight);
                    }
                    "bias" => module.bias = true,
                    _ => {}
                }
            }
        }
        // An adapter beside the head is one thing, and one of the table another, though they share the weight.
        if self.has_tied_head()
            && let Some(modules) = self.modules.get_mut(&Component::LanguageModel)
            && let Some(table) = modules.values().find(|module| module.kind == ModuleKind::Embedding)
        {
            let head = Module { kind: ModuleKind::Linear, weight: table.weight.clone(), bias: false };
            modules.insert("lm_head".to_owned(), head);
        }
        let holds = |component, path: &str| self.module(component, path).is_some();
        let linear_projections = self
            .modules(Component::Unet)
            .find(|(path, _)| path.ends_with(".proj_in"))
            .is_some_and(|(_, module)| module.weight.len() == 2);
        self.family = if self.modules.contains_key(&Component::LanguageModel) {
            let names: Vec<&str> = self.tensors(Component::LanguageModel).map(|(name, _, _)| name).collect();
            transformers_family(config, &names)
        } else if self.modules.contains_key(&Component::TextEncoder2)
            || holds(Component::Unet, "add_embedding.linear_1")
        {
            Family::Sdxl
        } else if linear_projections || self.is_open_clip_alone() {
            Family::Sd2
        } else {
            Family::Sd1
        };
    }

    /// Whether it is nothing but a text encoder as wide as that of Stable Diffusion 2.x.
    fn is_open_clip_alone(&self) -> bool {
        const WIDTH: usize = 1024;
        let table = self.module(Component::TextEncoder, "text_model.embeddings.token_embedding");
        self.modules.len() == 1 && table.is_some_and(|table| table.weight.get(1) == Some(&WIDTH))
    }

    /// Which model it is.
    pub fn family(&self) -> &Family {
        &self.family
    }

    /// How its files lie.
    pub fn layout(&self) -> Layout {
        self.layout
    }

    /// The files, in the order they were opened.
    pub fn files(&self) -> &[TensorFile] {
        &self.files
    }

    /// The components that are there.
    pub fn components(&self) -> impl Iterator<Item = Component> {
        self.modules.keys().copied()
    }

    /// Whether it has that component.
    pub fn has(&self, component: Component) -> bool {
        self.modules.contains_key(&component)
    }

    /// The modules of a component, by path.
    pub fn modules(&self, component: Component) -> impl Iterator<Item = (&str, &Module)> {
        self.modules.get(&component).into_iter().flatten().map(|(path, module)| (&**path, module))
    }

    /// A module.
    pub fn module(&self, component: Component, path: &str) -> Option<&Module> {
        self.modules.get(&component)?.get(path)
    }

    /// The tensors of a component, by name, with type and where they lie.
    pub fn tensors(&self, component: Component) -> impl Iterator<Item = (&str, Dtype, &Source)> {
        let tensors = self.tensors.get(&component).into_iter().flatten();
        tensors.map(|(name, tensor)| (&**name, tensor.dtype, &tensor.source))
    }

    /// The type in which a tensor is stored.
    pub fn dtype(&self, component: Component, name: &str) -> Option<Dtype> {
        Some(self.tensors.get(&component)?.get(name)?.dtype)
    }

    /// The shape of a tensor.
    pub fn shape(&self, component: Component, name: &str) -> Option<&[usize]> {
        Some(&self.tensors.get(&component)?.get(name)?.source.shape)
    }

    /// Where a tensor lies: its file and its place in there; `None` if there is no such tensor or no file behind it.
    pub fn locate(&self, component: Component, name: &str) -> Option<(&TensorFile, &Source)> {
        let tensor = self.tensors.get(&component)?.get(name)?;
        Some((self.files.get(tensor.file?)?, &tensor.source))
    }

    /// Whether a tensor is a matrix that is stored in 4 bits.
    pub fn is_packed(&self, component: Component, name: &str) -> bool {
        self.packed.contains(&(component, name.to_owned()))
    }

    /// Checks that the numbers of a tensor are there as they are meant.
    ///
    /// # Errors
    /// If it is stored in 4 bits.
    pub(crate) fn check_whole(&self, component: Component, name: &str) -> Result<()> {
        match self.locate(component, name) {
            Some((file, _)) if self.is_packed(component, name) => {
                Err(Error::file(file.path(), Fault::Packed { tensor: name.to_owned() }))
            }
            _ => Ok(()),
        }
    }

    /// A tensor, widened to `f32`; `None` if there is none of that name.
    ///
    /// # Errors
    /// If it holds no plain numbers.
    pub fn read(&self, component: Component, name: &str) -> Result<Option<Array>> {
        self.check_whole(component, name)?;
        self.locate(component, name).map(|(file, source)| source.read(file)).transpose()
    }

    /// Names that stand for modules, beside what their own paths say.
    pub(super) fn spellings(&self) -> &BTreeMap<String, Place> {
        &self.spellings
    }

    /// Keys that belong to no component.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }

    /// Whether the head of a language model is its embedding table, so that changing one weight changes the other. The head
    /// is a module all the same, without a tensor of its own.
    pub fn has_tied_head(&self) -> bool {
        self.tied_head && self.shape(Component::LanguageModel, "lm_head.weight").is_none()
    }
}

/// The fault of files that are no model, by the first of them.
fn not_a_base(files: &[PathBuf]) -> Error {
    let path = files.first().map(PathBuf::as_path).unwrap_or(Path::new(""));
    let first = TensorFile::open(path).ok().and_then(|file| file.names().next().map(str::to_owned));
    Error::file(path, Fault::NotABase { first: first.unwrap_or_default() })
}

/// The one spelling of a tensor's name.
fn canonical(component: Component, name: &str) -> String {
    let bare = ["encoder.layers.", "embeddings.", "final_layer_norm."].iter().any(|start| name.starts_with(start));
    if component.is_text_encoder() && bare { format!("text_model.{name}") } else { name.to_owned() }
}

fn kind_of(path: &str, weight: &[usize]) -> ModuleKind {
    let last = path.rsplit('.').next().unwrap_or(path);
    let table = ["token_embedding", "position_embedding", "embed_tokens", "wte", "wpe", "embed_in"].contains(&last);
    match weight.len() {
        1 => ModuleKind::Norm,
        2 if table => ModuleKind::Embedding,
        2 => ModuleKind::Linear,
        4 => ModuleKind::Conv,
        _ => ModuleKind::Other,
    }
}

/// The weight files of one folder: by index if it is sharded, else the usual names, else the only one there is.
pub fn weight_files(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = |source| Error::Read { path: folder.to_owned(), source };
    for stem in ["diffusion_pytorch_model", "model"] {
        let single = folder.join(format!("{stem}.safetensors"));
        if single.is_file() {
            return Ok(vec![single]);
        }
        let index = folder.join(format!("{stem}.safetensors.index.json"));
        if index.is_file() {
            return shards(folder, &index);
        }
        for variant in ["fp16", "bf16", "fp32"] {
            let single = folder.join(format!("{stem}.{variant}.safetensors"));
            if single.is_file() {
                return Ok(vec![single]);
            }
        }
    }
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(read)? {
        let path = entry.map_err(read)?.path();
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            found.push(path);
        }
    }
    match found.len() {
        1 => Ok(found),
        found => Err(Error::file(folder, Fault::NoWeights { found })),
    }
}

fn shards(folder: &Path, index: &Path) -> Result<Vec<PathBuf>> {
    let config = read_config(index)?;
    let malformed = || {
        Error::file(
            index,
            Fault::Text { what: "the index of shards", message: "no `weight_map` of file names".to_owned() },
        )
    };
    let map = config["weight_map"].as_object().ok_or_else(malformed)?;
    let mut files = BTreeSet::new();
    for (tensor, name) in map {
        // A name from a file is only ever a name inside the same folder.
        let inside = |name: &&str| {
            Path::new(name).components().count() == 1 && !name.contains(['/', '\\']) && !name.starts_with("..")
        };
        let Some(inside) = name.as_str().filter(inside) else {
            let name = name.as_str().map_or_else(|| name.to_string(), str::to_owned);
            return Err(Error::file(index, Fault::ShardName { tensor: tensor.clone(), name }));
        };
        files.insert(folder.join(inside));
    }
    // What shards hold beyond their index counts, as it does for transformers, which reads them whole; what the index promises
    // must be there.
    let mut held = BTreeSet::new();
    for file in &files {
        held.extend(TensorFile::open(file)?.names().map(str::to_owned));
    }
    match map.iter().find(|(tensor, _)| !held.contains(*tensor)) {
        Some((tensor, shard)) => {
            let shard = shard.as_str().unwrap_or_default().to_owned();
            Err(Error::file(index, Fault::NotInShards { tensor: tensor.clone(), shard }))
        }
        None => Ok(files.into_iter().collect()),
    }
}

/// A JSON file; null if it does not exist.
pub(super) fn read_config(path: &Path) -> Result<Value> {
    if !path.is_file() {
        return Ok(Value::Null);
    }
    let text = std::fs::read(path).map_err(|source| Error::Read { path: path.to_owned(), source })?;
    json::parse(&text)
        .map_err(|error| Error::file(path, Fault::Text { what: "the JSON text", message: error.to_string() }))
}
