//! The text encoder's output for all captions, from the cache or from the encoder.
//!
//! A frozen text encoder says the same about the same words, so it runs once per caption and can be put away before
//! training. Where words change from step to step, or the encoder is trained, it runs inside the step instead.

use std::collections::{BTreeMap, BTreeSet};

use tch::{Kind, Tensor};

use super::{
    Error, Result,
    cache::{Cache, Entry, Key},
    dataset::ContentHash,
};

/// What the text encoder says about one caption, on the host in 32 bits.
#[derive(Debug)]
pub struct Embedding {
    /// `[77, d]`, what cross-attention reads.
    pub context: Tensor,
    /// `[p]`, SDXL's pooled embedding.
    pub pooled: Option<Tensor>,
}

/// The embeddings of some captions.
#[derive(Debug)]
pub struct Embeddings {
    by_caption: BTreeMap<String, Embedding>,
    /// Entries that came from the cache.
    pub cached: usize,
    /// Entries that were computed.
    pub computed: usize,
}

impl Embeddings {
    /// Makes the embeddings of all `captions` and of the empty one.
    ///
    /// `encoder` is the hash of the text encoders' weights and `settings` whatever else changes their output, such as
    /// the layer that is taken. `encode` gives one embedding per caption; it is called with one caption at a time, since
    /// products of larger matrices round differently, and an entry must depend on its key alone for an exact resume.
    ///
    /// # Errors
    /// If the encoder fails or gives numbers that are not finite.
    pub fn new<'a>(
        captions: impl IntoIterator<Item = &'a str>,
        cache: Option<&Cache>,
        encoder: ContentHash,
        settings: &str,
        encode: &mut dyn FnMut(&[&str]) -> crate::Result<Vec<Embedding>>,
    ) -> crate::Result<Self> {
        let captions: BTreeSet<&str> = captions.into_iter().chain([""]).collect();
        let key = |caption: &str| Key::of(&[caption.as_bytes(), &encoder, settings.as_bytes()]);
        let mut made = Self { by_caption: BTreeMap::new(), cached: 0, computed: 0 };
        let mut missing = Vec::new();
        for caption in captions {
            match cache.and_then(|cache| load(cache, key(caption))) {
                Some(embedding) => {
                    made.cached += 1;
                    made.by_caption.insert(caption.to_owned(), embedding);
                }
                None => missing.push(caption),
            }
        }
        for caption in missing {
            let embeddings = tch::no_grad(|| encode(&[caption]))?;
            let [embedding] = &embeddings[..] else {
                let reason = format!("{} embeddings for one caption", embeddings.len());
                return Err(Error::Option { option: "text encoder", reason }.into());
            };
            let embedding = checked(caption, embedding)?;
            // A cache that cannot be written costs time next time, nothing else.
            let _ = cache.map(|cache| store(cache, key(caption), &embedding));
            made.computed += 1;
            made.by_caption.insert(caption.to_owned(), embedding);
        }
        Ok(made)
    }

    /// The embedding of a caption that was asked for at the start, or of the empty one.
    pub fn of(&self, caption: &str) -> Option<&Embedding> {
        self.by_caption.get(caption)
    }
}

fn checked(caption: &str, embedding: &Embedding) -> crate::Result<Embedding> {
    let host = |tensor: &Tensor| -> crate::Result<Tensor> {
        let tensor = tensor.f_to_kind(Kind::Float)?.f_to_device(tch::Device::Cpu)?.f_contiguous()?;
        let finite = tensor.f_isfinite()?.f_all()?.f_int64_value(&[])? == 1;
        let error = || Error::NotFinite { what: format!("caption “{caption}”"), model: "text encoder" };
        if finite { Ok(tensor) } else { Err(error().into()) }
    };
    let pooled = embedding.pooled.as_ref().map(host).transpose()?;
    Ok(Embedding { context: host(&embedding.context)?, pooled })
}

fn store(cache: &Cache, key: Key, embedding: &Embedding) -> Result<()> {
    let mut tensors = vec![("context", &embedding.context)];
    tensors.extend(embedding.pooled.as_ref().map(|pooled| ("pooled", pooled)));
    cache.put(Entry::Text, key, &tensors)
}

fn load(cache: &Cache, key: Key) -> Option<Embedding> {
    let mut tensors = cache.get(Entry::Text, key)?;
    Some(Embedding { context: tensors.remove("context")?, pooled: tensors.remove("pooled") })
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Encodes a caption as its length, and counts.
    fn run(captions: &[&str], cache: &Cache, encoder: ContentHash) -> (Embeddings, usize) {
        let mut count = 0;
        let made = Embeddings::new(captions.iter().copied(), Some(cache), encoder, "skip 1", &mut |group| {
            count += group.len();
            let embed = |caption: &&str| Embedding {
                context: Tensor::f_from_slice(&[caption.len() as f32; 4]).unwrap().f_view([2, 2]).unwrap(),
                pooled: None,
            };
            Ok(group.iter().map(embed).collect())
        });
        (made.unwrap(), count)
    }

    #[test]
    fn editing_one_caption_computes_one_entry() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let (made, count) = run(&["a cat", "a dog", "a cat", "a whale"], &cache, [1; 32]);
        assert_eq!((made.cached, made.computed, count), (0, 4, 4));
        assert_eq!(made.of("a whale").unwrap().context.f_double_value(&[0, 0]).unwrap(), 7.0);
        assert!(made.of("").is_some() && made.of("a bat").is_none());
        let (made, count) = run(&["a cat", "a dog", "a cat", "a blue whale"], &cache, [1; 32]);
        assert_eq!((made.cached, made.computed, count), (3, 1, 1));
        let (_, count) = run(&["a cat"], &cache, [2; 32]);
        assert_eq!(count, 2, "another encoder has entries of its own");
    }

    #[test]
    fn numbers_that_are_not_finite_are_named() {
        let mut encode = |group: &[&str]| {
            let context = Tensor::f_from_slice(&[f32::NAN])?;
            Ok(group.iter().map(|_| Embedding { context: context.shallow_clone(), pooled: None }).collect())
        };
        let error = Embeddings::new(["a cat"], None, [0; 32], "", &mut encode).unwrap_err();
        assert!(error.to_string().contains("text encoder"), "{error}");
    }
}
