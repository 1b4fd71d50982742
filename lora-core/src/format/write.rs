//! Writing safetensors files: sorted, padded, atomic, read back.
//!
//! The layout is byte for byte that of safetensors 0.8, so that hashes over the data (`sshs_model_hash`) come out as
//! every other program computes them: tensors sorted by type, widest first, then by name; header padded to 8 bytes.

use std::{borrow::Cow, collections::BTreeMap, io::Write, path::Path};

use super::{Dtype, Fault, HEADER_LIMIT, TensorFile, atomic};
use crate::{Error, Result};

/// One tensor to be written.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorData<'a> {
    dtype: Dtype,
    shape: Vec<usize>,
    bytes: Cow<'a, [u8]>,
}

impl<'a> TensorData<'a> {
    /// A tensor from its little-endian bytes.
    ///
    /// # Errors
    /// If there are more or fewer bytes than type and shape say.
    pub fn new(dtype: Dtype, shape: impl Into<Vec<usize>>, bytes: impl Into<Cow<'a, [u8]>>) -> Result<Self> {
        let (shape, bytes) = (shape.into(), bytes.into());
        if dtype.bytes_of(&shape) != Some(bytes.len()) {
            return Err(Error::Shapes { operation: "tensor to be written", shapes: vec![shape, vec![bytes.len()]] });
        }
        Ok(Self { dtype, shape, bytes })
    }

    /// A tensor from numbers, rounded to a float type.
    ///
    /// # Errors
    /// If the type is no float, or the count is not that of the shape.
    pub fn from_f32(dtype: Dtype, shape: impl Into<Vec<usize>>, values: &[f32]) -> Result<Self> {
        let bytes = dtype.narrow(values).ok_or_else(|| Error::Config {
            option: "dtype",
            reason: format!("{dtype} is no floating-point type that can be written"),
        })?;
        Self::new(dtype, shape, bytes)
    }

    /// How its numbers are stored.
    pub fn dtype(&self) -> Dtype {
        self.dtype
    }

    /// Length of every axis.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Its little-endian bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.bytes
    }
}

/// Name, type and shape of a tensor whose numbers come later.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorLayout {
    /// Its name.
    pub name: String,
    /// How its numbers are stored.
    pub dtype: Dtype,
    /// Length of every axis.
    pub shape: Vec<usize>,
}

/// Writes a file of tensors; see [`write_atomically`](super::write_atomically) for what stands at `path` afterwards.
///
/// # Errors
/// If two names are equal, or the file cannot be written, or reads back differently.
pub fn write_tensors(
    path: &Path,
    tensors: &[(String, TensorData<'_>)],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let layout: Vec<TensorLayout> = tensors
        .iter()
        .map(|(name, data)| TensorLayout { name: name.clone(), dtype: data.dtype, shape: data.shape.clone() })
        .collect();
    let failed = |source| Error::Write { path: path.to_owned(), source };
    let (header, order) = header(path, &layout, metadata)?;
    atomic::replace(
        path,
        |out| {
            out.write_all(&header).map_err(failed)?;
            order.iter().try_for_each(|index| out.write_all(tensors[*index].1.bytes()).map_err(failed))
        },
        |written| {
            let file = verify(path, written, &layout, metadata)?;
            match tensors.iter().find(|(name, data)| file.bytes(name) != Some(data.bytes())) {
                Some((name, _)) => Err(read_back(path, format!("the numbers of `{}`", name.escape_debug()))),
                None => Ok(()),
            }
        },
    )
}

/// Writes a file of tensors that are made one at a time, so that only one is in memory.
///
/// `fill` is called once per entry of `layout`, with its index, in the order of the file, and writes exactly the bytes
/// that its entry announces.
///
/// # Errors
/// As [`write_tensors`]; what `fill` returns; and if it writes more or less than announced.
pub fn stream_tensors(
    path: &Path,
    layout: &[TensorLayout],
    metadata: &BTreeMap<String, String>,
    mut fill: impl FnMut(usize, &mut dyn Write) -> Result<()>,
) -> Result<()> {
    let (header, order) = header(path, layout, metadata)?;
    atomic::replace(
        path,
        |out| {
            out.write_all(&header).map_err(|source| Error::Write { path: path.to_owned(), source })?;
            for index in order {
                let entry = &layout[index];
                let mut exact = Exact { out, left: entry.dtype.bytes_of(&entry.shape).unwrap_or(0) };
                fill(index, &mut exact)?;
                if exact.left != 0 {
                    return Err(read_back(path, format!("`{}` lacks {} bytes", entry.name.escape_debug(), exact.left)));
                }
            }
            Ok(())
        },
        |written| verify(path, written, layout, metadata).map(drop),
    )
}

/// The bytes of a file of tensors, as [`write_tensors`] writes them; `path` is what errors call it.
///
/// # Errors
/// If two names are equal, or the header would be longer than readers take.
pub fn tensors_to_bytes(
    path: &Path,
    tensors: &[(String, TensorData<'_>)],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let layout: Vec<TensorLayout> = tensors
        .iter()
        .map(|(name, data)| TensorLayout { name: name.clone(), dtype: data.dtype, shape: data.shape.clone() })
        .collect();
    let (mut bytes, order) = header(path, &layout, metadata)?;
    order.iter().for_each(|index| bytes.extend_from_slice(tensors[*index].1.bytes()));
    Ok(bytes)
}

/// Takes as many bytes as a tensor has and refuses more.
struct Exact<'a> {
    out: &'a mut dyn Write,
    left: usize,
}

impl Write for Exact<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        if bytes.len() > self.left {
            return Err(std::io::Error::other("more bytes than the tensor has"));
        }
        let written = self.out.write(bytes)?;
        self.left -= written;
        Ok(written)
    }
    fn flush(&mut self) -> std::io::Result<()> {
        self.out.flush()
    }
}

/// The indices of `layout` in the order of the file.
pub(super) fn file_order(layout: &[TensorLayout]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..layout.len()).collect();
    order.sort_by(|a, b| {
        let (a, b) = (&layout[*a], &layout[*b]);
        b.dtype.cmp(&a.dtype).then_with(|| a.name.cmp(&b.name))
    });
    order
}

