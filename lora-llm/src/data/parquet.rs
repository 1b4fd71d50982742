//! Rows of a Parquet file, each as the JSON object that its columns spell.
//!
//! Only with the feature `parquet`; the file format is that of Apache Parquet, read by the crate of the same name.

use std::{fs::File, io, path::Path};

use parquet::file::reader::{FileReader, SerializedFileReader};
use serde_json::Value as Json;

use super::{
    Error, Result,
    records::{BadRow, Record},
};

/// What a Parquet file begins with.
pub(super) const MAGIC: &[u8] = b"PAR1";

/// All rows of a file. The line of a row is its number, from 1.
pub(super) fn records(path: &Path) -> Result<Vec<Result<Record, BadRow>>> {
    let failed = |source| Error::Read { path: path.to_owned(), source };
    let broken = |error: parquet::errors::ParquetError| failed(io::Error::new(io::ErrorKind::InvalidData, error));
    let file = File::open(path).map_err(failed)?;
    let reader = SerializedFileReader::new(file).map_err(broken)?;
    let rows = reader.get_row_iter(None).map_err(broken)?;
    (1..)
        .zip(rows)
        .map(|(line, row)| match row.map_err(broken)?.to_json_value() {
            Json::Object(fields) => Ok(Ok(Record { line, fields })),
            _ => Ok(Err(BadRow { line, column: 1, reason: "no columns".to_owned(), excerpt: String::new() })),
        })
        .collect()
}
