//! The open files and the memory that the system grants this process.

use anyhow::{Result, ensure};
use sysinfo::{MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, RefreshKind, System};

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

/// Makes sure that there are about so many bytes of memory. An allocation that fails would end the process, and one that
/// succeeds may still be more than the machine has.
pub fn check_memory(needed_bytes: u64) -> Result<()> {
    let available = available_bytes().unwrap_or(u64::MAX);
    ensure!(
        needed_bytes <= available,
        "it needs about {} of memory, and {} are available",
        in_words(needed_bytes),
        in_words(available)
    );
    Ok(())
}

fn in_words(bytes: u64) -> String {
    match bytes >> 30 {
        0 => format!("{} MiB", bytes.div_ceil(1 << 20)),
        _ => format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30)),
    }
}

/// How much memory this process can still have: of the machine's, of its container's, and of its address space.
fn available_bytes() -> Option<u64> {
    let memory = RefreshKind::nothing().with_memory(MemoryRefreshKind::nothing().with_ram());
    let of_machine = || Some(System::new_with_specifics(memory).ok()?.available_memory());
    let limits = [of_machine(), of_container(), of_address_space()];
    limits.into_iter().flatten().min()
}

fn of_container() -> Option<u64> {
    let process = sysinfo::get_current_pid().ok()?;
    let mut system = System::new_with_specifics(RefreshKind::nothing()).ok()?;
    let processes = ProcessesToUpdate::Some(&[process]);
    system.refresh_processes_specifics(processes, false, ProcessRefreshKind::nothing());
    let limits = system.process(process)?.cgroup_limits()?;
    // Of what else the container uses, caches of files are given up for us.
    Some(limits.total_memory.saturating_sub(limits.rss))
}

fn of_address_space() -> Option<u64> {
    #[cfg(target_os = "linux")]
    {
        use nix::sys::resource::{Resource, getrlimit};
        let (limit, _) = getrlimit(Resource::RLIMIT_AS).ok()?;
        Some(limit.saturating_sub(status_bytes("VmSize:")?))
    }
    #[cfg(not(target_os = "linux"))]
    {
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
fn status_bytes(name: &str) -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix(name))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib << 10)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
mod tests {
    use super::*;

    #[test]
    fn what_is_more_than_there_is_is_refused_with_both_sizes() {
        check_memory(1 << 20).unwrap();
        let error = check_memory(1 << 60).unwrap_err().to_string();
        let (needed, available) = error.split_once(" of memory, and ").unwrap();
        assert_eq!(needed, "it needs about 1073741824.0 GiB");
        assert!(available.ends_with(" are available"), "{error}");
        assert_eq!(in_words(1 << 30), "1.0 GiB");
        assert_eq!(in_words((1 << 20) + 1), "2 MiB");
    }
}
