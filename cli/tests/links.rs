//! The program's dynamic section: `lora` starts in milliseconds and can explain that libtorch is missing, because it is not
//! linked to it.
#![cfg(all(target_os = "linux", target_pointer_width = "64", target_endian = "little"))]

use std::ops::Range;

/// What a libtorch of any build is made of.
const HEAVY: [&str; 8] = ["torch", "c10", "cuda", "cudnn", "nccl", "mkl", "gomp", "stdc++"];

#[test]
fn the_program_links_nothing_of_libtorch() {
    let program = std::fs::read(env!("CARGO_BIN_EXE_lora")).expect("the program was built");
    let needed = needed(&program).expect("an ELF program with a dynamic section");
    assert!(needed.iter().any(|name| name.starts_with("libc.so")), "the reader works: {needed:?}");
    let heavy: Vec<_> = needed.iter().filter(|name| HEAVY.iter().any(|part| name.contains(part))).collect();
    assert!(heavy.is_empty(), "{heavy:?} of {needed:?}");
}

/// The names under `DT_NEEDED` of a 64-bit little-endian ELF file (System V ABI, chapters 4 and 5).
fn needed(file: &[u8]) -> Option<Vec<String>> {
    if file.get(..6)? != b"\x7FELF\x02\x01" {
        return None;
    }
    let segments = Segments::of(file)?;
    let dynamic = file.get(segments.dynamic.clone()?)?;
    let entries = || dynamic.as_chunks::<16>().0.iter().map(|entry| (word(entry, 0), word(entry, 8)));
    let value = |wanted: u64| entries().find(|(tag, _)| *tag == Some(wanted)).and_then(|(_, value)| value);
    let (needed, names, length) = (1, value(5)?, value(10)?); // DT_NEEDED, DT_STRTAB, DT_STRSZ
    let start = segments.offset_of(names)?;
    let names = file.get(start..start.checked_add(usize::try_from(length).ok()?)?)?;
    let name = |at: u64| -> Option<String> {
        let rest = names.get(usize::try_from(at).ok()?..)?;
        let end = rest.iter().position(|byte| *byte == 0)?;
        String::from_utf8(rest[..end].to_vec()).ok()
    };
    entries().filter(|(tag, _)| *tag == Some(needed)).map(|(_, at)| name(at?)).collect()
}

/// Where the parts of the program lie in the file.
struct Segments {
    /// First address, and where its bytes are.
    loaded: Vec<(u64, Range<usize>)>,
    dynamic: Option<Range<usize>>,
}

impl Segments {
    fn of(file: &[u8]) -> Option<Self> {
        let (table, size, count) = (word(file, 0x20)?, half(file, 0x36)?, half(file, 0x38)?);
        let mut segments = Self { loaded: Vec::new(), dynamic: None };
        for index in 0..usize::from(count) {
            let at = usize::try_from(table).ok()? + index * usize::from(size);
            let start = usize::try_from(word(file, at + 8)?).ok()?;
            let bytes = start..start + usize::try_from(word(file, at + 0x20)?).ok()?;
            match file.get(at)? {
                1 => segments.loaded.push((word(file, at + 0x10)?, bytes)), // PT_LOAD
                2 => segments.dynamic = Some(bytes),                        // PT_DYNAMIC
                _ => {}
            }
        }
        Some(segments)
    }

    fn offset_of(&self, address: u64) -> Option<usize> {
        self.loaded.iter().find_map(|(first, bytes)| {
            let inside = usize::try_from(address.checked_sub(*first)?).ok()?;
            (inside < bytes.len()).then_some(bytes.start + inside)
        })
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..)?.first_chunk().map(|raw| u64::from_le_bytes(*raw))
}

fn half(bytes: &[u8], at: usize) -> Option<u16> {
    bytes.get(at..)?.first_chunk().map(|raw| u16::from_le_bytes(*raw))
}
