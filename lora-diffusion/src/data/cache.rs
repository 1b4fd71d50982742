//! Latents and text embeddings on disk, named by the hash of everything that they are made from.
//!
//! A changed picture, caption, crop or model has another name, so that nothing here can be stale and nothing ever has to
//! be cleared by hand; editing one caption computes one entry. A file that does not read back is computed again.
//! Entries are safetensors files of 32-bit floats: `latents/ab/abcd….safetensors`, `text/…`.

use std::{
    collections::BTreeMap,
    fs, io,
    path::{Path, PathBuf},
};

use lora_core::format::{Dtype, TensorData, TensorFile, write_tensors};
use sha2::{Digest, Sha256};
use tch::{Kind, Tensor};

use super::{
    Error, Result,
    dataset::{ContentHash, hex},
};

/// Counts up when the same inputs come to give other numbers: another resize filter, another scaling.
const VERSION: u32 = 1;

/// What an entry is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Entry {
    /// Mean and log variance of a picture's posterior, perhaps a mask.
    Latents,
    /// The output of the text encoder, perhaps a pooled one.
    Text,
}

impl Entry {
    fn folder(self) -> &'static str {
        match self {
            Self::Latents => "latents",
            Self::Text => "text",
        }
    }
}

/// The hash of everything that an entry is made from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Key(ContentHash);

impl Key {
    /// The key of these parts; every part is hashed with its length, so that no two lists of parts look alike.
    pub fn of(parts: &[&[u8]]) -> Self {
        let mut hash = Sha256::new();
        hash.update(VERSION.to_le_bytes());
        for part in parts {
            hash.update((part.len() as u64).to_le_bytes());
            hash.update(part);
        }
        Self(hash.finalize().into())
    }
}

/// A folder of entries; several runs may share one.
#[derive(Debug, Clone)]
pub struct Cache {
    folder: PathBuf,
}

impl Cache {
    /// A cache in this folder, which is made when the first entry is written.
    pub fn at(folder: impl Into<PathBuf>) -> Self {
        Self { folder: folder.into() }
    }

    /// The tensors of an entry on the host; `None` if it is not there or damaged.
    pub fn get(&self, entry: Entry, key: Key) -> Option<BTreeMap<String, Tensor>> {
        let file = TensorFile::read(&self.path(entry, key)).ok()?;
        let names: Vec<String> = file.names().map(str::to_owned).collect();
        let mut tensors = BTreeMap::new();
        for name in names {
            let array = file.array(&name).ok()?;
            if array.values.iter().any(|value| !value.is_finite()) {
                return None;
            }
            let shape: Vec<i64> = array.shape.iter().map(|axis| *axis as i64).collect();
            tensors.insert(name, Tensor::f_from_slice(&array.values).ok()?.f_view(shape.as_slice()).ok()?);
        }
        Some(tensors)
    }

    /// Writes an entry, atomically.
    ///
    /// # Errors
    /// If it cannot be written; a run goes on without.
    pub fn put(&self, entry: Entry, key: Key, tensors: &[(&str, &Tensor)]) -> Result<()> {
        let path = self.path(entry, key);
        let folder = path.parent().unwrap_or(&self.folder);
        fs::create_dir_all(folder).map_err(|source| Error::Write { path: folder.into(), source })?;
        let mut data = Vec::with_capacity(tensors.len());
        for (name, tensor) in tensors {
            let shape: Vec<usize> = tensor.size().iter().map(|axis| *axis as usize).collect();
            data.push(((*name).to_owned(), TensorData::from_f32(Dtype::F32, shape, &values(tensor)?)?));
        }
        Ok(write_tensors(&path, &data, &BTreeMap::new())?)
    }

