//! Folders as people keep them: every layout, odd names, odd captions, mistakes; each file used or listed.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::{ffi::OsStr, fs, os::unix::ffi::OsStrExt, path::Path};

use lora_diffusion::data::{CaptionSource, Dataset, Error, Masks, NoteKind, ScanOptions};
use tempfile::TempDir;

/// Makes a folder from names and contents; `.png` and the like with no content become pictures, all different.
fn folder(files: &[(&str, &[u8])]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (at, (name, content)) in files.iter().enumerate() {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        let picture = content.is_empty() && [".png", ".jpg", ".webp"].iter().any(|end| name.ends_with(end));
        if picture { draw(&path, at as u8) } else { fs::write(path, content).unwrap() }
    }
    folder
}

fn draw(path: &Path, number: u8) {
    let picture = image::RgbImage::from_fn(64, 64, |x, y| image::Rgb([x as u8, y as u8, number]));
    let format = image::ImageFormat::from_path(path).unwrap_or(image::ImageFormat::Png);
    picture.save_with_format(path, format).unwrap();
}

fn scan_with(root: &Path, change: impl FnOnce(&mut ScanOptions)) -> Result<Dataset, Error> {
    let mut options = ScanOptions::new(64);
    change(&mut options);
    Dataset::scan(root, &options, &|_, _| {})
}

fn scan(root: &Path) -> Result<Dataset, Error> {
    scan_with(root, |_| {})
}

/// Name, caption and repeats of every used picture.
fn used(dataset: &Dataset) -> Vec<(&str, &str, u32)> {
    dataset.pictures.iter().map(|picture| (&*picture.name, &*picture.caption, picture.repeats)).collect()
}

fn skipped(dataset: &Dataset) -> Vec<(&str, &str)> {
    dataset.skipped.iter().map(|file| (&*file.path, &*file.reason)).collect()
}

fn noted(dataset: &Dataset, kind: NoteKind) -> Vec<&str> {
    let notes = dataset.notes.iter().filter(|note| note.kind == kind);
    notes.flat_map(|note| note.files.iter().map(String::as_str)).collect()
}

#[test]
fn a_flat_folder_has_captions_beside_its_pictures() {
    let folder = folder(&[
        ("b.png", b""),
        ("b.txt", b"a dog"),
        ("a.jpg", b""),
        ("a.caption", b"a cat\n"),
        ("c.webp", b""),
        ("c.webp.txt", b"a cow"),
    ]);
    let dataset = scan(folder.path()).unwrap();
    assert_eq!(used(&dataset), [("a.jpg", "a cat", 1), ("b.png", "a dog", 1), ("c.webp", "a cow", 1)]);
    assert_eq!(dataset.layout, "flat folder, .caption and .txt captions");
    assert!(dataset.skipped.is_empty() && dataset.notes.is_empty());
}

#[test]
fn kohya_folders_repeat_and_captions_go_before_their_name() {
    let folder = folder(&[
        ("img/10_sks dog/a.png", b""),
        ("img/10_sks dog/b.png", b""),
        ("img/10_sks dog/b.txt", b"a photo of a dog"),
        ("img/3_cat/c.png", b""),
        ("img/0_off/d.png", b""),
        ("log/x.txt", b"nothing"),
    ]);
    let dataset = scan(folder.path()).unwrap();
    assert_eq!(
        used(&dataset),
        [
            ("img/10_sks dog/a.png", "sks dog", 10),
            ("img/10_sks dog/b.png", "a photo of a dog", 10),
            ("img/3_cat/c.png", "cat", 3)
        ]
    );
    assert_eq!(
        skipped(&dataset),
        [("img/0_off/d.png", "its folder says 0 repeats"), ("log/x.txt", "a caption without its picture")]
    );
    assert_eq!(dataset.layout, "kohya folders (cat × 3, sks dog × 10), .txt captions");
    assert_eq!(dataset.exposures(), 23);
}

#[test]
fn a_single_kohya_folder_may_be_pointed_at() {
    let folder = folder(&[("5_neon/a.png", b"")]);
    let dataset = scan(&folder.path().join("5_neon")).unwrap();
    assert_eq!(used(&dataset), [("a.png", "neon", 5)]);
    assert_eq!(dataset.pictures[0].caption_source, CaptionSource::Concept);
}

