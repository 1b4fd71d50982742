//! Asking the system to begin writing what it has taken.
#![expect(unsafe_code, reason = "the standard library has no call that begins to write without waiting")]

use std::fs::File;

/// Begins to write `bytes` of a file, from `start` on, without waiting for it.
///
/// Left alone, the system collects gigabytes first, and the disk idles while tensors are computed; the sync at the end then
/// takes as long as if nothing had been done. Only a hint: whatever it returns, that sync follows.
#[cfg(target_os = "linux")]
pub(super) fn begin(file: &File, start: u64, bytes: u64) {
    use std::os::fd::AsRawFd as _;
    if let (Ok(start), Ok(bytes)) = (start.try_into(), bytes.try_into()) {
        // SAFETY: The descriptor belongs to `file`, which is open for the whole call; no memory is passed.
        unsafe { libc::sync_file_range(file.as_raw_fd(), start, bytes, libc::SYNC_FILE_RANGE_WRITE) };
    }
}

/// Begins to write: other systems decide by themselves.
#[cfg(not(target_os = "linux"))]
pub(super) fn begin(_file: &File, _start: u64, _bytes: u64) {}
