//! The header of a safetensors file, parsed and checked.
//!
//! Layout: 8 bytes little-endian length, that many bytes of JSON, data. The reference reader (safetensors 0.8) keeps
//! the last of two equal names and lets blanks stand before the JSON; both are refused here, as its specification says.
//! Whatever is allocated is bounded by a small multiple of the header's own bytes.

use std::{collections::BTreeMap, fmt, ops::Range};

use serde::de::{Deserialize, Deserializer, IgnoredAny, MapAccess, SeqAccess, Visitor};

use super::{Dtype, Fault, FileKind};

/// Bytes of the longest header that is read: the limit of the reference reader.
pub const HEADER_LIMIT: u64 = 100_000_000;

/// More tensors than any model has.
const TENSOR_LIMIT: usize = 1_000_000;

/// More dimensions than any tensor library takes.
const DIMENSION_LIMIT: usize = 64;

const METADATA: &str = "__metadata__";

/// Type, shape and place of one tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorInfo {
    /// How its numbers are stored.
    pub dtype: Dtype,
    /// Length of every axis.
    pub shape: Vec<usize>,
    /// Its bytes, relative to the first byte of the file.
    pub(super) range: Range<usize>,
}

impl TensorInfo {
    /// Count of its numbers.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

/// How many numbers axes of these lengths have; the largest count where that overflows, as it may in a tensor without numbers,
/// whose other axes may be of any length.
pub(crate) fn count(lengths: &[usize]) -> usize {
    lengths.iter().copied().fold(1, usize::saturating_mul)
}

/// What a container says about itself.
#[derive(Debug, Clone, Default)]
pub struct Header {
    pub(super) metadata: BTreeMap<String, String>,
    pub(super) tensors: BTreeMap<String, TensorInfo>,
}

impl Header {
    /// The checked header of a whole file.
    pub fn parse(file: &[u8]) -> Result<Self, Fault> {
        let recognised = || FileKind::of(&file[..file.len().min(256)]).map(|kind| Fault::Kind { kind });
        let Some((length, rest)) = file.split_first_chunk::<8>() else {
            return Err(recognised().unwrap_or(Fault::Short { length: file.len() as u64 }));
        };
        let (length, available) = (u64::from_le_bytes(*length), rest.len() as u64);
        if length > HEADER_LIMIT || length > available {
            let fault = Fault::HeaderLength { header: length, available, limit: HEADER_LIMIT };
            return Err(recognised().unwrap_or(fault));
        }
        let (json, data) = rest.split_at(length as usize);
        match json.first() {
            Some(b'{') => {}
            Some(first) => return Err(recognised().unwrap_or(Fault::HeaderStart { first: *first })),
            None => return Err(Fault::NoHeader),
        }
        let json = std::str::from_utf8(json).map_err(|error| Fault::Utf8 { position: error.valid_up_to() })?;
        let raw: RawHeader = serde_json::from_str(json).map_err(|error| Fault::Json { message: error.to_string() })?;
        raw.check(8 + length as usize, data.len() as u64)
    }

    /// What the file says about itself in words.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }

    /// The tensors by name.
    pub fn tensors(&self) -> &BTreeMap<String, TensorInfo> {
        &self.tensors
    }
}

/// The JSON as it stands, with duplicates and nonsense kept for the messages.
#[derive(Default)]
struct RawHeader {
    metadata: Option<Vec<(String, RawText)>>,
    second_metadata: bool,
    tensors: Vec<(String, RawTensor)>,
}

#[derive(Default)]
struct RawTensor {
    dtype: Option<String>,
    shape: Option<Numbers>,
    data_offsets: Option<Numbers>,
    twice: Option<&'static str>,
}

/// A short list of numbers of any kind; `None` where it is too long.
struct Numbers(Option<Vec<serde_json::Number>>);

enum RawText {
    Text(String),
    Other(&'static str),
}

impl RawHeader {
    fn check(self, data_start: usize, data_length: u64) -> Result<Header, Fault> {
        if self.second_metadata {
            return Err(Fault::Duplicate { name: METADATA.to_owned() });
        }
        let mut metadata = BTreeMap::new();
        for (key, value) in self.metadata.unwrap_or_default() {
            match value {
                RawText::Other(found) => return Err(Fault::Metadata { key, found }),
                RawText::Text(_) if metadata.contains_key(&key) => return Err(Fault::Duplicate { name: key }),
                RawText::Text(value) => metadata.insert(key, value),
            };
        }
        let mut tensors: BTreeMap<String, TensorInfo> = BTreeMap::new();
        for (name, raw) in self.tensors {
            let info = raw.check(&name, data_start)?;
            if tensors.contains_key(&name) {
                return Err(Fault::Duplicate { name });
            }
            tensors.insert(name, info);
        }
        let mut ranges: Vec<(&Range<usize>, &str)> =
            tensors.iter().map(|(name, info)| (&info.range, &**name)).collect();
        ranges.sort_by_key(|(range, _)| (range.start, range.end));
        let mut taken = data_start;
        for (range, name) in ranges {
            if range.start != taken {
                let (begin, expected) = ((range.start - data_start) as u64, (taken - data_start) as u64);
                return Err(Fault::Tiling { tensor: name.to_owned(), begin, expected });
            }
            taken = range.end;
        }
        let expected = (taken - data_start) as u64;
        if expected != data_length {
            return Err(Fault::DataLength { expected, actual: data_length });
        }
        Ok(Header { metadata, tensors })
    }
}

impl RawTensor {
    fn check(self, name: &str, data_start: usize) -> Result<TensorInfo, Fault> {
        let problem = |problem: String| Fault::Field { tensor: name.to_owned(), problem };
        let missing = |field: &str| problem(format!("the field `{field}` is missing"));
        if let Some(field) = self.twice {
            return Err(problem(format!("the field `{field}` occurs twice")));
        }
        let dtype = self.dtype.ok_or_else(|| missing("dtype"))?;
        let dtype = Dtype::from_name(&dtype).ok_or_else(|| Fault::UnknownDtype { tensor: name.to_owned(), dtype })?;
        let whole = |field: &str, numbers: Numbers| -> Result<Vec<usize>, Fault> {
            let numbers =
                numbers.0.ok_or_else(|| problem(format!("`{field}` has more than {DIMENSION_LIMIT} numbers")))?;
            let whole = |number: &serde_json::Number| number.as_u64().and_then(|number| usize::try_from(number).ok());
            let fault = |number| problem(format!("`{field}` holds {number}, not a whole number of 0 or more"));
            numbers.iter().map(|number| whole(number).ok_or_else(|| fault(number))).collect()
        };
        let shape = whole("shape", self.shape.ok_or_else(|| missing("shape"))?)?;
        let offsets = whole("data_offsets", self.data_offsets.ok_or_else(|| missing("data_offsets"))?)?;
        let [begin, end] = offsets[..] else {
            return Err(problem(format!("`data_offsets` has {} numbers instead of 2", offsets.len())));
        };
        if begin > end {
            return Err(problem(format!("its range ends at {end}, before it begins at {begin}")));
        }
        if dtype.bytes_of(&shape) != Some(end - begin) {
            let (begin, end) = (begin as u64, end as u64);
            return Err(Fault::Size { tensor: name.to_owned(), dtype, shape, begin, end });
        }
        let place = |offset: usize| {
            offset.checked_add(data_start).ok_or_else(|| problem(format!("offset {offset} is too large")))
        };
        Ok(TensorInfo { dtype, shape, range: place(begin)?..place(end)? })
    }
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = RawHeader;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
                let mut header = RawHeader::default();
                while let Some(name) = map.next_key::<String>()? {
                    if name == METADATA {
                        let MetadataFields(fields) = map.next_value()?;
                        header.second_metadata |= header.metadata.replace(fields).is_some();
                    } else if header.tensors.len() == TENSOR_LIMIT {
                        return Err(serde::de::Error::custom(format!("more than {TENSOR_LIMIT} tensors")));
                    } else {
                        header.tensors.push((name, map.next_value()?));
                    }
                }
                Ok(header)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

struct MetadataFields(Vec<(String, RawText)>);

impl<'de> Deserialize<'de> for MetadataFields {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = MetadataFields;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings under `__metadata__`")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<MetadataFields, A::Error> {
                let mut fields = Vec::new();
                while let Some(field) = map.next_entry()? {
                    fields.push(field);
                }
                Ok(MetadataFields(fields))
            }
            fn visit_unit<E>(self) -> Result<MetadataFields, E> {
                Ok(MetadataFields(Vec::new()))
            }
        }
        deserializer.deserialize_any(Fields)
    }
}

impl<'de> Deserialize<'de> for RawTensor {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields;
        impl<'de> Visitor<'de> for Fields {
            type Value = RawTensor;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object with `dtype`, `shape` and `data_offsets`")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawTensor, A::Error> {
                let mut tensor = RawTensor::default();
                while let Some(field) = map.next_key::<String>()? {
                    let (field, was_there) = match &*field {
                        "dtype" => ("dtype", tensor.dtype.replace(map.next_value()?).is_some()),
                        "shape" => ("shape", tensor.shape.replace(map.next_value()?).is_some()),
                        "data_offsets" => ("data_offsets", tensor.data_offsets.replace(map.next_value()?).is_some()),
                        _ => {
                            map.next_value::<IgnoredAny>()?;
                            continue;
                        }
                    };
                    if was_there {
                        tensor.twice = Some(field);
                    }
                }
                Ok(tensor)
            }
        }
        deserializer.deserialize_map(Fields)
    }
}

