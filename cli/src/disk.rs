//! Free space of a file system.
#![expect(unsafe_code, reason = "the standard library has no call for free disk space")]

use std::{io, path::Path};

/// Bytes that this user may still write on the file system of `path`, which must exist.
///
/// # Errors
/// If the file system cannot be asked.
#[cfg(unix)]
pub fn free_bytes(path: &Path) -> io::Result<u64> {
    use std::{ffi::CString, mem::MaybeUninit, os::unix::ffi::OsStrExt as _};
    let path = CString::new(path.as_os_str().as_bytes())?;
    let mut answer = MaybeUninit::<libc::statvfs>::uninit();
    // SAFETY: `path` is a string that ends in zero and outlives the call; `answer` has room for the struct.
    if unsafe { libc::statvfs(path.as_ptr(), answer.as_mut_ptr()) } != 0 {
        return Err(io::Error::last_os_error());
    }
    // SAFETY: the call succeeded, so it has filled the struct in.
    let answer = unsafe { answer.assume_init() };
    // The widths of the two fields differ between systems.
    #[allow(clippy::unnecessary_cast, clippy::useless_conversion)]
    Ok((answer.f_bavail as u64).saturating_mul(answer.f_frsize as u64))
}

/// Bytes that this user may still write on the file system of `path`: not known here.
///
/// # Errors
/// Always.
#[cfg(not(unix))]
pub fn free_bytes(_path: &Path) -> io::Result<u64> {
    Err(io::Error::from(io::ErrorKind::Unsupported))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_has_free_space_and_a_missing_one_is_an_error() {
        assert!(free_bytes(Path::new(".")).unwrap() > 0);
        assert!(free_bytes(Path::new("./does not exist")).is_err());
    }
}
