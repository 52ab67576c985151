//! The command in this process, its stdout and stderr taken away.

use std::ffi::OsString;

/// Runs the command. Returns its exit code and what it wrote to stderr.
pub fn run(args: &[OsString]) -> (u8, String) {
    streams::captured(|| wgpu_optim_cli::run(args))
}

/// Lets an allocation fail that no small file is worth. Memory that is never touched counts here; libFuzzer's limit is
/// on the rest.
pub fn limit_memory() {
    #[cfg(target_os = "linux")]
    {
        use rustix::process::{Resource, getrlimit, setrlimit};
        static LIMITED: std::sync::Once = std::sync::Once::new();
        LIMITED.call_once(|| {
            let mut limit = getrlimit(Resource::As);
            limit.current = Some(4 << 30);
            // One that is lower already stays.
            let _ = setrlimit(Resource::As, limit);
        });
    }
}

#[cfg(unix)]
mod streams {
    use std::fs::File;
    use std::io::{self, Read as _, Seek as _};
    use std::panic;
    use std::sync::OnceLock;

    use rustix::io::dup;
    use rustix::stdio::{dup2_stderr, dup2_stdout};

    struct Streams {
        stdout: File,
        stderr: File,
        captured: File,
        nothing: File,
    }

    impl Streams {
        fn get() -> &'static Self {
            static STREAMS: OnceLock<Streams> = OnceLock::new();
            STREAMS.get_or_init(|| {
                // So that a panic is seen.
                let report = panic::take_hook();
                panic::set_hook(Box::new(move |info| {
                    Self::get().restore();
                    report(info);
                }));
                Self {
                    stdout: dup(io::stdout()).unwrap().into(),
                    stderr: dup(io::stderr()).unwrap().into(),
                    captured: tempfile::tempfile().unwrap(),
                    nothing: File::create("/dev/null").unwrap(),
                }
            })
        }

        fn restore(&self) {
            dup2_stdout(&self.stdout).unwrap();
            dup2_stderr(&self.stderr).unwrap();
        }
    }

    /// Not for two threads at once.
    pub fn captured(run: impl FnOnce() -> u8) -> (u8, String) {
        let streams = Streams::get();
        let mut captured = &streams.captured;
        captured.set_len(0).unwrap();
        captured.rewind().unwrap();
        dup2_stdout(&streams.nothing).unwrap();
        dup2_stderr(captured).unwrap();
        let code = run();
        streams.restore();
        captured.rewind().unwrap();
        let mut stderr = String::new();
        captured.read_to_string(&mut stderr).unwrap();
        (code, stderr)
    }
}

#[cfg(not(unix))]
mod streams {
    /// Captures nothing, but says so in the way that is expected.
    pub fn captured(run: impl FnOnce() -> u8) -> (u8, String) {
        let code = run();
        let stderr = if code == 0 { "" } else { "error: \n" };
        (code, stderr.to_owned())
    }
}
