//! The command while it runs: stopped, changed under its feet, killed.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command as Process, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use assert_cmd::Command;

/// A command that has begun to write, and stands still.
pub struct Running(Child);

impl Running {
    /// Starts a command, waits until its outputs are being made beside their targets in `directory`, and stops it.
    pub fn start(command: &Command, directory: &Path) -> Self {
        Self::start_until(command, |running| running.has_begun(directory))
    }

    /// Starts a command, waits until it holds the lock on a file that it is going to replace, and stops it.
    pub fn start_with_lock(command: &Command) -> Self {
        Self::start_until(command, Self::holds_a_lock)
    }

    fn start_until(command: &Command, is_there: impl Fn(&Self) -> bool) -> Self {
        let mut process = Process::new(command.get_program());
        process
            .args(command.get_args())
            .current_dir(command.get_current_dir().unwrap())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let running = Self(process.spawn().unwrap());
        let began = Instant::now();
        while !is_there(&running) {
            assert!(began.elapsed() < Duration::from_secs(60), "it never begins");
            thread::sleep(Duration::from_millis(1));
        }
        running.signal("STOP");
        running
    }

    fn holds_a_lock(&self) -> bool {
        let (locks, id) = (fs::read_to_string("/proc/locks").unwrap(), self.0.id());
        let mut holders = locks.lines().map(|lock| lock.split_whitespace().nth(4));
        holders.any(|holder| holder == Some(&*id.to_string()))
    }

    /// Whether a file without a name is open in `directory`, or one with the name of an output in the making.
    fn has_begun(&self, directory: &Path) -> bool {
        let unnamed = |descriptor: fs::DirEntry| {
            let file = fs::read_link(descriptor.path()).unwrap_or_else(|_| PathBuf::new());
            file.starts_with(directory) && file.to_string_lossy().ends_with("(deleted)")
        };
        let descriptors = format!("/proc/{}/fd", self.0.id());
        let mut descriptors = fs::read_dir(descriptors).into_iter().flatten().flatten();
        let mut files = fs::read_dir(directory).unwrap().flatten();
        descriptors.any(unnamed)
            || files.any(|file| {
                file.file_name()
                    .to_string_lossy()
                    .starts_with(".wgpu-optim-")
            })
    }

    pub fn signal(&self, name: &str) {
        let mut kill = Process::new("kill");
        let status = kill
            .arg(format!("-{name}"))
            .arg(self.0.id().to_string())
            .status();
        assert!(status.unwrap().success());
    }

    /// Lets it go on to its end.
    pub fn wait(self) -> Output {
        self.signal("CONT");
        self.0.wait_with_output().unwrap()
    }
}
