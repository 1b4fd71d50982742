//! What a person sees of a folder before a run: the report, and the sheet of pictures.

#![expect(clippy::unwrap_used, reason = "a test that cannot set itself up has failed")]

use std::{fs, path::Path};

use image::{Rgb, RgbImage};
use lora_diffusion::data::{Dataset, ReportOptions, ScanOptions, SheetOptions};

const WIDE: [u32; 2] = [200, 100];

/// Four pictures in two buckets, one file that is none, one caption that is too long.
fn folder() -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, [width, height], caption) in [
        ("a.png", WIDE, "a cat"),
        ("b.png", [64, 64], "a dog, very long"),
        ("c.png", [64, 64], "a cow"),
        ("d.png", [64, 64], "a cow"),
    ] {
        let colour = Rgb([name.as_bytes()[0], 200, 90]);
        let path = folder.path().join(name);
        RgbImage::from_pixel(width, height, colour).save(&path).unwrap();
        fs::write(path.with_extension("txt"), caption).unwrap();
    }
    fs::write(folder.path().join("half.jpg"), "nothing").unwrap();
    folder
}

fn scan(folder: &Path) -> Dataset {
    Dataset::scan(folder, &ScanOptions::new(64), &|_, _| {}).unwrap()
}

fn options(tokens: &dyn Fn(&str) -> usize) -> ReportOptions<'_> {
    ReportOptions { tokens: Some(tokens), token_limit: 3, batch: 2, batches: None, seed: 0 }
}

#[test]
fn a_report_says_where_every_picture_goes() {
    let folder = folder();
    let words = |caption: &str| caption.split(' ').count();
    let report = scan(folder.path()).report(options(&words));
    let text = report.to_string();
    let wanted = format!(
        "{}: 4 pictures (flat folder, .txt captions)\n  \
           captions   4 of their own; the longest has 4 tokens, the end of 1 is not read\n             \
                      “a cat”\n             “a cow”\n  \
           buckets      64 × 64    3 pictures\n               \
                        88 × 40    1 picture\n  \
           cut off    2.3 % on average, at most 9.1 % (a.png)\n  \
           an epoch   3 batches of 2\n\
         skipped: 1 file\n  \
           half.jpg: not a picture: text, “nothing”\n",
        folder.path().display()
    );
    assert_eq!(text, wanted);
}

#[test]
fn a_report_is_a_json_document() {
    let folder = folder();
    let words = |caption: &str| caption.split(' ').count();
    let report = scan(folder.path()).report(ReportOptions { batches: Some(10), ..options(&words) });
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["used"], 4);
    assert_eq!(json["skipped"][0]["path"], "half.jpg");
    assert_eq!(json["pictures"][0]["path"], "a.png");
    assert_eq!(json["pictures"][0]["size"], serde_json::json!(WIDE));
    assert_eq!(json["pictures"][1]["tokens"], 4);
    assert_eq!(json["captions"]["truncated"], 1);
    let shown: u64 = json["pictures"].as_array().unwrap().iter().map(|line| line["exposures"].as_u64().unwrap()).sum();
    assert_eq!(shown, 20, "ten batches of two show twenty pictures");
}

#[test]
fn a_name_cannot_write_over_the_terminal() {
    let folder = folder();
    fs::write(folder.path().join("evil\u{1b}[2J.md"), "text").unwrap();
    let report = scan(folder.path()).report(options(&|_| 1)).to_string();
    assert!(report.contains("evil\u{fffd}[2J.md") && !report.contains('\u{1b}'), "{report}");
}

#[test]
fn the_sheet_darkens_what_is_cut_off() {
    let folder = folder();
    let sheet = scan(folder.path()).sheet(SheetOptions { side: 100, ..Default::default() }).unwrap();
    // The wide picture is 100 × 50 on the sheet, in the middle of its place; its bucket is wider still.
    let bright = |x: u32, y: u32| sheet.get_pixel(8 + x, 8 + y)[1] >= 190;
    assert!(!bright(50, 25) && !bright(50, 74), "its upper and lower edges are cut off");
    assert!(bright(50, 50) && bright(0, 50) && bright(99, 50), "the rest is kept");
    assert!(bright(108 + 50, 0) && bright(108 + 50, 99), "nothing is cut off from the square one beside it");
}
