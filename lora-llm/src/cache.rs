//! Keys and values of the ids that a model has read, so that a further id costs one position.

use lora_torch::memory::floats_mut;
use tch::{Device, Kind, Tensor};

use crate::{LlmConfig, Result, single::Memory};

/// The smallest room that is made, in positions.
const FIRST_ROOM: i64 = 128;

/// What all layers remember of one text.
#[derive(Debug)]
pub struct Cache {
    layers: Vec<LayerCache>,
}

/// What one layer remembers.
#[derive(Debug)]
pub(crate) struct LayerCache {
    /// Keys and values, `[1, g, room, e]` each.
    memory: [Tensor; 2],
    length: i64,
}

impl Cache {
    /// An empty memory.
    ///
    /// # Errors
    /// If there is no room for it.
    pub fn new(config: &LlmConfig, on: (Kind, Device)) -> Result<Self> {
        let size = [1, config.key_value_heads as i64, 0, config.head_dim as i64];
        let layer = || Ok(LayerCache { memory: [Tensor::f_empty(size, on)?, Tensor::f_empty(size, on)?], length: 0 });
        Ok(Self { layers: (0..config.layers).map(|_| layer()).collect::<Result<_>>()? })
    }

    /// How many positions are remembered.
    pub fn length(&self) -> usize {
        self.layers.first().map_or(0, |layer| layer.length as usize)
    }

    /// Forgets everything after the first `length` positions.
    pub fn truncate(&mut self, length: usize) {
        for layer in &mut self.layers {
            layer.length = layer.length.min(length as i64);
        }
    }

    pub(crate) fn layers_mut(&mut self) -> impl Iterator<Item = &mut LayerCache> {
        self.layers.iter_mut()
    }
}

impl LayerCache {
    /// Adds keys and values, `[1, g, s, e]`, and returns all of them, `[1, g, t, e]`.
    pub(crate) fn append(&mut self, keys: &Tensor, values: &Tensor) -> Result<(Tensor, Tensor)> {
        let (start, added) = (self.length, keys.size()[2]);
        let end = start + added;
        self.make_room(added)?;
        for (memory, new) in self.memory.iter_mut().zip([keys, values]) {
            memory.f_narrow(2, start, added)?.f_copy_(new)?;
        }
        self.length = end;
        Ok((self.memory[0].f_narrow(2, 0, end)?, self.memory[1].f_narrow(2, 0, end)?))
    }

    /// The memory as numbers, with room for one more position; `None` if it is not on the CPU in 32 bits.
    pub(crate) fn numbers(&mut self) -> Result<Option<Memory<'_>>> {
        self.make_room(1)?;
        let [keys, values] = &mut self.memory;
        Ok(floats_mut(keys).zip(floats_mut(values)).map(|(keys, values)| Memory { keys, values }))
    }

    /// Counts one more position, whose keys and values were put into [`numbers`](Self::numbers).
    pub(crate) fn advance(&mut self) {
        self.length += 1;
    }

    /// Makes room for further positions.
    fn make_room(&mut self, added: i64) -> Result<()> {
        let (start, end) = (self.length, self.length + added);
        for memory in &mut self.memory {
            let size = memory.size();
            if size[2] < end {
                let room = end.max(2 * size[2]).max(FIRST_ROOM);
                let larger = Tensor::f_empty([1, size[1], room, size[3]], (memory.f_kind()?, memory.device()))?;
                larger.f_narrow(2, 0, start)?.f_copy_(&memory.f_narrow(2, 0, start)?)?;
                *memory = larger;
            }
        }
        Ok(())
    }
}
