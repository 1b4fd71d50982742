//! Two names that change places in one step, for folders: renaming alone cannot put one over another that holds files.
#![expect(unsafe_code, reason = "the standard library has no call that exchanges two names")]

use std::{io, path::Path};

/// Makes `new` and `old` change places; whoever looks sees the state before or the one after.
///
/// # Errors
/// If the file system cannot do that.
#[cfg(target_os = "linux")]
pub(super) fn exchange(new: &Path, old: &Path) -> io::Result<()> {
    use std::{ffi::CString, os::unix::ffi::OsStrExt as _};
    let [new, old] = [new, old].map(|path| CString::new(path.as_os_str().as_bytes()));
    let (new, old) = (new?, old?);
    // SAFETY: Both strings end in zero and outlive the call, which only reads them.
    match unsafe { libc::renameat2(libc::AT_FDCWD, new.as_ptr(), libc::AT_FDCWD, old.as_ptr(), libc::RENAME_EXCHANGE) }
    {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Makes `new` and `old` change places, with a moment in between in which `old` is missing: there is no call for it here.
///
/// # Errors
/// If one of the three renames fails.
#[cfg(not(target_os = "linux"))]
pub(super) fn exchange(new: &Path, old: &Path) -> io::Result<()> {
    let aside = new.with_extension("old");
    std::fs::rename(old, &aside)?;
    std::fs::rename(new, old)?;
    std::fs::rename(&aside, new)
}
