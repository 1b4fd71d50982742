//! How strongly a loaded adapter acts, per component and, for the UNet, per block.

use std::collections::BTreeMap;

use super::{BaseModel, Component, Fault, ldm::UnetNames};

/// What a person multiplies a loaded adapter by.
#[derive(Debug, Clone, PartialEq)]
pub struct Strengths {
    components: BTreeMap<Component, f64>,
    default: f64,
    blocks: Option<Blocks>,
}

/// Block weights in the order of LDM's blocks.
#[derive(Debug, Clone, PartialEq)]
struct Blocks {
    /// For text encoders.
    base: f64,
    input: Vec<f64>,
    middle: f64,
    output: Vec<f64>,
    names: UnetNames,
}

impl Default for Strengths {
    fn default() -> Self {
        Self::all(1.0)
    }
}

impl Strengths {
    /// One strength for everything.
    pub fn all(strength: f64) -> Self {
        Self { components: BTreeMap::new(), default: strength, blocks: None }
    }

    /// Another strength for one component.
    #[must_use]
    pub fn with(mut self, component: Component, strength: f64) -> Self {
        self.components.insert(component, strength);
        self
    }

    /// Block weights on top, in the layouts of 20 (SDXL) and 26 numbers: base, inputs, middle, outputs.
    ///
    /// The first number is for the text encoders; layers outside all blocks (time embedding, output) count as the first
    /// input block and the last output block. `base` gives the names of the UNet's blocks.
    ///
    /// # Errors
    /// If the count is another.
    pub fn with_blocks(mut self, weights: &[f64], base: &BaseModel) -> Result<Self, Fault> {
        let side = match weights.len() {
            20 => 9,
            26 => 12,
            count => {
                let message = format!("{count} block weights; 20 or 26 are known");
                return Err(Fault::Text { what: "the list of block weights", message });
            }
        };
        self.blocks = Some(Blocks {
            base: weights[0],
            input: weights[1..=side].to_vec(),
            middle: weights[side + 1],
            output: weights[side + 2..].to_vec(),
            names: UnetNames::of_diffusers(base.modules(Component::Unet).map(|(path, _)| path)),
        });
        Ok(self)
    }

    /// The strength for a module.
    pub fn of(&self, component: Component, path: &str) -> f64 {
        let strength = self.components.get(&component).copied().unwrap_or(self.default);
        match &self.blocks {
            None => strength,
            Some(blocks) if component != Component::Unet => strength * blocks.base,
            Some(blocks) => strength * blocks.of(path),
        }
    }
}

impl Blocks {
    fn of(&self, path: &str) -> f64 {
        let Some(ldm) = self.names.ldm_path(path) else { return 1.0 };
        let mut parts = ldm.split('.');
        let (side, number) = (parts.next().unwrap_or(""), parts.next().and_then(|number| number.parse().ok()));
        let weight = match (side, number) {
            ("input_blocks", Some(number)) => self.input.get::<usize>(number),
            ("output_blocks", Some(number)) => self.output.get(number),
            ("middle_block", _) => return self.middle,
            ("out", _) => self.output.last(),
            _ => self.input.first(),
        };
        weight.copied().unwrap_or(1.0)
    }
}
