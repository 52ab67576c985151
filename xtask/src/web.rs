//! Programs in a browser: the library's tests, and pages.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result, ensure};
use tiny_http::{Header, Response, Server, StatusCode};
use xshell::{Shell, cmd};

use crate::adapter::apt_get;
use crate::platform::{BROWSER, DENY_WARNINGS, target_dir};

/// Seconds that all tests together may take.
const TEST_TIMEOUT_S: &str = "900";

/// Makes sure of a compiler, of wasm-bindgen's tools and of Chromium, and installs what is missing.
pub fn prepare_test(shell: &Shell) -> Result<()> {
    BROWSER.prepare(shell)?;
    tool(shell, "wasm-bindgen-test-runner")?;
    let chromedriver = cmd!(shell, "chromedriver --version").quiet();
    if chromedriver.ignore_stdout().ignore_stderr().run().is_err() {
        ensure!(
            Path::new("/usr/bin/apt-get").exists(),
            "no chromedriver: it comes with Chrome or Chromium, and has to be in PATH"
        );
        apt_get(shell, &["chromium", "chromium-driver"])?;
    }
    Ok(())
}

/// The library's tests and those of the landscape, as arguments of cargo.
const TESTS: [&[&str]; 2] = [
    &[
        "--package",
        "wgpu-optim",
        "--features",
        "safetensors",
        "--test",
        "suite",
    ],
    &[
        "--package",
        "landscape",
        "--no-default-features",
        "--test",
        "browser",
    ],
];

/// Builds the tests and returns their programs.
pub fn build_tests(shell: &Shell) -> Result<Vec<PathBuf>> {
    let mut programs = Vec::new();
    for tests in TESTS {
        let cargo = BROWSER.cargo(shell, "test")?.args(tests);
        let messages = cargo
            .args(["--no-run", "--message-format=json-render-diagnostics"])
            // As `cargo xtask targets` does, so that this is its check of the library.
            .env("RUSTFLAGS", DENY_WARNINGS)
            .read()?;
        for message in messages.lines() {
            let message: serde_json::Value = serde_json::from_str(message)?;
            programs.extend(message["executable"].as_str().map(PathBuf::from));
        }
    }
    Ok(programs)
}

/// Runs tests in headless Chromium, those whose names hold what `args` say. Without cargo, which would wait for whoever else
/// builds.
pub fn run_tests(shell: &Shell, programs: &[PathBuf], args: &[String]) -> Result<()> {
    let runner = tool(shell, "wasm-bindgen-test-runner")?;
    for program in programs {
        cmd!(shell, "{runner} {program} {args...}")
            .env("CHROMEDRIVER", "chromedriver")
            .env("WASM_BINDGEN_TEST_TIMEOUT", TEST_TIMEOUT_S)
            .env(
                "WASM_BINDGEN_TEST_WEBDRIVER_JSON",
                crate::root().join("tests/webdriver.json"),
            )
            .run()?;
    }
    Ok(())
}

/// A program of the workspace, and the folder of the files that its page has beside it.
pub struct Page {
    pub package: &'static str,
    pub files: &'static str,
}

impl Page {
    /// Builds the program and puts it with its page into a folder of its own, from which any static server serves it:
    /// `PACKAGE.js`, `PACKAGE_bg.wasm` and the page's files.
    pub fn build(&self, shell: &Shell) -> Result<PathBuf> {
        let package = self.package;
        BROWSER.prepare(shell)?;
        let wasm_bindgen = tool(shell, "wasm-bindgen")?;
        let cargo = BROWSER.cargo(shell, "build")?;
        let cargo = cargo.args(["--release", "--package", package, "--bin", package]);
        cargo.run()?;
        let program = target_dir()
            .join(BROWSER.target)
            .join("release")
            .join(package)
            .with_extension("wasm");
        let folder = crate::root().join("target/web").join(package);
        shell.remove_path(&folder)?;
        shell.create_dir(&folder)?;
        cmd!(
            shell,
            "{wasm_bindgen} --target web --no-typescript --remove-name-section --out-dir {folder} {program}"
        )
        .run()?;
        for file in shell.read_dir(crate::root().join(self.files))? {
            shell.copy_file(file, &folder)?;
        }
        Ok(folder)
    }
}

/// Serves the files of a folder to this machine alone, until it is interrupted.
pub fn serve(folder: &Path, port: u16) -> Result<()> {
    let server = Server::http(("127.0.0.1", port));
    let server = server.map_err(|error| anyhow::anyhow!("port {port}: {error}"))?;
    eprintln!("http://{}", server.server_addr());
    for request in server.incoming_requests() {
        let path = request.url().split(['?', '#']).next().unwrap_or_default();
        let name = match path.trim_start_matches('/') {
            "" => "index.html",
            name => name,
        }
        .to_owned();
        // What the folder does not list is not served.
        let listed = fs::read_dir(folder)?.filter_map(Result::ok);
        let file = listed.into_iter().find(|entry| entry.file_name() == *name);
        let answered = match file.map(|entry| entry.path()) {
            Some(file) => {
                let response = Response::from_file(File::open(&file)?);
                request.respond(response.with_header(content_type(&file)?))
            }
            None => request.respond(Response::empty(StatusCode(404))),
        };
        if let Err(error) = answered {
            eprintln!("{name}: {error}");
        }
    }
    Ok(())
}

fn content_type(file: &Path) -> Result<Header> {
    let content_type = match file.extension().and_then(OsStr::to_str) {
        Some("html") => "text/html; charset=utf-8",
        Some("js") => "text/javascript; charset=utf-8",
        // Browsers compile while they load if it is said to be that.
        Some("wasm") => "application/wasm",
        _ => "application/octet-stream",
    };
    Header::from_bytes("Content-Type", content_type)
        .map_err(|()| anyhow::anyhow!("{content_type} is no header"))
}

/// One of wasm-bindgen's programs, of the version that the workspace is locked to: in `PATH`, or else installed under
/// `target/tools`.
fn tool(shell: &Shell, name: &str) -> Result<PathBuf> {
    let package = cmd!(shell, "cargo pkgid --locked wasm-bindgen")
        .quiet()
        .read()?;
    let (_, version) = package
        .rsplit_once('@')
        .with_context(|| format!("{package} has no version"))?;
    let has_version = |program: &Path| {
        let said = cmd!(shell, "{program} --version").quiet().ignore_stderr();
        said.read().is_ok_and(|said| said.ends_with(version))
    };
    let tools = crate::root().join("target/tools");
    let installed = tools.join("bin").join(name);
    for program in [PathBuf::from(name), installed.clone()] {
        if has_version(&program) {
            return Ok(program);
        }
    }
    eprintln!(
        "wasm-bindgen-cli {version} is not on this machine: installing it in {}",
        tools.display()
    );
    // Not optimized it builds in a third of the time and takes seconds longer. It fetches nothing, so it needs no TLS.
    cmd!(
        shell,
        "cargo install --debug --no-default-features --root {tools} wasm-bindgen-cli --version {version}"
    )
    .args(["--bin", "wasm-bindgen", "--bin", "wasm-bindgen-test-runner"])
    .env("CARGO_PROFILE_DEV_DEBUG", "false")
    .run()?;
    Ok(installed)
}
