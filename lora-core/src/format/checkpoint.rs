//! Single-file Stable Diffusion checkpoints: where each tensor of the diffusers layout lies in them.
//!
//! Only headers are looked at. The result says, per component and diffusers name, which key to read, which rows of it
//! and how to turn it; whoever loads (arrays here, libtorch elsewhere) follows that. Keys that no component takes are
//! listed. Layout: `docs/formats.md` §3.

use std::{collections::BTreeMap, ops::Range};

use super::{
    Component, Family, Fault, TensorFile, TensorInfo,
    ldm::{self, OpenClip, UnetNames, VaeNames},
};
use crate::{Array, Error, Result};

/// How many layers diffusers keeps of SD 2's text encoder: the last one is never run.
const SD2_TEXT_LAYERS: usize = 23;

/// How a stored tensor becomes the diffusers one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Transform {
    /// As it is.
    Keep,
    /// A matrix turned over.
    Transpose,
    /// A 1×1 convolution without its two unit axes.
    Squeeze,
}

/// Where a tensor comes from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The key in the file.
    pub key: String,
    /// The rows of it; `None` for all.
    pub rows: Option<Range<usize>>,
    /// What to do with them.
    pub transform: Transform,
    /// The shape of the result.
    pub shape: Vec<usize>,
}

impl Source {
    /// A tensor that is stored under its own name.
    pub fn plain(key: &str, shape: &[usize]) -> Self {
        Self { key: key.to_owned(), rows: None, transform: Transform::Keep, shape: shape.to_vec() }
    }

    /// The bytes of the rows as they are stored, before the transform.
    pub fn bytes<'a>(&self, file: &'a TensorFile) -> Option<&'a [u8]> {
        let (info, bytes) = (file.info(&self.key)?, file.bytes(&self.key)?);
        match &self.rows {
            None => Some(bytes),
            Some(rows) => {
                let row = bytes.len() / info.shape.first().copied().filter(|rows| *rows > 0)?;
                bytes.get(rows.start * row..rows.end * row)
            }
        }
    }

    /// The tensor in the diffusers layout, widened to `f32`.
    ///
    /// # Errors
    /// If `file` is not the one that this was made for, or holds no plain numbers there.
    pub fn read(&self, file: &TensorFile) -> Result<Array> {
        let absent = || Error::file(file.path(), Fault::Absent { tensor: self.key.clone() });
        let (info, bytes) = file.info(&self.key).zip(self.bytes(file)).ok_or_else(absent)?;
        let values = info.dtype.widen(bytes).ok_or_else(|| {
            Error::file(file.path(), Fault::NotNumbers { tensor: self.key.clone(), dtype: info.dtype })
        })?;
        match (self.transform, &self.shape[..]) {
            (Transform::Transpose, &[out, inner]) => {
                Array::new([out, inner], transposed(&values, inner, out).ok_or_else(absent)?)
            }
            _ => Array::new(&*self.shape, values),
        }
    }

    /// Puts a tensor of the diffusers layout back into the numbers of the stored one: the inverse of [`read`](Self::read).
    ///
    /// `stored` holds the whole tensor under [`key`](Self::key); numbers outside the rows stay.
    pub fn put_back(&self, tensor: &Array, stored: &mut Array) -> Result<()> {
        let misfit = |stored: &Array| Error::Shapes {
            operation: "tensor of a checkpoint",
            shapes: vec![tensor.shape.clone(), stored.shape.clone()],
        };
        let row = stored.values.len() / stored.shape.first().copied().unwrap_or(1).max(1);
        let range = self.rows.as_ref().map_or(0..stored.values.len(), |rows| rows.start * row..rows.end * row);
        let turned;
        let values = match (self.transform, &self.shape[..]) {
            (Transform::Transpose, &[out, inner]) => {
                turned = transposed(&tensor.values, out, inner).ok_or_else(|| misfit(stored))?;
                &turned
            }
            _ => &tensor.values,
        };
        match stored.values.get_mut(range) {
            Some(place) if tensor.shape == self.shape && place.len() == values.len() => {
                place.copy_from_slice(values);
                Ok(())
            }
            _ => Err(misfit(stored)),
        }
    }
}