#[test]
fn a_year_is_no_number_of_repeats() {
    let folder = folder(&[("2024_holidays/a.png", b""), ("2024_holidays/a.txt", b"the sea")]);
    assert_eq!(used(&scan(folder.path()).unwrap()), [("2024_holidays/a.png", "the sea", 1)]);
}

#[test]
fn a_table_gives_captions_also_to_pictures_in_folders_below() {
    let table = concat!(
        r#"{"file_name": "a.png", "text": "a cat"}"#,
        "\n",
        r#"{"file_name": "sub/b.png", "text": "a dog"}"#,
        "\n",
        r#"{"file_name": "gone.png", "text": "nothing"}"#,
        "\n",
        r#"{"file_name": "../out.png", "text": "outside"}"#,
        "\n",
        "oops\n"
    );
    let folder = folder(&[("metadata.jsonl", table.as_bytes()), ("a.png", b""), ("sub/b.png", b""), ("c.png", b"")]);
    let dataset = scan(folder.path()).unwrap();
    let name = folder.path().file_name().unwrap().to_str().unwrap();
    assert_eq!(used(&dataset), [("a.png", "a cat", 1), ("c.png", name, 1), ("sub/b.png", "a dog", 1)]);
    let skipped = skipped(&dataset);
    assert_eq!(skipped[0], ("metadata.jsonl:3", "`gone.png` is not there"));
    assert_eq!(skipped[1], ("metadata.jsonl:4", "`../out.png` is outside of the folder"));
    assert!(skipped[2].0 == "metadata.jsonl:5" && skipped[2].1.starts_with("not a JSON object"));
    assert_eq!(noted(&dataset, NoteKind::CaptionMissing), ["c.png"]);
    assert!(dataset.layout.contains("metadata.jsonl"), "{}", dataset.layout);
}

#[test]
fn captions_match_across_unicode_forms_and_odd_names() {
    let composed = "caf\u{e9}";
    let decomposed = "cafe\u{301}";
    let long = "x".repeat(250);
    let odd = [composed, "🐈 cat", "with 'quotes' \"two\"", "new\nline", "dots.in.name", &long];
    let mut files: Vec<(String, &[u8])> = Vec::new();
    for name in odd {
        files.push((format!("{name}.png"), b""));
        let caption = if name == composed { decomposed } else { name };
        files.push((format!("{caption}.txt"), b"a caption of its own"));
    }
    let files: Vec<(&str, &[u8])> = files.iter().map(|(name, content)| (&**name, *content)).collect();
    let folder = folder(&files);
    let path = folder.path().join(OsStr::from_bytes(b"not \xff utf8.png"));
    draw(&path, 200);
    fs::write(path.with_extension("txt"), "a caption of its own").unwrap();
    let dataset = scan(folder.path()).unwrap();
    assert_eq!(dataset.pictures.len(), 7);
    for picture in &dataset.pictures {
        assert_eq!(picture.caption, "a caption of its own", "{}", picture.name);
    }
}

#[test]
fn captions_of_every_encoding_are_read_and_missing_ones_are_said() {
    let utf16: Vec<u8> = [0xff, 0xfe].into_iter().chain("a café".encode_utf16().flat_map(u16::to_le_bytes)).collect();
    let large = "word ".repeat(20_000);
    let folder = folder(&[
        ("bom.png", b""),
        ("bom.txt", "\u{feff}a café".as_bytes()),
        ("crlf.png", b""),
        ("crlf.txt", b"a cat\r\nred\r\n"),
        ("empty.png", b""),
        ("empty.txt", b" \r\n"),
        ("huge.png", b""),
        ("huge.txt", &vec![b'x'; 2 << 20]),
        ("large.png", b""),
        ("large.txt", large.as_bytes()),
        ("latin.png", b""),
        ("latin.txt", b"a caf\xe9"),
        ("none.png", b""),
        ("utf16.png", b""),
        ("utf16.txt", &utf16),
    ]);
    let dataset = scan_with(folder.path(), |options| options.trigger = Some("sks".into())).unwrap();
    let captions: Vec<&str> = dataset.pictures.iter().map(|picture| &*picture.caption).collect();
    let large = format!("sks, {}", large.trim());
    assert_eq!(captions, ["sks, a café", "sks, a cat, red", "sks", "sks", &large, "sks, a café", "sks", "sks, a café"]);
    assert_eq!(noted(&dataset, NoteKind::CaptionEncoding), ["latin.png", "utf16.png"]);
    assert_eq!(noted(&dataset, NoteKind::CaptionEmpty), ["empty.png", "huge.png"]);
    assert_eq!(noted(&dataset, NoteKind::CaptionMissing), ["huge.png", "none.png"]);
}

