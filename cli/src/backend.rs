//! The choice of the device that a command computes on, and the reason for it.

use std::sync::{Arc, Mutex, PoisonError};

use anyhow::{Context as _, Result, anyhow, ensure};
use serde::{Deserialize, Serialize};
use wgpu_optim::gpu::GpuError;
use wgpu_optim::{AdapterRequest, AnyRule, Gpu, Kernels, wgpu};
use wgpu_optim_files::window::{Engine, OnCpu, OnGpu, check_rule};

use crate::Failure;
use crate::args::{CommonArgs, DeviceArg};

/// The advice on a machine that has no adapter.
const NO_ADAPTER_HINT: &str =
    "a software adapter will do: on Debian and Ubuntu, install mesa-vulkan-drivers";

/// Features that devices get for the benchmark's sake, where their adapters have them.
const MEASURING: wgpu::Features = wgpu::Features::TIMESTAMP_QUERY;

/// The device of a command.
pub enum Backend {
    Gpu(OpenGpu),
    Cpu,
}

/// The chosen device, and why it was chosen.
pub struct Choice {
    pub(crate) backend: Backend,
    /// Why it was chosen.
    pub reason: String,
}

impl Choice {
    /// `gpu` or `cpu`.
    #[must_use]
    pub const fn kind(&self) -> &'static str {
        match self.backend {
            Backend::Gpu(_) => "gpu",
            Backend::Cpu => "cpu",
        }
    }

    /// The name of the adapter, or of the processor.
    #[must_use]
    pub fn name(&self) -> String {
        match &self.backend {
            Backend::Gpu(open) => open.name(),
            Backend::Cpu => cpu_name(),
        }
    }

    /// For commands that update a model: `auto` is a hardware GPU, else the CPU twin, which beats a software
    /// adapter.
    pub fn for_updates(common: &CommonArgs) -> Result<Self, Failure> {
        Self::new(common, common.insists_on_gpu())
    }

    /// For measurements: `auto` is whatever adapter there is.
    pub fn for_measurements(common: &CommonArgs) -> Result<Self, Failure> {
        Self::new(common, true)
    }

    /// The adapters to measure (every one that fits, if `all`), and why these; none for the CPU alone.
    pub fn all_for_measurements(
        common: &CommonArgs,
        all: bool,
    ) -> Result<(Vec<Opened>, String), Failure> {
        if !all || common.device == DeviceArg::Cpu {
            let Self { backend, reason } = Self::for_measurements(common)?;
            return Ok(match backend {
                Backend::Gpu(open) => (vec![Ok(open)], reason),
                Backend::Cpu => (Vec::new(), reason),
            });
        }
        let adapters = Adapters::of_this_machine()?;
        let numbers = adapters.wanted(common).into_iter();
        let opened: Vec<_> = numbers.map(|number| adapters.open(number)).collect();
        let reason = if opened.iter().any(Result::is_ok) {
            "every adapter of this machine".to_owned()
        } else {
            let refusals = opened.iter().filter_map(|open| open.as_ref().err());
            let refusals = refusals.filter_map(|adapter| adapter.error.clone());
            adapters.none_will_do(common, true, refusals.collect())?
        };
        Ok((opened, reason))
    }

    fn new(common: &CommonArgs, allow_software: bool) -> Result<Self, Failure> {
        if common.device == DeviceArg::Cpu {
            if let Some(name) = &common.adapter {
                return Err(
                    anyhow!("--adapter {name} asks for a GPU, and --device cpu for none").into(),
                );
            }
            return Ok(Self::cpu("asked for with --device cpu"));
        }
        let adapters = Adapters::of_this_machine()?;
        let mut refusals = Vec::new();
        for number in adapters.best_first(common, allow_software) {
            match adapters.open(number) {
                Ok(open) => {
                    let why = match (common.device, &common.adapter) {
                        (_, Some(text)) => format!("asked for with --adapter {text}"),
                        (DeviceArg::Gpu, None) => "asked for with --device gpu".to_owned(),
                        _ => "the best adapter of this machine".to_owned(),
                    };
                    refusals.insert(0, why);
                    return Ok(Self {
                        backend: Backend::Gpu(open),
                        reason: refusals.join("; "),
                    });
                }
                Err(adapter) => refusals.extend(adapter.error),
            }
        }
        adapters
            .none_will_do(common, allow_software, refusals)
            .map(Self::cpu)
    }

    /// One sentence on where updates are computed on this machine, and why there.
    pub fn in_a_sentence(common: &CommonArgs) -> String {
        match Self::for_updates(common) {
            Ok(Self { backend, reason }) => match backend {
                Backend::Gpu(open) => format!(
                    "Steps are computed on the {} {}: {reason}.",
                    open.about.kind(),
                    open.name()
                ),
                Backend::Cpu => format!("Steps are computed on the {}: {reason}.", cpu_name()),
            },
            Err(failure) => format!("Steps cannot be computed: {failure}."),
        }
    }

    pub(crate) fn cpu(reason: impl Into<String>) -> Self {
        Self {
            backend: Backend::Cpu,
            reason: reason.into(),
        }
    }

    /// Returns the engine that steps windows of at most `max_elems` elements on the chosen device.
    ///
    /// # Errors
    /// [`Failure::Refused`] if the rule needs whole tensors, and [`Failure::Failed`] if the device has no memory for such
    /// windows, or is lost.
    pub fn engine(&self, config: AnyRule, max_elems: u64) -> Result<Box<dyn Engine>, Failure> {
        check_rule(&config).map_err(|error| Failure::Refused(error.into()))?;
        Ok(match &self.backend {
            Backend::Gpu(open) => {
                let engine = OnGpu::new(&open.kernels, config, max_elems)?;
                open.finish()?;
                Box::new(engine)
            }
            Backend::Cpu => Box::new(OnCpu::new(config)),
        })
    }

    /// The CPU twin in place of a GPU that has failed since, where nobody insists on a GPU; else the failure.
    pub fn or_cpu(mut self, common: &CommonArgs, failure: Failure) -> Result<Self, Failure> {
        self.fall_back_on_cpu(common, failure)?;
        Ok(self)
    }

    /// Puts the CPU twin in place of a GPU that has failed since, where nobody insists on a GPU; else returns the failure.
    pub fn fall_back_on_cpu(
        &mut self,
        common: &CommonArgs,
        failure: Failure,
    ) -> Result<(), Failure> {
        match (&self.backend, failure) {
            (Backend::Gpu(open), Failure::Failed(error)) => match common.insists_on_gpu() {
                true => return Err(Failure::Failed(error.context(open.name()))),
                false => *self = Self::cpu(format!("{} failed: {error:#}", open.name())),
            },
            (_, failure) => return Err(failure),
        }
        Ok(())
    }
}