impl<'de> Deserialize<'de> for Numbers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Items;
        impl<'de> Visitor<'de> for Items {
            type Value = Numbers;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a list of numbers")
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<Numbers, A::Error> {
                let mut numbers = Vec::new();
                while numbers.len() <= DIMENSION_LIMIT {
                    match seq.next_element()? {
                        Some(number) => numbers.push(number),
                        None => return Ok(Numbers(Some(numbers))),
                    }
                }
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(Numbers(None))
            }
        }
        deserializer.deserialize_seq(Items)
    }
}

impl<'de> Deserialize<'de> for RawText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Any;
        impl<'de> Visitor<'de> for Any {
            type Value = RawText;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a string")
            }
            fn visit_str<E>(self, text: &str) -> Result<RawText, E> {
                Ok(RawText::Text(text.to_owned()))
            }
            fn visit_bool<E>(self, _: bool) -> Result<RawText, E> {
                Ok(RawText::Other("true or false"))
            }
            fn visit_i64<E>(self, _: i64) -> Result<RawText, E> {
                Ok(RawText::Other("a number"))
            }
            fn visit_u64<E>(self, _: u64) -> Result<RawText, E> {
                Ok(RawText::Other("a number"))
            }
            fn visit_f64<E>(self, _: f64) -> Result<RawText, E> {
                Ok(RawText::Other("a number"))
            }
            fn visit_unit<E>(self) -> Result<RawText, E> {
                Ok(RawText::Other("null"))
            }
            fn visit_seq<A: SeqAccess<'de>>(self, mut seq: A) -> Result<RawText, A::Error> {
                while seq.next_element::<IgnoredAny>()?.is_some() {}
                Ok(RawText::Other("a list"))
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawText, A::Error> {
                while map.next_entry::<IgnoredAny, IgnoredAny>()?.is_some() {}
                Ok(RawText::Other("an object"))
            }
        }
        deserializer.deserialize_any(Any)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(json: &str, data: usize) -> Vec<u8> {
        let mut bytes = (json.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(json.as_bytes());
        bytes.resize(bytes.len() + data, 0);
        bytes
    }

    fn refused(json: &str, data: usize) -> String {
        Header::parse(&file(json, data)).unwrap_err().to_string()
    }

    #[test]
    fn every_fault_is_named() {
        let cases = [
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                4,
                "`a` occurs twice",
            ),
            (r#" {"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4, "begins with byte 0x20"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#, 8, "there is a hole"),
            (
                r#"{"a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}}"#,
                8,
                "they overlap",
            ),
            (r#"{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}}"#, 4, "takes 12 bytes"),
            (r#"{"a":{"dtype":"F32","shape":[9223372036854775807,4],"data_offsets":[0,4]}}"#, 4, "64 bits"),
            (r#"{"a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#, 4, "holds -1"),
            (r#"{"a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#, 4, "holds 1.5"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}"#, 4, "before it begins"),
            (r#"{"a":{"dtype":"X9","shape":[1],"data_offsets":[0,4]}}"#, 4, "unknown dtype `X9`"),
            (r#"{"a":{"dtype":"F32","data_offsets":[0,4]}}"#, 4, "`shape` is missing"),
            (r#"{"a":{"dtype":"F32","shape":[1],"shape":[1],"data_offsets":[0,4]}}"#, 4, "`shape` occurs twice"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 5, "followed by other bytes"),
            (r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 3, "cut short"),
            (r#"{"__metadata__":{"k":4}}"#, 0, "`k` holds a number"),
            (r#"{"__metadata__":{"k":"1","k":"2"}}"#, 0, "`k` occurs twice"),
            (r#"{"__metadata__":{},"__metadata__":{}}"#, 0, "`__metadata__` occurs twice"),
            ("{", 0, "malformed"),
        ];
        for (json, data, message) in cases {
            let found = refused(json, data);
            assert!(found.contains(message), "{json}: {found}");
        }
    }

    #[test]
    fn deep_nesting_is_an_error_and_not_a_stack_overflow() {
        let json = format!("{{\"a\":{}", "[".repeat(200_000));
        assert!(refused(&json, 0).contains("malformed"));
        let json = format!("{{\"a\":{{\"x\":{}", "[".repeat(200_000));
        assert!(refused(&json, 0).contains("malformed"));
    }

    #[test]
    fn padding_empty_tensors_and_no_tensors_are_legal() {
        let header =
            Header::parse(&file("{\"a\":{\"dtype\":\"F32\",\"shape\":[0,4],\"data_offsets\":[0,0]}}   ", 0)).unwrap();
        assert_eq!(header.tensors()["a"].shape, [0, 4]);
        assert!(Header::parse(&file("{}", 0)).unwrap().tensors().is_empty());
    }
}
