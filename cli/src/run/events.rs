//! TensorBoard event files, written by hand: the format is small and its Rust writers are unmaintained.
//!
//! A file is a row of TFRecords, each an `Event` message: `length u64 · masked crc32c of the length · data · masked
//! crc32c of the data`, little endian. Field numbers are those of `event.proto`, `summary.proto` and `tensor.proto` in
//! TensorFlow. `tests/fixtures/read_events.py` reads such a file with the real reader.

use std::{
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use super::RunError;

/// Writes one `events.out.tfevents.*` file.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
    /// Seconds since 1970.
    clock: fn() -> f64,
}

impl EventWriter {
    /// A new file in `folder`. A run that goes on after `step` steps has TensorBoard drop what older files hold beyond.
    ///
    /// # Errors
    /// If the file cannot be written.
    pub fn create(folder: &Path, step: u64) -> Result<Self, RunError> {
        Self::with_clock(folder, step, now)
    }

    fn with_clock(folder: &Path, step: u64, clock: fn() -> f64) -> Result<Self, RunError> {
        let now = clock();
        let stem = format!("events.out.tfevents.{:010}.lora.{}", now as u64, std::process::id());
        // TensorBoard reads the files in the order of their names; two in one second keep their order by the suffix.
        let (path, file) = (0..1000)
            .map(|number| folder.join(format!("{stem}.{number}")))
            .find_map(|path| match File::create_new(&path) {
                Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => None,
                result => Some((path, result)),
            })
            .ok_or_else(|| RunError::Exists { path: folder.join(&stem) })?;
        let file = file.map_err(RunError::write(&path))?;
        let mut writer = Self { path, file, clock };
        let mut version = header(now, 0);
        message(&mut version, 3, b"brain.Event:2");
        writer.record(&version)?;
        if step > 0 {
            let mut start = header(now, step + 1);
            let mut session = Vec::new();
            number(&mut session, 1, 1); // SessionStatus.START
            message(&mut start, 7, &session);
            writer.record(&start)?;
        }
        Ok(writer)
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// One point of the curve `tag`.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn scalar(&mut self, step: u64, tag: &str, value: f64) -> Result<(), RunError> {
        let mut point = Vec::new();
        message(&mut point, 1, tag.as_bytes());
        key(&mut point, 2, 5);
        point.extend((value as f32).to_le_bytes());
        self.summary(step, &point)
    }

    /// A text, shown as Markdown.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn text(&mut self, step: u64, tag: &str, text: &str) -> Result<(), RunError> {
        let (mut plugin, mut metadata) = (Vec::new(), Vec::new());
        message(&mut plugin, 1, b"text");
        message(&mut metadata, 1, &plugin);
        let (mut axis, mut shape, mut tensor) = (Vec::new(), Vec::new(), Vec::new());
        number(&mut axis, 1, 1);
        message(&mut shape, 2, &axis);
        number(&mut tensor, 1, 7); // DT_STRING
        message(&mut tensor, 2, &shape);
        message(&mut tensor, 8, text.as_bytes());
        let mut value = Vec::new();
        message(&mut value, 1, tag.as_bytes());
        message(&mut value, 8, &tensor);
        message(&mut value, 9, &metadata);
        self.summary(step, &value)
    }

    /// A picture of `width` × `height` pixels, given as a PNG file's bytes.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn image(&mut self, step: u64, tag: &str, [width, height]: [u32; 2], png: &[u8]) -> Result<(), RunError> {
        let mut image = Vec::new();
        number(&mut image, 1, height.into());
        number(&mut image, 2, width.into());
        number(&mut image, 3, 3); // RGB
        message(&mut image, 4, png);
        let mut value = Vec::new();
        message(&mut value, 1, tag.as_bytes());
        message(&mut value, 4, &image);
        self.summary(step, &value)
    }

    fn summary(&mut self, step: u64, value: &[u8]) -> Result<(), RunError> {
        let mut summary = Vec::new();
        message(&mut summary, 1, value);
        let mut event = header((self.clock)(), step);
        message(&mut event, 5, &summary);
        self.record(&event)
    }

    fn record(&mut self, data: &[u8]) -> Result<(), RunError> {
        let length = (data.len() as u64).to_le_bytes();
        let mut record = Vec::with_capacity(data.len() + 16);
        record.extend(length);
        record.extend(masked_crc(&length).to_le_bytes());
        record.extend(data);
        record.extend(masked_crc(data).to_le_bytes());
        // One write a record: a crash leaves a prefix of it at most, which the reader passes over.
        self.file.write_all(&record).map_err(RunError::write(&self.path))
    }
}

