//! The memory that the system grants this process.

use anyhow::{Result, ensure};
use sysinfo::{MemoryRefreshKind, ProcessRefreshKind, ProcessesToUpdate, RefreshKind, System};

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

/// The memory that this process can still have: of the machine's, of its container's, and of its address space.
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
        Some(limit.saturating_sub(crate::system::status_bytes("VmSize:")?))
    }
    #[cfg(not(target_os = "linux"))]
    {
        None
    }
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