/// A row-major `[rows, columns]` matrix turned over.
fn transposed(values: &[f32], rows: usize, columns: usize) -> Option<Vec<f32>> {
    (values.len() == rows * columns)
        .then(|| (0..columns).flat_map(|column| (0..rows).map(move |row| values[row * columns + column])).collect())
}

/// The map of one single-file checkpoint.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    family: Family,
    components: BTreeMap<Component, BTreeMap<String, Source>>,
    unused: Vec<String>,
}

impl Checkpoint {
    /// The map of a file; `None` if it has no UNet under the checkpoint's prefix, so is no such checkpoint.
    ///
    /// # Errors
    /// If two keys lead to one tensor, or a fused or turned tensor has a shape that cannot be taken apart.
    pub fn of(file: &TensorFile) -> Result<Option<Self>> {
        let layout = Layout::of(file);
        if !layout.family_is_known {
            return Ok(None);
        }
        let mut checkpoint = Self { family: layout.family.clone(), components: BTreeMap::new(), unused: Vec::new() };
        for key in file.names() {
            let Some(info) = file.info(key) else { continue };
            match layout.sources(key, info).map_err(|fault| Error::file(file.path(), fault))? {
                Some((component, sources)) => {
                    let names = checkpoint.components.entry(component).or_default();
                    for (name, source) in sources {
                        if let Some(other) = names.insert(name.clone(), source) {
                            let problem = format!("it is another spelling of {}: {component}.{name}", other.key);
                            return Err(Error::file(file.path(), Fault::Field { tensor: key.to_owned(), problem }));
                        }
                    }
                }
                None => checkpoint.unused.push(key.to_owned()),
            }
        }
        Ok(Some(checkpoint))
    }

    /// Which model it is.
    pub fn family(&self) -> &Family {
        &self.family
    }

    /// The components that the file holds.
    pub fn components(&self) -> impl Iterator<Item = Component> {
        self.components.keys().copied()
    }

    /// The tensors of a component by their diffusers (transformers) names; empty if the file lacks it.
    pub fn tensors(&self, component: Component) -> impl Iterator<Item = (&str, &Source)> {
        self.components.get(&component).into_iter().flatten().map(|(name, source)| (&**name, source))
    }

    /// Where a tensor lies.
    pub fn source(&self, component: Component, name: &str) -> Option<&Source> {
        self.components.get(&component)?.get(name)
    }

    /// The keys that no component takes, sorted.
    pub fn unused(&self) -> &[String] {
        &self.unused
    }
}

/// A component and its tensors, by name, that one key holds.
type Placed = (Component, Vec<(String, Source)>);

/// Which prefix holds what.
const PREFIXES: [(&str, Component, Kind); 7] = [
    ("model.diffusion_model.", Component::Unet, Kind::Unet),
    ("first_stage_model.", Component::Vae, Kind::Vae),
    ("cond_stage_model.transformer.", Component::TextEncoder, Kind::Clip),
    ("cond_stage_model.model.", Component::TextEncoder, Kind::OpenClip { projects: false }),
    ("conditioner.embedders.0.transformer.", Component::TextEncoder, Kind::Clip),
    ("conditioner.embedders.1.model.", Component::TextEncoder2, Kind::OpenClip { projects: true }),
    // SDXL's refiner has the second encoder alone.
    ("conditioner.embedders.0.model.", Component::TextEncoder2, Kind::OpenClip { projects: true }),
];

#[derive(Clone, Copy)]
enum Kind {
    Unet,
    Vae,
    Clip,
    OpenClip { projects: bool },
}

struct Layout {
    family: Family,
    family_is_known: bool,
    unet: UnetNames,
    vae: VaeNames,
}

