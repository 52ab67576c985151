//! The open files and the memory that the system grants this process.

/// Lets this process have as many files open as it may: the files of a model are open together, and many systems start
/// processes with a limit far below the one that these may set themselves.
pub fn allow_open_files() {
    #[cfg(unix)]
    {
        use nix::sys::resource::{Resource, getrlimit, setrlimit};
        // More than that a process on macOS does not get, whatever the limit says.
        let most = if cfg!(target_os = "macos") {
            10_240
        } else {
            u64::MAX
        };
        if let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
            && soft < hard.min(most)
        {
            // Where it stays as it was, an open that fails says so.
            let _ = setrlimit(Resource::RLIMIT_NOFILE, hard.min(most), hard);
        }
    }
}

/// Advice on an error, if it is that there are too many open files.
pub fn open_files_hint(error: &anyhow::Error) -> Option<String> {
    #[cfg(unix)]
    {
        use nix::errno::Errno;
        use nix::sys::resource::{Resource, getrlimit};
        let code = |error: &(dyn std::error::Error + 'static)| {
            error.downcast_ref::<std::io::Error>()?.raw_os_error()
        };
        error
            .chain()
            .filter_map(code)
            .find(|code| *code == Errno::EMFILE as i32)?;
        let (limit, _) = getrlimit(Resource::RLIMIT_NOFILE).ok()?;
        Some(format!(
            "this process may have {limit} files open and no more; the files of a model are open together: raise the \
             hard limit (`ulimit -Hn`), or put the model into fewer files"
        ))
    }
    #[cfg(not(unix))]
    {
        let _ = error;
        None
    }
}

/// The most memory that this process has had, as far as the system says.
#[must_use]
pub fn peak_memory_bytes() -> Option<u64> {
    // Not `getrusage`, which on Linux counts what was there before this program was started in the process.
    #[cfg(target_os = "linux")]
    {
        status_bytes("VmHWM:")
    }
    #[cfg(not(target_os = "linux"))]
    {
        None
    }
}

/// A size that Linux says of this process.
#[cfg(target_os = "linux")]
pub fn status_bytes(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}
