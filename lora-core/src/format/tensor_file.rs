//! One checked safetensors file.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{self, Read},
    path::{Path, PathBuf},
};

use memmap2::Mmap;

use super::{Dtype, Fault, HEADER_LIMIT, Header, TensorInfo, mapping};
use crate::{Array, Error, Result};

/// A safetensors file whose header has been checked; its numbers are read on demand.
///
/// Names come from strangers: never use one as a path, and print it through [`Quoted`](super::Quoted).
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    header: Header,
    content: Content,
}

#[derive(Debug)]
enum Content {
    /// The map, and the file for whoever copies without looking.
    Mapped(Mmap, File),
    Read(Vec<u8>),
}

impl TensorFile {
    /// Maps the file: for base models. Cutting it short while it is open ends the process.
    ///
    /// # Errors
    /// If it cannot be read, is no safetensors file, or breaks a rule of `docs/formats.md` §1 or §11.
    pub fn open(path: &Path) -> Result<Self> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let file = regular_file(path).map_err(read)?;
        // An empty file cannot be mapped everywhere.
        let content = match file.metadata().map_err(read)?.len() {
            0 => Content::Read(Vec::new()),
            _ => Content::Mapped(mapping::map(&file).map_err(read)?, file),
        };
        Self::check(path, content)
    }

    /// Reads the whole file into memory: for adapters, which other programs may rewrite meanwhile.
    ///
    /// # Errors
    /// As [`open`](Self::open).
    pub fn read(path: &Path) -> Result<Self> {
        let read = |source| Error::Read { path: path.to_owned(), source };
        let mut file = regular_file(path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        // A file that is no container is recognised by its beginning, before gigabytes of it are read.
        let mut content = Vec::new();
        file.by_ref().take(256).read_to_end(&mut content).map_err(read)?;
        let claimed = content.first_chunk::<8>().map_or(0, |claimed| u64::from_le_bytes(*claimed));
        if claimed <= HEADER_LIMIT {
            content.reserve_exact(usize::try_from(length).unwrap_or(0).saturating_sub(content.len()));
            file.read_to_end(&mut content).map_err(read)?;
        }
        Self::check(path, Content::Read(content))
    }

    /// A file whose bytes are in memory already; `path` is what errors call it, and is not looked at.
    ///
    /// # Errors
    /// If the bytes are no safetensors file, or break a rule of `docs/formats.md` §1 or §11.
    pub fn from_bytes(path: &Path, bytes: Vec<u8>) -> Result<Self> {
        Self::check(path, Content::Read(bytes))
    }

    fn check(path: &Path, content: Content) -> Result<Self> {
        let bytes: &[u8] = match &content {
            Content::Mapped(map, _) => map,
            Content::Read(bytes) => bytes,
        };
        let header = Header::parse(bytes).map_err(|fault| Error::file(path, fault))?;
        Ok(Self { path: path.to_owned(), header, content })
    }

    /// Where it was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the file says about itself.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        self.header.metadata()
    }

    /// The names of all tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.header.tensors().keys().map(String::as_str)
    }

    /// Type and shape of a tensor.
    pub fn info(&self, name: &str) -> Option<&TensorInfo> {
        self.header.tensors().get(name)
    }

    /// The bytes of a tensor, little-endian and row-major; not aligned to anything.
    pub fn bytes(&self, name: &str) -> Option<&[u8]> {
        let range = self.info(name)?.range.clone();
        match &self.content {
            Content::Mapped(map, _) => map.get(range),
            Content::Read(bytes) => bytes.get(range),
        }
    }

    /// Lets go of the memory that reading a mapped file took; what is needed again is read again.
    ///
    /// Nothing changes for a file that was [read](Self::read).
    pub fn release(&self) {
        if let Content::Mapped(map, _) = &self.content {
            mapping::release(map);
        }
    }

    /// The open file behind a map.
    pub(super) fn handle(&self) -> Option<&File> {
        match &self.content {
            Content::Mapped(_, file) => Some(file),
            Content::Read(_) => None,
        }
    }

    /// The names of all tensors, in the order in which their numbers lie.
    pub fn names_in_place(&self) -> Vec<&str> {
        let mut names: Vec<(usize, &str)> =
            self.header.tensors().iter().map(|(name, info)| (info.range.start, name.as_str())).collect();
        // Empty tensors share a place with what follows; the sort is stable, so they stay in order of their names.
        names.sort_by_key(|(start, _)| *start);
        names.into_iter().map(|(_, name)| name).collect()
    }

    /// The numbers of a tensor, widened to `f32`.
    ///
    /// # Errors
    /// If there is no such tensor, or it holds no plain numbers.
    pub fn array(&self, name: &str) -> Result<Array> {
        let (info, bytes) = self.stored(name)?;
        let values = info.dtype.widen(bytes).ok_or_else(|| self.not_numbers(name, info.dtype))?;
        Array::new(&*info.shape, values)
    }

    /// The numbers of a tensor, widened to `f64`: for alphas, which may be integers or doubles.
    ///
    /// # Errors
    /// As [`array`](Self::array).
    pub fn doubles(&self, name: &str) -> Result<Vec<f64>> {
        let (info, bytes) = self.stored(name)?;
        info.dtype.widen_to_f64(bytes).ok_or_else(|| self.not_numbers(name, info.dtype))
    }

    fn stored(&self, name: &str) -> Result<(&TensorInfo, &[u8])> {
        let found = self.info(name).zip(self.bytes(name));
        found.ok_or_else(|| Error::file(&self.path, Fault::Absent { tensor: name.to_owned() }))
    }

    fn not_numbers(&self, name: &str, dtype: Dtype) -> Error {
        Error::file(&self.path, Fault::NotNumbers { tensor: name.to_owned(), dtype })
    }
}

/// Opens what is a file: a folder or a pipe would only fail later, with a stranger message.
fn regular_file(path: &Path) -> io::Result<File> {
    let metadata = std::fs::metadata(path)?;
    if metadata.is_dir() {
        return Err(io::Error::new(io::ErrorKind::IsADirectory, "it is a folder"));
    }
    if !metadata.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "it is no regular file"));
    }
    File::open(path)
}
