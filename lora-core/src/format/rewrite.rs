//! One file of tensors written again: with other metadata, or its numbers in another type.

use std::{collections::BTreeMap, path::Path};

use super::{
    Dtype, Fault, TensorFile, TensorLayout, atomic,
    blocks::{Blocks, write_blocks},
    tiles::{Sink, Tensor},
    training_metadata::without_hashes,
    write,
};
use crate::{Error, Result};

/// Writes the tensors of `file`, in their order, with this metadata; see
/// [`write_atomically`](super::write_atomically) for what stands at `path` afterwards. It may be the file itself.
///
/// `dtype` is how numbers with a fraction are stored, `None` as they are: then every byte of them stays. Hashes of the old
/// numbers are left out of the metadata with the new type.
///
/// # Errors
/// If a number is not finite in the new type, or the file cannot be written.
pub fn rewrite(
    file: &TensorFile,
    path: &Path,
    metadata: &BTreeMap<String, String>,
    dtype: Option<Dtype>,
) -> Result<()> {
    let metadata = &if dtype.is_some() { without_hashes(metadata) } else { metadata.clone() };
    let stored = |info: &super::TensorInfo| dtype.filter(|_| info.dtype.is_float()).unwrap_or(info.dtype);
    let tensors: Vec<_> = file
        .names_in_place()
        .into_iter()
        .filter_map(|name| Some((name, file.info(name)?, file.bytes(name)?)))
        .collect();
    let layout = tensors.iter().map(|(name, info, _)| TensorLayout {
        name: (*name).to_owned(),
        dtype: stored(info),
        shape: info.shape.clone(),
    });
    let layout: Vec<TensorLayout> = layout.collect();
    let order: Vec<usize> = (0..layout.len()).collect();
    let header = write::header_in_order(path, &layout, &order, metadata)?;
    let bytes = layout.iter().filter_map(|entry| entry.dtype.bytes_of(&entry.shape));
    let expected = header.len() + bytes.sum::<usize>();
    let fill = |blocks: &mut Blocks| {
        let mut sink = Sink::new(blocks, path);
        sink.bytes(&header)?;
        for (name, info, bytes) in &tensors {
            let to = stored(info);
            match file.handle() {
                _ if to != info.dtype => {
                    let tensor = Tensor { name, bytes, from: info.dtype, to, columns: 1, updates: &[] };
                    sink.tensor(&tensor, &|| file.release())?;
                }
                Some(handle) => sink.range(handle, info.range.start as u64..info.range.end as u64)?,
                None => sink.bytes(bytes)?,
            }
        }
        Ok(())
    };
    atomic::replace_file(
        path,
        |out| write_blocks(out, path, expected as u64, fill),
        |written| {
            let copy = write::verify(path, written, &layout, metadata)?;
            let differs = tensors.iter().find(|(name, info, bytes)| {
                copy.info(name).is_none_or(|new| new.dtype == info.dtype && copy.bytes(name) != Some(*bytes))
            });
            match differs {
                None => Ok(()),
                Some((name, _, _)) => {
                    let what = format!("the numbers of `{}`", name.escape_debug());
                    Err(Error::file(path, Fault::ReadBack { what }))
                }
            }
        },
    )
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::format::{TensorData, write_tensors};

    #[test]
    fn other_metadata_leaves_every_number_and_may_go_over_the_file() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let data = |dtype, values: &[f32]| TensorData::from_f32(dtype, [values.len()], values).unwrap();
        let tensors = vec![
            ("b".to_owned(), data(Dtype::F16, &[1.0, -2.0, 0.5])),
            ("a".to_owned(), data(Dtype::F32, &[f32::NAN, 3.0])),
            ("n".to_owned(), TensorData::new(Dtype::I64, [1], 7_i64.to_le_bytes().to_vec()).unwrap()),
        ];
        let said = |key: &str| BTreeMap::from([(key.to_owned(), "x".to_owned())]);
        write_tensors(&path, &tensors, &said("old")).unwrap();
        rewrite(&TensorFile::open(&path).unwrap(), &path, &said("new"), None).unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.metadata(), &said("new"));
        for (name, data) in &tensors {
            assert_eq!((file.info(name).unwrap().dtype, file.bytes(name)), (data.dtype(), Some(data.bytes())));
        }
        // In another type, a number that is none is refused and the file stays.
        assert!(rewrite(&file, &path, &said("newer"), Some(Dtype::Bf16)).is_err());
        assert_eq!(TensorFile::open(&path).unwrap().metadata(), &said("new"));
    }

    #[test]
    fn numbers_change_their_type_and_whole_numbers_stay() {
        let folder = tempfile::tempdir().unwrap();
        let (from, to) = (folder.path().join("a"), folder.path().join("b"));
        let tensors = vec![
            ("w".to_owned(), TensorData::from_f32(Dtype::F32, [2], &[1.5, -0.25]).unwrap()),
            ("n".to_owned(), TensorData::new(Dtype::I64, [], 7_i64.to_le_bytes().to_vec()).unwrap()),
        ];
        write_tensors(&from, &tensors, &BTreeMap::new()).unwrap();
        for file in [TensorFile::open(&from).unwrap(), TensorFile::read(&from).unwrap()] {
            rewrite(&file, &to, &BTreeMap::new(), Some(Dtype::F16)).unwrap();
            let new = TensorFile::open(&to).unwrap();
            assert_eq!(new.info("w").unwrap().dtype, Dtype::F16);
            assert_eq!(new.array("w").unwrap().values, [1.5, -0.25]);
            assert_eq!(new.doubles("n").unwrap(), [7.0]);
        }
    }
}
