//! Files mapped into memory.
//!
//! A base model of several gigabytes is read tensor by tensor without ever being resident as a whole. The price is that
//! the operating system ends the process (SIGBUS) if somebody cuts the file short meanwhile; adapters, which are small,
//! are therefore read instead.
#![expect(unsafe_code, reason = "mapping a file is only sound while nobody changes it, which no type can promise")]

use std::{fs::File, io};

use memmap2::Mmap;

/// The content of a file, mapped.
pub(super) fn map(file: &File) -> io::Result<Mmap> {
    // SAFETY: The map is read-only and only ever viewed as bytes, of which every value is valid. Writers of this
    // program replace files by renaming and never change one in place, so a mapped file keeps its content even when it
    // is its own output; against other programs that write into a model in use, no reader has a defence.
    unsafe { Mmap::map(file) }
}

/// Lets go of the pages that are resident: they are read again when somebody looks.
///
/// Mapped pages count as this process' memory although they are the system's cache, so whoever walks through gigabytes
/// gives them back on the way.
#[cfg(unix)]
pub(super) fn release(map: &Mmap) {
    // SAFETY: The map is read-only and backed by a file, so a dropped page comes back with the same bytes; nothing that
    // was written can be lost. A refusal changes nothing and is ignored.
    let _ = unsafe { map.unchecked_advise(memmap2::UncheckedAdvice::DontNeed) };
}

/// Lets go of the pages that are resident: other systems decide by themselves.
#[cfg(not(unix))]
pub(super) fn release(_map: &Mmap) {}