/// The first two fields of an `Event`: wall time and step.
fn header(wall_time: f64, step: u64) -> Vec<u8> {
    let mut event = Vec::new();
    key(&mut event, 1, 1);
    event.extend(wall_time.to_le_bytes());
    number(&mut event, 2, step);
    event
}

/// A field's number and wire type: 0 varint, 1 eight bytes, 2 length-delimited, 5 four bytes.
fn key(into: &mut Vec<u8>, field: u64, wire: u64) {
    varint(into, field << 3 | wire);
}

fn number(into: &mut Vec<u8>, field: u64, value: u64) {
    key(into, field, 0);
    varint(into, value);
}

fn message(into: &mut Vec<u8>, field: u64, bytes: &[u8]) {
    key(into, field, 2);
    varint(into, bytes.len() as u64);
    into.extend(bytes);
}

fn varint(into: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        into.push(value as u8 | 0x80);
        value >>= 7;
    }
    into.push(value as u8);
}

/// TFRecord's checksum: crc32c, turned and shifted so that a checksum of checksums does not degenerate.
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn now() -> f64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |time| time.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes a file apart again, checking every checksum.
    fn records(bytes: &[u8]) -> Vec<&[u8]> {
        let mut rest = bytes;
        let mut records = Vec::new();
        while !rest.is_empty() {
            let (length, tail) = rest.split_at(8);
            let size = u64::from_le_bytes(length.try_into().unwrap()) as usize;
            assert_eq!(tail[..4], masked_crc(length).to_le_bytes());
            let data = &tail[4..4 + size];
            assert_eq!(tail[4 + size..8 + size], masked_crc(data).to_le_bytes());
            records.push(data);
            rest = &tail[8 + size..];
        }
        records
    }

    /// The fixture is what `tests/fixtures/read_events.py` has read with TensorBoard's own reader; see there.
    #[test]
    fn a_file_is_the_one_that_tensorboard_has_read() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::with_clock(folder.path(), 0, || 1_700_000_000.5).unwrap();
        for step in [1, 200, 3_000_000] {
            writer.scalar(step, "loss", 1.0 / step as f64).unwrap();
        }
        writer.text(0, "config", "rank = 16\n\nlängst").unwrap();
        writer.image(100, "samples/a house", [1, 1], &crate::report::tests::PIXEL).unwrap();
        let written = std::fs::read(writer.path()).unwrap();
        assert!(written == include_bytes!("../../tests/fixtures/events.tfevents"));
    }

    #[test]
    fn the_version_record_is_what_tensorflow_writes() {
        // Length and checksum of the length as in a file of tf.summary.create_file_writer: 24 bytes, a3 7f 4b 22.
        assert_eq!(masked_crc(&24u64.to_le_bytes()).to_le_bytes(), [0xa3, 0x7f, 0x4b, 0x22]);
    }

    #[test]
    fn a_scalar_is_a_float_under_its_tag() {
        let folder = tempfile::tempdir().unwrap();
        let mut writer = EventWriter::create(folder.path(), 0).unwrap();
        writer.scalar(300, "loss", 0.5).unwrap();
        let bytes = std::fs::read(writer.path()).unwrap();
        let records = records(&bytes);
        assert_eq!(records.len(), 2);
        assert!(records[0].ends_with(b"\x1a\x0dbrain.Event:2"));
        let point = records[1];
        assert_eq!(&point[9..12], [0x10, 0xac, 0x02]); // step 300
        let summary = [&[0x2a, 13, 0x0a, 11, 0x0a, 4][..], b"loss", &[0x15], &0.5f32.to_le_bytes()].concat();
        assert_eq!(&point[12..], summary);
    }

    #[test]
    fn a_resumed_run_starts_a_new_file_that_drops_later_steps() {
        let folder = tempfile::tempdir().unwrap();
        EventWriter::create(folder.path(), 0).unwrap();
        let second = EventWriter::create(folder.path(), 20).unwrap();
        let bytes = std::fs::read(second.path()).unwrap();
        let records = records(&bytes);
        assert_eq!(&records[1][9..], [0x10, 21, 0x3a, 2, 0x08, 1]);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
