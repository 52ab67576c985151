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
        let mut process = Process::new(command.get_program());
        process
            .args(command.get_args())
            .current_dir(command.get_current_dir().unwrap())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let running = Self(process.spawn().unwrap());
        let began = Instant::now();
        while !running.has_begun(directory) {
            assert!(began.elapsed() < Duration::from_secs(60), "it never begins");
            thread::sleep(Duration::from_millis(1));
        }
        running.signal("STOP");
        running
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