/// Length, JSON and padding, and the order of the tensors.
pub(super) fn header(
    path: &Path,
    layout: &[TensorLayout],
    metadata: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, Vec<usize>)> {
    let order = file_order(layout);
    Ok((header_in_order(path, layout, &order, metadata)?, order))
}

/// Length, JSON and padding of tensors that lie in the given order.
pub(super) fn header_in_order(
    path: &Path,
    layout: &[TensorLayout],
    order: &[usize],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let invalid = |reason: String| Error::Write {
        path: path.to_owned(),
        source: std::io::Error::new(std::io::ErrorKind::InvalidInput, reason),
    };
    let mut fields = serde_json::Map::new();
    if !metadata.is_empty() {
        fields.insert(
            "__metadata__".to_owned(),
            metadata.iter().map(|(key, value)| (key.clone(), value.clone())).collect(),
        );
    }
    let mut begin = 0_usize;
    for index in order {
        let TensorLayout { name, dtype, shape } = &layout[*index];
        let end = dtype.bytes_of(shape).and_then(|bytes| bytes.checked_add(begin));
        let end = end.ok_or_else(|| invalid(format!("`{}` {shape:?} is too large", name.escape_debug())))?;
        let field = serde_json::json!({"dtype": dtype.name(), "shape": shape, "data_offsets": [begin, end]});
        if fields.insert(name.clone(), field).is_some() {
            return Err(invalid(format!("`{}` would occur twice", name.escape_debug())));
        }
        begin = end;
    }
    let json = serde_json::Value::Object(fields).to_string();
    let length = json.len().next_multiple_of(8);
    if length as u64 > HEADER_LIMIT {
        return Err(invalid(format!("a header of {length} bytes is more than any reader takes")));
    }
    let mut header = (length as u64).to_le_bytes().to_vec();
    header.extend_from_slice(json.as_bytes());
    header.resize(8 + length, b' ');
    Ok(header)
}

/// Opens what was written and compares all but the numbers.
pub(super) fn verify(
    path: &Path,
    written: &Path,
    layout: &[TensorLayout],
    metadata: &BTreeMap<String, String>,
) -> Result<TensorFile> {
    let file = TensorFile::open(written)?;
    let differs = layout
        .iter()
        .find(|entry| file.info(&entry.name).is_none_or(|info| info.dtype != entry.dtype || info.shape != entry.shape));
    if let Some(entry) = differs {
        return Err(read_back(path, format!("`{}`", entry.name.escape_debug())));
    }
    if file.names().len() != layout.len() || file.metadata() != metadata {
        return Err(read_back(path, "names or metadata".to_owned()));
    }
    Ok(file)
}