/// The adapters of this machine, by number: their place in an order that is the same for every command.
pub struct Adapters(Vec<(wgpu::Adapter, Adapter)>);

impl Adapters {
    /// Lists the adapters on the backends of `WGPU_BACKEND`, else on Vulkan, Metal and DX12.
    pub fn of_this_machine() -> Result<Self> {
        let backends = backends()?;
        let found = without_complaint_of_wayland(|| {
            pollster::block_on(wgpu_optim::gpu::adapters(backends))
        });
        let infos: Vec<_> = found.iter().map(wgpu::Adapter::get_info).collect();
        let about = (0..).map(|number| Adapter::new(number, &infos));
        Ok(Self(found.into_iter().zip(about).collect()))
    }

    /// The numbers of those that `--adapter` allows, the best one first.
    fn best_first(&self, common: &CommonArgs, allow_software: bool) -> Vec<usize> {
        let number = common.adapter.as_ref().and_then(|text| text.parse().ok());
        if let Some(number) = number.filter(|number| *number < self.0.len()) {
            return vec![number];
        }
        let request = AdapterRequest {
            name: common.adapter.clone(),
            allow_software,
            ..AdapterRequest::default()
        };
        let infos: Vec<_> = self.0.iter().map(|(found, _)| found.get_info()).collect();
        request.best_first(&infos)
    }

