//! From ids to further ids, one by one, each a choice among the model's probabilities.

mod sampling;

use std::ops::ControlFlow;

use tch::{Device, Kind};

pub use sampling::Sampling;

use crate::{Decoder, Error, Result, decoder::Cache};

/// How a text is continued.
#[derive(Debug, Clone, PartialEq)]
pub struct GenerateOptions {
    /// How ids are chosen.
    pub sampling: Sampling,
    /// The most ids that are added.
    pub max_tokens: usize,
    /// Ids that end the text; they are not part of the result.
    pub stop: Vec<u32>,
}

/// Why a text ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Finish {
    /// The model chose an id that ends it.
    Stop(u32),
    /// It has the greatest length that was asked for, or that the model can read.
    Length,
    /// The caller had enough.
    Caller,
}

/// A text that can be continued, with what the model remembers of it.
///
/// A further prompt that begins as the last one ended, as in a chat, is read from where they part.
#[derive(Debug)]
pub struct Session<'a> {
    decoder: &'a Decoder,
    cache: Cache,
    /// What the cache holds.
    read: Vec<u32>,
}

impl<'a> Session<'a> {
    /// A session in which nothing was said.
    ///
    /// # Errors
    /// If there is no memory for it.
    pub fn new(decoder: &'a Decoder) -> Result<Self> {
        Ok(Self { decoder, cache: decoder.cache()?, read: Vec::new() })
    }

    /// Continues `prompt`; each new id goes to `each` as soon as it is chosen, which may end the text.
    ///
    /// The ids are a function of the prompt, the options and the model: the draw for an id depends on the seed and its number.
    ///
    /// # Errors
    /// If the prompt is empty or too long for the model, an id is unknown, an option cannot be, or memory runs out.
    pub fn generate(
        &mut self,
        prompt: &[u32],
        options: &GenerateOptions,
        each: &mut dyn FnMut(u32) -> ControlFlow<()>,
    ) -> Result<Finish> {
        options.sampling.check()?;
        let limit = self.decoder.config().max_positions;
        if prompt.is_empty() {
            return Err(Error::Request { option: "prompt", reason: "is empty".to_owned() });
        }
        if prompt.len() > limit {
            return Err(Error::TooLong { what: "the prompt", length: prompt.len(), limit });
        }
        // The last id is always read anew: its logits are needed.
        let known = self.read.iter().zip(&prompt[..prompt.len() - 1]).take_while(|(read, id)| read == id).count();
        self.cache.truncate(known);
        self.read.truncate(known);
        let mut text = prompt.to_vec();
        for number in 0..options.max_tokens {
            if text.len() > limit {
                return Ok(Finish::Length);
            }
            let new = &text[self.read.len()..];
            let logits = self.decoder.next(new, &mut self.cache)?;
            self.read.extend_from_slice(new);
            let id = match options.sampling.is_greedy() {
                true => logits.f_argmax(0, false)?.f_int64_value(&[])? as u32,
                false => {
                    let host = logits.f_to_device(Device::Cpu)?.f_to_kind(Kind::Float)?;
                    options.sampling.choose(Vec::try_from(host)?, &text, number as u64)
                }
            };
            if options.stop.contains(&id) {
                return Ok(Finish::Stop(id));
            }
            text.push(id);
            if each(id).is_break() {
                return Ok(Finish::Caller);
            }
        }
        Ok(Finish::Length)
    }
}

/// The ids that follow `prompt`, all at once.
///
/// # Errors
/// As [`Session::generate`].
pub fn generate(decoder: &Decoder, prompt: &[u32], options: &GenerateOptions) -> Result<Vec<u32>> {
    let mut ids = Vec::new();
    Session::new(decoder)?.generate(prompt, options, &mut |id| {
        ids.push(id);
        ControlFlow::Continue(())
    })?;
    Ok(ids)
}