#[test]
fn no_caption_at_all_is_an_error_with_a_way_out() {
    let folder = folder(&[("a.png", b""), ("b.png", b""), ("a.text", b"wrong extension")]);
    let error = scan(folder.path()).unwrap_err();
    assert!(matches!(error, Error::NoCaptions { pictures: 2, .. }), "{error}");
    assert!(error.to_string().ends_with("a text file belongs to none of them (a.text)"), "{error}");
    assert!(error.hint().unwrap().contains("--trigger"));
    let dataset = scan_with(folder.path(), |options| options.trigger = Some("in sks style".into())).unwrap();
    assert_eq!(used(&dataset), [("a.png", "in sks style", 1), ("b.png", "in sks style", 1)]);
}

#[test]
fn a_place_for_a_trigger_wants_one() {
    let folder = folder(&[("a.png", b""), ("a.txt", b"a [trigger] cat")]);
    let error = scan(folder.path()).unwrap_err();
    assert!(matches!(error, Error::NoTrigger { count: 1, .. }), "{error}");
    let dataset = scan_with(folder.path(), |options| options.trigger = Some("sks".into())).unwrap();
    assert_eq!(used(&dataset), [("a.png", "a sks cat", 1)]);
}

#[test]
fn leftovers_are_ignored_and_everything_else_is_listed() {
    let folder = folder(&[
        ("a.png", b""),
        ("a.txt", b"a cat"),
        (".DS_Store", b"x"),
        ("Thumbs.db", b"x"),
        ("desktop.ini", b"x"),
        (".hidden/b.png", b""),
        ("__MACOSX/c.png", b""),
        ("notes.md", b"# notes"),
        ("lonely.txt", b"no picture"),
        ("weights.safetensors", &[9, 0, 0, 0, 0, 0, 0, 0, 200]),
        ("no_extension", b""),
        ("run/config.toml", b""),
        ("run/metrics.jsonl", b""),
        ("run/samples/d.png", b""),
    ]);
    fs::remove_file(folder.path().join("no_extension")).unwrap();
    draw(&folder.path().join("no_extension"), 77);
    std::os::unix::fs::symlink("nowhere", folder.path().join("broken.png")).unwrap();
    std::os::unix::fs::symlink(".", folder.path().join("loop")).unwrap();
    let dataset = scan_with(folder.path(), |options| options.trigger = Some("x".into())).unwrap();
    assert_eq!(used(&dataset), [("a.png", "x, a cat", 1), ("no_extension", "x", 1)]);
    assert_eq!(dataset.ignored, 5);
    let skipped = skipped(&dataset);
    let names: Vec<&str> = skipped.iter().map(|(name, _)| *name).collect();
    assert_eq!(names, ["broken.png", "lonely.txt", "loop", "notes.md", "run", "weights.safetensors"]);
    assert_eq!(skipped[4].1, "a folder of a training run");
}

#[test]
fn wrong_places_are_explained() {
    let folder = folder(&[("sub/deeper/readme.md", b"hello"), ("one/a.png", b""), ("one/a.txt", b"a cat")]);
    let at = |path: &str| scan(&folder.path().join(path)).unwrap_err();
    assert!(matches!(at("nowhere"), Error::NotFound { .. }));
    let file = at("one/a.png");
    assert!(matches!(file, Error::NotAFolder { picture: true, .. }) && file.hint().unwrap().contains("one"), "{file}");
    let empty = at("sub");
    assert!(empty.to_string().contains("1 other file") && empty.to_string().contains("1 folder"), "{empty}");
    assert!(empty.hint().unwrap().contains("metadata.jsonl") && empty.hint().unwrap().contains("10_style"));
    fs::create_dir(folder.path().join("empty")).unwrap();
    assert!(at("empty").to_string().contains("it is empty"));
}