    /// The numbers of those that `--adapter` allows.
    pub fn wanted(&self, common: &CommonArgs) -> Vec<usize> {
        let mut numbers = self.best_first(common, true);
        numbers.sort_unstable();
        numbers
    }

    /// Opens one for the kernels.
    pub fn open(&self, number: usize) -> Opened {
        let (found, about) = &self.0[number];
        OpenGpu::new(found.clone(), about).map_err(|why| {
            Box::new(Adapter {
                error: Some(format!("{} {why}", about.full_name)),
                ..about.clone()
            })
        })
    }

    /// An adapter, and what is known of it once it has been opened.
    pub fn tried(&self, number: usize) -> (&wgpu::Adapter, Box<Adapter>) {
        let about = self
            .open(number)
            .map_or_else(|about| about, |open| open.about);
        (&self.0[number].0, about)
    }

    /// Why there is only the CPU; a failure for those who insist on a GPU.
    fn none_will_do(
        &self,
        common: &CommonArgs,
        allow_software: bool,
        refusals: Vec<String>,
    ) -> Result<String, Failure> {
        match (refusals.is_empty(), common.insists_on_gpu()) {
            (true, true) => Err(self.none_fits(common, allow_software).into()),
            (true, false) => Ok(self.none_fits(common, allow_software).to_string()),
            (false, true) => Err(Failure::Failed(anyhow!(refusals.join("; ")))),
            (false, false) => Ok(refusals.join("; ")),
        }
    }

    /// The error where `--adapter` and `--device` allow none of them.
    pub fn none_fits(&self, common: &CommonArgs, allow_software: bool) -> anyhow::Error {
        let mut request = String::new();
        if let Some(text) = &common.adapter {
            request += &match text.parse::<usize>() {
                Ok(number) => format!(" with the number {number}, or with it in its name"),
                Err(_) => format!(" with {text:?} in its name"),
            };
        }
        if !allow_software {
            request += " that is hardware";
        }
        let listed = |(_, about): &(_, Adapter)| format!("{}: {}", about.number, about.full_name);
        let listed: Vec<_> = self.0.iter().map(listed).collect();
        let error = GpuError::NoAdapter {
            request,
            available: match listed.is_empty() {
                true => format!("none; {NO_ADAPTER_HINT}"),
                false => listed.join(", "),
            },
        };
        error.into()
    }
}

/// The backends that `WGPU_BACKEND` names, one of which this system has to have; without it Vulkan, Metal and DX12.
fn backends() -> Result<wgpu::Backends> {
    let Some(typed) = std::env::var_os("WGPU_BACKEND").filter(|typed| !typed.is_empty()) else {
        return Ok(wgpu::Backends::PRIMARY);
    };
    let typed = typed.to_string_lossy();
    for name in typed.split(',') {
        ensure!(
            !wgpu::Backends::from_comma_list(name).is_empty(),
            "WGPU_BACKEND={typed}: there is no backend {name:?}; expected vulkan, metal, dx12 or gl, or several of them \
             separated by commas"
        );
    }
    let (backends, built) = (
        wgpu::Backends::from_comma_list(&typed),
        wgpu::Instance::enabled_backend_features(),
    );
    ensure!(
        backends.intersects(built),
        "WGPU_BACKEND={typed}: expected a backend of this system, which has {}",
        built
            .iter_names()
            .map(|(name, _)| name.to_lowercase())
            .collect::<Vec<_>>()
            .join(", ")
    );
    Ok(backends)
}

/// Does work that wakes Vulkan, and keeps one complaint off stderr. A layer of Mesa's, which brings devices into an order,
/// looks for a Wayland display then, and says that there is none where no session has set `XDG_RUNTIME_DIR`, as in a
/// container.
fn without_complaint_of_wayland<T>(work: impl FnOnce() -> T) -> T {
    #[cfg(target_os = "linux")]
    let _aside = stderr::Aside::where_nobody_has_a_display();
    work()
}

#[cfg(target_os = "linux")]
mod stderr {
    use std::fs::File;
    use std::io::{self, Read as _, Seek as _, Write as _};
    use std::os::fd::{AsFd as _, OwnedFd};
    use std::path::Path;
    use std::sync::{Mutex, MutexGuard, PoisonError};

