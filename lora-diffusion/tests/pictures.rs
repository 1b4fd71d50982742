//! Every kind of picture file that a training folder has been seen to hold, each with the right outcome.
//!
//! `fixtures/pictures/make.py` makes the files and says what a person sees in them.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    time::Instant,
};

use lora_diffusion::data::{
    Alpha, BucketRule, Dataset, Error, NoteKind, ScanOptions,
    decode::{decode, header},
};
use serde::Deserialize;

/// Largest difference of a mean of 8-bit values: rounding, and decoders of lossy formats, differ by less.
const MEAN_TOLERANCE: f64 = 1.0;

#[derive(Deserialize)]
struct Expected {
    good: BTreeMap<String, [[f64; 3]; 4]>,
    bad: BTreeMap<String, String>,
}

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/pictures")
}

fn expected() -> Expected {
    serde_json::from_slice(&fs::read(folder().join("expected.json")).unwrap()).unwrap()
}

/// Mean of red, green and blue in each quadrant.
fn quadrants(picture: &image::RgbImage) -> [[f64; 3]; 4] {
    let (width, height) = (picture.width() / 2, picture.height() / 2);
    [(0, 0), (width, 0), (0, height), (width, height)].map(|(left, top)| {
        let mut sum = [0.0; 3];
        for pixel in image::imageops::crop_imm(picture, left, top, width, height).to_image().pixels() {
            (0..3).for_each(|channel| sum[channel] += f64::from(pixel[channel]));
        }
        sum.map(|sum| sum / f64::from(width * height))
    })
}

#[test]
fn good_pictures_look_as_a_person_sees_them() {
    for (name, means) in expected().good {
        let bytes = fs::read(folder().join(&name)).unwrap();
        let decoded = decode(&bytes, Alpha::White).unwrap_or_else(|error| panic!("{name}: {error}"));
        let size = header(&bytes).unwrap().size;
        assert_eq!(decoded.pixels.dimensions(), size.into(), "{name}: the header says the upright size");
        for (quadrant, (got, wanted)) in quadrants(&decoded.pixels).iter().zip(&means).enumerate() {
            for channel in 0..3 {
                let off = (got[channel] - wanted[channel]).abs();
                assert!(off <= MEAN_TOLERANCE, "{name}, quadrant {quadrant}: {got:?}, expected {wanted:?}");
            }
        }
    }
}

#[test]
fn bad_pictures_are_refused_by_what_they_are() {
    for (name, words) in expected().bad {
        let bytes = fs::read(folder().join(&name)).unwrap();
        let start = Instant::now();
        let error = decode(&bytes, Alpha::White).map(|_| ()).expect_err(&name).to_string();
        assert!(error.contains(&words), "{name}: “{error}” does not say “{words}”");
        assert!(start.elapsed().as_secs_f64() < 1.0, "{name} takes {:?}", start.elapsed());
    }
}

/// Largest resident memory of this process so far, in bytes (proc_pid_status(5)).
fn peak_memory() -> u64 {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    kilobytes.unwrap_or(0) * 1024
}

#[test]
fn bombs_are_refused_by_their_header_and_take_no_memory() {
    let before = peak_memory();
    for name in expected().bad.keys().filter(|name| name.starts_with("bomb")) {
        let bytes = fs::read(folder().join(name)).unwrap();
        assert!(header(&bytes).is_err(), "{name}");
        assert!(decode(&bytes, Alpha::White).is_err(), "{name}");
    }
    let grown = (peak_memory() - before) >> 20;
    assert!(grown < 100, "peak memory grew by {grown} MiB");
}

/// A folder with every one of them: all are used or listed, none is lost, none ends the scan.
#[test]
fn a_folder_of_everything_is_scanned() {
    let mut options = ScanOptions::new(64);
    options.buckets = BucketRule { min: 32, max: 128, step: 8, resolution: 64, no_upscale: false };
    options.trigger = Some("a test".into());
    let dataset = Dataset::scan(&folder(), &options, &|_, _| {}).unwrap();
    let expected = expected();
    let used: Vec<&str> = dataset.pictures.iter().map(|picture| &*picture.name).collect();
    assert_eq!(used, expected.good.keys().map(String::as_str).collect::<Vec<_>>());
    let bad: Vec<&str> = dataset.skipped.iter().filter(|file| file.bad).map(|file| &*file.path).collect();
    assert_eq!(bad, expected.bad.keys().map(String::as_str).collect::<Vec<_>>());
    let others: Vec<&str> = dataset.skipped.iter().filter(|file| !file.bad).map(|file| &*file.path).collect();
    assert_eq!(others, ["expected.json", "make.py"]);

    let noted = |kind: NoteKind| -> Vec<&str> {
        let notes = dataset.notes.iter().filter(|note| note.kind == kind);
        notes.flat_map(|note| note.files.iter().map(String::as_str)).collect()
    };
    assert_eq!(noted(NoteKind::Animated), ["animated.gif", "animated.png", "animated.webp"]);
    assert_eq!(noted(NoteKind::WrongExtension), ["png_named.jpg", "webp_named.png"]);
    assert_eq!(noted(NoteKind::Damaged), ["few_bytes_short.jpg"]);
    assert_eq!(noted(NoteKind::Transparent), ["gray_alpha.png", "palette_transparent.png", "rgba.png", "rgba.webp"]);
    assert!(noted(NoteKind::Duplicate).contains(&"rgb.png = png_named.jpg"), "{:?}", noted(NoteKind::Duplicate));

    let Err(Error::TooManyBad { bad, total, .. }) = dataset.refuse_if_bad() else { panic!("half of them are bad") };
    assert_eq!((bad, total), (expected.bad.len(), expected.bad.len() + expected.good.len()));
}

#[test]
fn transparency_can_be_black_or_a_mask() {
    let bytes = fs::read(folder().join("palette_transparent.png")).unwrap();
    let black = decode(&bytes, Alpha::Black).unwrap();
    assert_eq!(black.pixels.get_pixel(13, 3).0, [0, 0, 0]);
    let mask = decode(&bytes, Alpha::Mask).unwrap();
    assert_eq!(mask.pixels.get_pixel(13, 3).0, [255, 255, 255]);
    assert_eq!(mask.opacity.unwrap().get_pixel(13, 3).0, [0]);
}