    /// SHA-256 of a file's content, for the keys of entries; remembered by path, size and time of the last change, since
    /// a base model has gigabytes.
    ///
    /// # Errors
    /// If the file cannot be read.
    pub fn file_hash(&self, path: &Path) -> Result<ContentHash> {
        let read = |source| Error::Read { path: path.into(), source };
        let data = fs::metadata(path).map_err(read)?;
        let real = fs::canonicalize(path).map_err(read)?;
        let changed = data.modified().ok().and_then(|time| time.duration_since(std::time::UNIX_EPOCH).ok());
        let stamp = format!("{}\n{}\n{:?}", real.display(), data.len(), changed);
        let note = self.folder.join("files").join(hex(&Key::of(&[stamp.as_bytes()]).0));
        if let Some(hash) = fs::read_to_string(&note).ok().and_then(|text| unhex(text.trim())) {
            return Ok(hash);
        }
        let mut hash = Sha256::new();
        let mut file = fs::File::open(path).map_err(read)?;
        let mut buffer = vec![0; 1 << 20];
        loop {
            match io::Read::read(&mut file, &mut buffer).map_err(read)? {
                0 => break,
                count => hash.update(&buffer[..count]),
            }
        }
        let hash: ContentHash = hash.finalize().into();
        // Only a convenience: where it cannot be written, the file is read again next time.
        let written = fs::create_dir_all(self.folder.join("files"));
        if written.is_ok() {
            let _ = lora_core::format::write_atomically(&note, |out| out.write_all(hex(&hash).as_bytes()));
        }
        Ok(hash)
    }

    fn path(&self, entry: Entry, key: Key) -> PathBuf {
        let name = hex(&key.0);
        self.folder.join(entry.folder()).join(&name[..2]).join(format!("{name}.safetensors"))
    }
}

/// The numbers of a tensor, row-major, on the host.
pub(super) fn values(tensor: &Tensor) -> Result<Vec<f32>> {
    let flat = tensor.f_to_kind(Kind::Float)?.f_to_device(tch::Device::Cpu)?.f_contiguous()?.f_view([-1])?;
    let mut values = vec![0.0; flat.numel()];
    flat.f_copy_data(&mut values, flat.numel())?;
    Ok(values)
}

fn unhex(text: &str) -> Option<ContentHash> {
    let mut hash = [0; 32];
    if text.len() != 64 || !text.is_ascii() {
        return None;
    }
    for (at, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(hash)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_entry_comes_back_as_it_was() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("cache"));
        let key = Key::of(&[b"a", b"bc"]);
        assert!(cache.get(Entry::Latents, key).is_none());
        let mean = Tensor::f_from_slice(&[1.5f32, -2.0, 0.1, 4.0, 5.0, 6.0]).unwrap().f_view([1, 2, 3]).unwrap();
        cache.put(Entry::Latents, key, &[("mean", &mean)]).unwrap();
        assert_eq!(cache.get(Entry::Latents, key).unwrap()["mean"], mean);
        assert!(cache.get(Entry::Text, key).is_none());
        assert!(cache.get(Entry::Latents, Key::of(&[b"ab", b"c"])).is_none());
    }

    #[test]
    fn a_damaged_entry_is_as_none() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path());
        let key = Key::of(&[b"x"]);
        cache.put(Entry::Text, key, &[("context", &Tensor::f_from_slice(&[1.0f32]).unwrap())]).unwrap();
        let path = cache.path(Entry::Text, key);
        fs::write(&path, &fs::read(&path).unwrap()[..40]).unwrap();
        assert!(cache.get(Entry::Text, key).is_none());
        cache.put(Entry::Text, key, &[("context", &Tensor::f_from_slice(&[f32::NAN]).unwrap())]).unwrap();
        assert!(cache.get(Entry::Text, key).is_none(), "numbers that are not finite are never used");
    }

    #[test]
    fn the_hash_of_a_file_follows_its_content() {
        let folder = tempfile::tempdir().unwrap();
        let cache = Cache::at(folder.path().join("cache"));
        let file = folder.path().join("weights");
        fs::write(&file, b"abc").unwrap();
        let first = cache.file_hash(&file).unwrap();
        assert_eq!(hex(&first), "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad");
        assert_eq!(cache.file_hash(&file).unwrap(), first);
        fs::write(&file, b"abcd").unwrap();
        assert_ne!(cache.file_hash(&file).unwrap(), first);
    }
}