    /// Holds stderr back until it is dropped; then all that was said comes, but for the complaint.
    pub struct Aside {
        stderr: OwnedFd,
        said: File,
        /// Or another's file would be taken for stderr.
        _alone: MutexGuard<'static, ()>,
    }

    static ALONE: Mutex<()> = Mutex::new(());

    const COMPLAINT: &[u8] = b"error: XDG_RUNTIME_DIR is invalid or not set";

    impl Aside {
        pub fn where_nobody_has_a_display() -> Option<Self> {
            let directory = std::env::var_os("XDG_RUNTIME_DIR").unwrap_or_default();
            if Path::new(&directory).is_absolute() {
                return None;
            }
            let alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
            let stderr = io::stderr().as_fd().try_clone_to_owned().ok()?;
            let said = tempfile::tempfile().ok()?;
            nix::unistd::dup2_stderr(&said).ok()?;
            Some(Self {
                stderr,
                said,
                _alone: alone,
            })
        }
    }

    impl Drop for Aside {
        fn drop(&mut self) {
            let Self { stderr, said, .. } = self;
            let mut lines = Vec::new();
            // What cannot be read or put back has nowhere to go.
            let _ = nix::unistd::dup2_stderr(stderr);
            let _ = said.rewind().and_then(|()| said.read_to_end(&mut lines));
            let lines = lines.split_inclusive(|byte| *byte == b'\n');
            for line in lines.filter(|line| !line.starts_with(COMPLAINT)) {
                let _ = io::stderr().write_all(line);
            }
        }
    }
}

/// A device, or in its place what is known of an adapter that cannot be used, the error included.
pub type Opened = Result<OpenGpu, Box<Adapter>>;

/// The description of an adapter.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
#[serde(default)]
pub struct Adapter {
    /// The number that `--adapter` takes.
    pub number: usize,
    pub name: String,
    pub backend: String,
    pub device_type: String,
    pub vendor_id: u32,
    pub device_id: u32,
    /// The place of the adapter, if the driver says so: twins differ in nothing else.
    pub pci_bus_id: String,
    pub driver: String,
    /// The name in rows of reports: no other adapter has the same.
    pub full_name: String,
    /// Why nothing can be computed on it.
    pub error: Option<String>,
}

impl Adapter {
    fn new(number: usize, infos: &[wgpu::AdapterInfo]) -> Self {
        let info = infos[number].clone();
        let name = |info: &wgpu::AdapterInfo| format!("{} ({})", info.name, info.backend);
        let mut full_name = name(&info);
        if infos
            .iter()
            .map(name)
            .filter(|other| *other == full_name)
            .count()
            > 1
        {
            full_name += &format!(" #{number}");
        }
        Self {
            number,
            driver: format!("{} {}", info.driver, info.driver_info)
                .trim()
                .to_owned(),
            name: info.name,
            backend: info.backend.to_string(),
            device_type: format!("{:?}", info.device_type),
            vendor_id: info.vendor,
            device_id: info.device,
            pci_bus_id: info.device_pci_bus_id,
            full_name,
            error: None,
        }
    }

    /// The kind of the adapter, in words.
    fn kind(&self) -> &'static str {
        match &*self.device_type {
            "DiscreteGpu" => "discrete GPU",
            "IntegratedGpu" => "integrated GPU",
            "VirtualGpu" => "virtual GPU",
            "Cpu" => "software adapter",
            _ => "GPU of unknown kind",
        }
    }

    /// The adapter's identifiers as one text.
    pub fn ids(&self) -> String {
        let mut ids = format!(
            "vendor {:#06x}, device {:#06x}",
            self.vendor_id, self.device_id
        );
        if !self.pci_bus_id.is_empty() {
            ids += &format!(", PCI bus {}", self.pci_bus_id);
        }
        ids
    }
}

/// A device and its kernels, with uncaptured errors kept instead of wgpu's panic.
pub struct OpenGpu {
    pub about: Box<Adapter>,
    pub gpu: Gpu,
    pub kernels: Kernels,
    errors: Arc<Mutex<Option<String>>>,
}