fn read_back(path: &Path, what: String) -> Error {
    Error::file(path, Fault::ReadBack { what })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tensors() -> Vec<(String, TensorData<'static>)> {
        let numbers = |dtype, shape: &[usize]| {
            let values: Vec<f32> = (0..shape.iter().product()).map(|index| index as f32 - 1.5).collect();
            TensorData::from_f32(dtype, shape, &values).unwrap()
        };
        vec![
            ("b".to_owned(), numbers(Dtype::F16, &[3])),
            ("a".to_owned(), numbers(Dtype::F32, &[2, 2])),
            ("c".to_owned(), numbers(Dtype::Bf16, &[])),
            ("d \"q\" \u{1F600}".to_owned(), numbers(Dtype::F8E4M3, &[5])),
            ("e".to_owned(), numbers(Dtype::F32, &[0, 3])),
            ("f".to_owned(), TensorData::new(Dtype::I64, [], 7_i64.to_le_bytes().to_vec()).unwrap()),
        ]
    }

    #[test]
    fn the_file_is_the_one_that_the_reference_writer_makes() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        // One entry: the reference keeps metadata in a hash map, whose order is not fixed.
        let metadata = BTreeMap::from([("key".to_owned(), "value \n é".to_owned())]);
        write_tensors(&path, &tensors(), &metadata).unwrap();
        let tensors = tensors();
        let views = tensors.iter().map(|(name, data)| {
            let dtype = serde_json::from_value(serde_json::json!(data.dtype().name())).unwrap();
            (name, safetensors::tensor::TensorView::new(dtype, data.shape().to_vec(), data.bytes()).unwrap())
        });
        let reference = safetensors::serialize(views, Some(metadata.into_iter().collect())).unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), reference);
    }

    #[test]
    fn what_is_written_reads_back_mapped_and_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let metadata = BTreeMap::from([("a".to_owned(), String::new()), ("b".to_owned(), "2".to_owned())]);
        write_tensors(&path, &tensors(), &metadata).unwrap();
        for file in [TensorFile::open(&path).unwrap(), TensorFile::read(&path).unwrap()] {
            assert_eq!(file.metadata(), &metadata);
            assert_eq!(file.names().len(), 6);
            for (name, data) in &tensors() {
                assert_eq!(file.bytes(name), Some(data.bytes()));
                assert_eq!(file.info(name).unwrap().shape, data.shape());
            }
            assert_eq!(file.doubles("f").unwrap(), [7.0]);
            assert_eq!(file.array("a").unwrap().values, [-1.5, -0.5, 0.5, 1.5]);
            assert!(file.array("g").is_err());
        }
    }

    #[test]
    fn output_over_a_mapped_input_is_safe() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        write_tensors(&path, &tensors(), &BTreeMap::new()).unwrap();
        let input = TensorFile::open(&path).unwrap();
        let kept: Vec<u8> = input.bytes("a").unwrap().to_vec();
        let layout: Vec<TensorLayout> = ["a", "b"]
            .map(|name| {
                let info = input.info(name).unwrap();
                TensorLayout { name: name.to_owned(), dtype: info.dtype, shape: info.shape.clone() }
            })
            .to_vec();
        let bytes = |index: usize| input.bytes(&layout[index].name).unwrap();
        stream_tensors(&path, &layout, &BTreeMap::new(), |index, out| {
            out.write_all(bytes(index)).map_err(|source| Error::Write { path: path.clone(), source })
        })
        .unwrap();
        assert_eq!(input.bytes("a").unwrap(), kept);
        let output = TensorFile::open(&path).unwrap();
        assert_eq!(output.names().collect::<Vec<_>>(), ["a", "b"]);
        assert_eq!(output.bytes("a").unwrap(), kept);
    }

    #[test]
    fn equal_names_and_wrong_counts_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("t.safetensors");
        let twice: Vec<_> = ["a", "a"].map(|name| (name.to_owned(), tensors()[0].1.clone())).to_vec();
        assert!(write_tensors(&path, &twice, &BTreeMap::new()).is_err());
        let layout = [TensorLayout { name: "a".to_owned(), dtype: Dtype::F16, shape: vec![2] }];
        for bytes in [3, 5] {
            let written = stream_tensors(&path, &layout, &BTreeMap::new(), |_, out| {
                out.write_all(&vec![0; bytes]).map_err(|source| Error::Write { path: path.clone(), source })
            });
            assert!(written.is_err(), "{bytes} bytes for a tensor of 4");
        }
        assert!(!path.exists());
        assert!(TensorData::new(Dtype::F16, [2], vec![0; 3]).is_err());
    }
}