#[test]
fn tiny_pictures_are_skipped_and_small_ones_noted() {
    let folder = folder(&[("a.png", b""), ("a.txt", b"a cat")]);
    for (name, width, height) in [("dot.png", 1, 1), ("line.png", 3, 4000), ("wide.png", 16_000, 200)] {
        image::RgbImage::new(width, height).save(folder.path().join(name)).unwrap();
    }
    let dataset = scan_with(folder.path(), |options| {
        *options = ScanOptions { trigger: Some("x".into()), ..ScanOptions::new(512) }
    });
    let dataset = dataset.unwrap();
    let used: Vec<&str> = dataset.pictures.iter().map(|picture| &*picture.name).collect();
    assert_eq!(used, ["a.png", "wide.png"]);
    assert!(skipped(&dataset).iter().all(|(_, reason)| reason.contains("too few")), "{:?}", skipped(&dataset));
    assert_eq!(noted(&dataset, NoteKind::Enlarged), ["a.png"]);
    assert_eq!(noted(&dataset, NoteKind::Cropped), ["wide.png"]);
}

#[test]
fn masks_are_found_beside_their_pictures_or_where_they_are_said_to_be() {
    let folder = folder(&[
        ("a.png", b""),
        ("b.png", b""),
        ("c.png", b""),
        ("masks/a.png", b""),
        ("b-masklabel.png", b""),
        ("masks/z.png", b""),
        ("elsewhere/c.png", b""),
    ]);
    let masked = |dataset: &Dataset| -> Vec<String> {
        dataset.pictures.iter().filter(|picture| picture.mask.is_some()).map(|picture| picture.name.clone()).collect()
    };
    let dataset = scan_with(folder.path(), |options| options.trigger = Some("x".into())).unwrap();
    assert_eq!(masked(&dataset), ["a.png", "b.png"]);
    assert_eq!(skipped(&dataset), [("masks/z.png", "a mask without its picture")]);
    let dataset = scan_with(folder.path(), |options| {
        options.trigger = Some("x".into());
        options.masks = Masks::Folder(folder.path().join("elsewhere"));
    });
    assert_eq!(masked(&dataset.unwrap()), ["c.png"]);

    // A picture whose mask is broken would be learnt from where it must not be.
    fs::write(folder.path().join("masks/a.png"), b"broken").unwrap();
    let dataset = scan_with(folder.path(), |options| options.trigger = Some("x".into())).unwrap();
    assert_eq!(masked(&dataset), ["b.png"]);
    assert!(skipped(&dataset)[0].1.starts_with("its mask cannot be used"), "{:?}", skipped(&dataset));
}

#[test]
fn regularisation_pictures_are_shown_as_often_as_the_others() {
    let data = folder(&[("3_sks/a.png", b""), ("2_sks/b.png", b"")]);
    let other = folder(&[("1_dog/c.png", b""), ("1_dog/d.png", b""), ("1_dog/e.png", b"")]);
    let dataset = scan_with(data.path(), |options| {
        options.regularisation = Some(other.path().into());
        options.regularisation_weight = 0.5;
    });
    let dataset = dataset.unwrap();
    let shown: Vec<(u32, f64)> = dataset.pictures.iter().map(|picture| (picture.repeats, picture.weight)).collect();
    assert_eq!(shown, [(2, 1.0), (3, 1.0), (2, 0.5), (2, 0.5), (1, 0.5)]);
    assert_eq!(dataset.pictures[2].caption, "dog");
}

#[test]
fn the_hash_of_a_dataset_follows_what_training_sees() {
    let folder = folder(&[("a.png", b""), ("a.txt", b"a cat"), ("b.png", b""), ("b.txt", b"a dog")]);
    let first = scan(folder.path()).unwrap().hash();
    fs::write(folder.path().join("notes.md"), "irrelevant").unwrap();
    assert_eq!(scan(folder.path()).unwrap().hash(), first);
    fs::write(folder.path().join("b.txt"), "a wolf").unwrap();
    assert_ne!(scan(folder.path()).unwrap().hash(), first);
}

/// F18: ten thousand small files; the floor is set low for machines that are busy with other things.
#[test]
fn many_pictures_are_scanned_quickly() {
    let folder = folder(&[("a.png", b"")]);
    let bytes = fs::read(folder.path().join("a.png")).unwrap();
    for number in 0..3000 {
        let path = folder.path().join(format!("{number:05}.png"));
        fs::write(&path, &bytes).unwrap();
        fs::write(path.with_extension("txt"), format!("picture {number}")).unwrap();
    }
    let start = std::time::Instant::now();
    let dataset = scan_with(folder.path(), |options| options.verify = false).unwrap();
    let seconds = start.elapsed().as_secs_f64();
    println!("{:.0} pictures a second", dataset.pictures.len() as f64 / seconds);
    assert_eq!(dataset.pictures.len(), 3001);
    assert!(seconds < 6.0, "{seconds} s for 3001 pictures");
}
