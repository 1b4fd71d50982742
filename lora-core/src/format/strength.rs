//! How strongly a loaded adapter acts, per component and, for the UNet, per block.

use std::collections::BTreeMap;

use super::{BaseModel, Component, Family, Fault, ldm::UnetNames};

/// What a person multiplies a loaded adapter by.
#[derive(Debug, Clone, PartialEq)]
pub struct Strengths {
    components: BTreeMap<Component, f64>,
    default: f64,
    blocks: Option<Blocks>,
}

/// A weight for each of the 26 places of an LDM model: text encoders, 12 inputs, the middle, 12 outputs.
#[derive(Debug, Clone, PartialEq)]
struct Blocks {
    places: [f64; 26],
    names: UnetNames,
    /// SDXL counts its embeddings as the first input.
    is_sdxl: bool,
}

/// First place of the inputs, the middle, and first place of the outputs.
const INPUT: usize = 1;
const MIDDLE: usize = 13;
const OUTPUT: usize = 14;

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

    /// Block weights on top, as sd-scripts reads `--lbws`: a list of 12 or 20 numbers for SDXL, 17 or 26 for the others.
    ///
    /// In order: text encoders, inputs, middle, outputs; the shorter lists leave out the blocks without attention. What
    /// has no place in the list keeps its strength. `base` gives the names of the UNet's blocks.
    ///
    /// # Errors
    /// If the count is another.
    pub fn with_blocks(mut self, weights: &[f64], base: &BaseModel) -> Result<Self, Fault> {
        let (inputs, outputs): (&[usize], std::ops::Range<usize>) = match weights.len() {
            12 => (&[4, 5, 7, 8], 0..6),
            17 => (&[1, 2, 4, 5, 7, 8], 3..12),
            20 => (&[0, 1, 2, 3, 4, 5, 6, 7, 8], 0..9),
            26 => (&[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11], 0..12),
            count => {
                let message = format!("{count} block weights; lists of 12, 17, 20 or 26 are known");
                return Err(Fault::Text { what: "the list of block weights", message });
            }
        };
        let inputs = inputs.iter().map(|input| INPUT + input);
        let order = std::iter::once(0).chain(inputs).chain([MIDDLE]).chain(outputs.map(|output| OUTPUT + output));
        let mut places = [1.0; 26];
        order.zip(weights).for_each(|(place, weight)| places[place] = *weight);
        let names = UnetNames::of_diffusers(base.modules(Component::Unet).map(|(path, _)| path));
        self.blocks = Some(Blocks { places, names, is_sdxl: *base.family() == Family::Sdxl });
        Ok(self)
    }

    /// The strength for a module.
    pub fn of(&self, component: Component, path: &str) -> f64 {
        let strength = self.components.get(&component).copied().unwrap_or(self.default);
        strength * self.blocks.as_ref().map_or(1.0, |blocks| blocks.of(component, path))
    }
}

impl Blocks {
    fn of(&self, component: Component, path: &str) -> f64 {
        let place = match component {
            Component::Unet => self.place(path),
            _ => path.starts_with("text_model.encoder.").then_some(0),
        };
        place.and_then(|place| self.places.get(place)).copied().unwrap_or(1.0)
    }

    fn place(&self, path: &str) -> Option<usize> {
        let ldm = self.names.ldm_path(path)?;
        let mut parts = ldm.split('.');
        let side = parts.next()?;
        let mut number = || parts.next()?.parse::<usize>().ok();
        match side {
            "input_blocks" => number().filter(|number| self.is_sdxl || *number > 0).map(|number| INPUT + number),
            "middle_block" => Some(MIDDLE),
            "output_blocks" => number().map(|number| OUTPUT + number),
            "time_embed" | "label_emb" if self.is_sdxl => Some(INPUT),
            "out" if self.is_sdxl => Some(OUTPUT + 9),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn base(paths: &[&str]) -> BaseModel {
        BaseModel::from_shapes(paths.iter().map(|path| (Component::Unet, format!("{path}.weight"), vec![4, 4])))
    }

    #[test]
    fn shorter_lists_leave_out_the_blocks_without_attention() {
        let paths = [
            "down_blocks.0.attentions.0.proj_in",
            "down_blocks.0.resnets.1.conv1",
            "down_blocks.3.resnets.0.conv1",
            "mid_block.attentions.0.proj_in",
            "up_blocks.0.resnets.0.conv1",
            "up_blocks.1.attentions.0.proj_in",
            "conv_in",
        ];
        let base = base(&paths);
        let weights: Vec<f64> = (0..17).map(|place| f64::from(place) / 16.0 + 2.0).collect();
        let strengths = Strengths::all(1.0).with_blocks(&weights, &base).unwrap();
        let found = paths.map(|path| strengths.of(Component::Unet, path));
        // BASE, IN01, IN02, IN04, IN05, IN07, IN08, MID, OUT03, ...
        assert_eq!(found, [weights[1], weights[2], 1.0, weights[7], 1.0, weights[8], 1.0]);
        assert_eq!(strengths.of(Component::TextEncoder, "text_model.encoder.layers.0.mlp.fc1"), 2.0);
        assert!(Strengths::default().with_blocks(&[1.0; 13], &base).is_err());
    }

    #[test]
    fn a_component_may_have_a_strength_of_its_own() {
        let strengths = Strengths::all(0.5).with(Component::TextEncoder, -0.25);
        assert_eq!(strengths.of(Component::Unet, "conv_in"), 0.5);
        assert_eq!(strengths.of(Component::TextEncoder, "x"), -0.25);
    }
}
