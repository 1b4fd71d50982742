//! What a writer of gigabytes can tell the system about them.
#![expect(unsafe_code, reason = "the standard library has no calls for it")]

use std::fs::File;

/// Whether writes to a file go past the system's cache from now on, straight to the disk, or no longer; `false` if the file
/// system cannot, and the file is as it was.
///
/// Such writes want memory, places and lengths that are multiples of a sector, and fail with `EINVAL` otherwise.
#[cfg(target_os = "linux")]
pub(super) fn bypass(file: &File, on: bool) -> bool {
    use std::os::fd::AsRawFd as _;
    // SAFETY: The descriptor belongs to `file`, which is open for both calls; flags are plain numbers.
    unsafe {
        let flags = libc::fcntl(file.as_raw_fd(), libc::F_GETFL);
        let wanted = if on { flags | libc::O_DIRECT } else { flags & !libc::O_DIRECT };
        flags >= 0 && libc::fcntl(file.as_raw_fd(), libc::F_SETFL, wanted) == 0
    }
}

/// Other systems have no such switch for a file that is open.
#[cfg(not(target_os = "linux"))]
pub(super) fn bypass(_file: &File, _on: bool) -> bool {
    false
}

/// Makes room on the disk for the first `bytes` of a file, which becomes that long; `false` if that cannot be.
///
/// Writes past the cache that would make a file longer wait for each other; within it they go side by side.
#[cfg(target_os = "linux")]
pub(super) fn reserve(file: &File, bytes: u64) -> bool {
    use std::os::fd::AsRawFd as _;
    let Ok(bytes) = bytes.try_into() else { return false };
    // SAFETY: The descriptor belongs to `file`, which is open for the whole call; no memory is passed.
    unsafe { libc::fallocate(file.as_raw_fd(), 0, 0, bytes) == 0 }
}

/// Other systems do not write past their caches here.
#[cfg(not(target_os = "linux"))]
pub(super) fn reserve(_file: &File, _bytes: u64) -> bool {
    false
}

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