impl Layout {
    fn of(file: &TensorFile) -> Self {
        let under = |prefix: &'static str| file.names().filter_map(move |name| name.strip_prefix(prefix));
        let holds = |start: &str| file.names().any(|name| name.starts_with(start));
        let unet: Vec<&str> = under("model.diffusion_model.").collect();
        let family = if unet.iter().any(|path| path.starts_with("label_emb.")) || holds("conditioner.") {
            Family::Sdxl
        } else if holds("cond_stage_model.model.") || unet_is_linear(file) {
            Family::Sd2
        } else {
            Family::Sd1
        };
        Self {
            family,
            family_is_known: unet.iter().any(|path| path.starts_with("input_blocks.")),
            unet: UnetNames::of_ldm(unet.iter().copied()),
            vae: VaeNames::of_ldm(under("first_stage_model.")),
        }
    }

    /// Component and tensors that a key holds; `None` if nothing takes it.
    fn sources(&self, key: &str, info: &TensorInfo) -> Result<Option<Placed>, Fault> {
        let Some((prefix, component, kind)) = PREFIXES.into_iter().find(|(prefix, _, _)| key.starts_with(prefix))
        else {
            return Ok(None);
        };
        let path = &key[prefix.len()..];
        let problem = |problem: String| Fault::Field { tensor: key.to_owned(), problem };
        let plain = |name: String| (name, Source::plain(key, &info.shape));
        let sources = match kind {
            Kind::Unet => self.unet.diffusers_path(path).map(|name| vec![plain(name)]),
            Kind::Vae => self.vae.diffusers_path(path).map(|name| {
                let (name, mut source) = plain(name);
                if let ([out, inner, 1, 1], true) = (&info.shape[..], name.contains(".attentions.")) {
                    source.shape = vec![*out, *inner];
                    source.transform = Transform::Squeeze;
                }
                vec![(name, source)]
            }),
            Kind::Clip if path.ends_with("position_ids") => None,
            // Some early conversions lack the level.
            Kind::Clip if path.starts_with("text_model.") => Some(vec![plain(path.to_owned())]),
            Kind::Clip
                if path.starts_with("encoder.") || path.starts_with("embeddings.") || path.starts_with("final_") =>
            {
                Some(vec![plain(format!("text_model.{path}"))])
            }
            Kind::Clip => None,
            Kind::OpenClip { projects } => match ldm::from_open_clip(path) {
                None => None,
                Some(OpenClip::Turned(_)) if !projects => None,
                Some(OpenClip::Turned(name)) => match info.shape[..] {
                    [hidden, embed] => {
                        let shape = vec![embed, hidden];
                        Some(vec![(
                            name,
                            Source { key: key.to_owned(), rows: None, transform: Transform::Transpose, shape },
                        )])
                    }
                    _ => return Err(problem(format!("a projection is a matrix, this is {:?}", info.shape))),
                },
                Some(OpenClip::One(name)) => Some(vec![plain(name)]),
                Some(OpenClip::Fused(names)) => match info.shape.split_first() {
                    Some((rows, rest)) if rows % 3 == 0 => {
                        let third = rows / 3;
                        let shape: Vec<usize> = std::iter::once(third).chain(rest.iter().copied()).collect();
                        let source = |i: usize| Source {
                            key: key.to_owned(),
                            rows: Some(i * third..(i + 1) * third),
                            transform: Transform::Keep,
                            shape: shape.clone(),
                        };
                        Some(names.into_iter().enumerate().map(|(i, name)| (name, source(i))).collect())
                    }
                    _ => return Err(problem(format!("{:?} cannot be cut into three", info.shape))),
                },
            },
        };
        let past_the_end = |name: &str| {
            matches!(kind, Kind::OpenClip { projects: false })
                && ldm::clip_layer(name).is_some_and(|layer| layer >= SD2_TEXT_LAYERS)
        };
        let sources = sources.filter(|sources| sources.iter().all(|(name, _)| !past_the_end(name)));
        Ok(sources.map(|sources| (component, sources)))
    }
}

/// Whether the projections around the UNet's attention are matrices (SD 2) and no convolutions (SD 1).
fn unet_is_linear(file: &TensorFile) -> bool {
    let projection =
        file.names().find(|name| name.starts_with("model.diffusion_model.") && name.ends_with(".proj_in.weight"));
    projection.and_then(|name| file.info(name)).is_some_and(|info| info.shape.len() == 2)
}