impl OpenGpu {
    fn new(adapter: wgpu::Adapter, about: &Adapter) -> Result<Self, String> {
        let opened = pollster::block_on(Gpu::of(adapter, MEASURING));
        let gpu = opened.map_err(|error| match error {
            GpuError::NoDevice { message, .. } => format!("gave no device: {message}"),
            error => error.to_string(),
        })?;
        let errors = Arc::new(Mutex::new(None));
        let keep = Arc::clone(&errors);
        gpu.device
            .on_uncaptured_error(Arc::new(move |error: wgpu::Error| {
                log::error!("{error}");
                let mut first = keep.lock().unwrap_or_else(PoisonError::into_inner);
                first.get_or_insert(error.to_string());
            }));
        let kernels = Kernels::new(&gpu.device, &gpu.queue)
            .map_err(|error| format!("cannot run the kernels: {error}"))?;
        Ok(Self {
            about: Box::new(about.clone()),
            gpu,
            kernels,
            errors,
        })
    }

    /// Another device of the same adapter.
    pub fn again(&self) -> Result<Self, String> {
        Self::new(self.gpu.adapter.clone(), &self.about)
    }

    pub fn name(&self) -> String {
        self.about.full_name.clone()
    }

    /// Whether the device's memory is the host's.
    pub fn shares_memory(&self) -> bool {
        matches!(
            self.gpu.adapter.get_info().device_type,
            wgpu::DeviceType::Cpu | wgpu::DeviceType::IntegratedGpu
        )
    }

    /// Waits until everything submitted so far is done.
    pub fn finish(&self) -> Result<(), Failure> {
        self.gpu
            .device
            .poll(wgpu::PollType::wait_indefinitely())
            .context("the device did not finish")
            .map_err(Failure::Failed)?;
        let mut errors = self.errors.lock().unwrap_or_else(PoisonError::into_inner);
        match errors.take() {
            Some(error) => Err(Failure::Failed(anyhow!("the device reported: {error}"))),
            None => Ok(()),
        }
    }
}

/// Name of the CPU twin in reports.
pub fn cpu_name() -> String {
    format!("CPU twin ({} threads)", rayon::current_num_threads())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "tests fail by panicking")]
pub mod tests {
    use super::*;

    /// The best adapter of this machine.
    pub fn open_gpu() -> OpenGpu {
        let choice = Choice::for_measurements(&common(DeviceArg::Auto, None)).unwrap();
        match choice.backend {
            Backend::Gpu(open) => open,
            Backend::Cpu => unreachable!("{}", choice.reason),
        }
    }

    fn common(device: DeviceArg, adapter: Option<&str>) -> CommonArgs {
        CommonArgs {
            device,
            adapter: adapter.map(str::to_owned),
            json: false,
        }
    }

    #[test]
    fn the_cpu_takes_over_from_a_failed_gpu_that_nobody_insists_on() {
        let failed = || Failure::Failed(anyhow!("out of device memory"));
        let auto = common(DeviceArg::Auto, None);
        let choice = || Choice::for_measurements(&auto).unwrap();

        let cpu = choice().or_cpu(&auto, failed()).unwrap();
        assert!(matches!(cpu.backend, Backend::Cpu));
        assert_eq!(
            cpu.reason,
            format!("{} failed: out of device memory", open_gpu().name())
        );
        // From the CPU there is nowhere to go.
        assert!(matches!(
            cpu.or_cpu(&auto, failed()),
            Err(Failure::Failed(_))
        ));

        for insisting in [
            common(DeviceArg::Gpu, None),
            common(DeviceArg::Auto, Some("0")),
        ] {
            let failed = choice().or_cpu(&insisting, failed());
            let named = |e: &anyhow::Error| {
                format!("{e:#}") == format!("{}: out of device memory", open_gpu().name())
            };
            assert!(matches!(failed, Err(Failure::Failed(e)) if named(&e)));
        }
        for failure in [
            Failure::Wrong(anyhow!("")),
            Failure::Refused(anyhow!("")),
            Failure::Interrupted(2),
        ] {
            assert!(choice().or_cpu(&auto, failure).is_err());
        }
    }
}
