//! Compiles kernels for AMD GPUs that are not there, with Mesa's RADV and its null device.
//!
//! The driver takes the GPU's family from an environment variable when it is loaded, so each family has a process
//! of its own: [`compile`] starts this program again, with the kernels as JSON on its standard input, and
//! [`run_child`] answers there.
#![expect(
    unsafe_code,
    reason = "Vulkan is called directly: wgpu cannot open a null device"
)]

use std::collections::BTreeMap;
use std::ffi::{CStr, c_char};
use std::io::{self, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::{env, fs, slice};

use anyhow::{Context as _, Result, ensure};
use ash::{ext, khr, vk};
use serde::{Deserialize, Serialize};

use crate::kernels::Kernel;
use crate::spirv::Spirv;

/// From GCN 4 to RDNA 3.
pub const FAMILIES: [&str; 5] = ["polaris10", "vega20", "navi10", "navi21", "gfx1100"];

/// The argument that makes this program answer [`compile`].
pub const CHILD: &str = "radv-child";

/// The machine code of a list of kernels, as the driver made it.
#[derive(Debug, Serialize, Deserialize)]
pub struct Compiled {
    /// Driver and version, such as "radv, Mesa 22.3.6".
    pub driver: String,
    /// In the order of the kernels.
    pub executables: Vec<Executable>,
}

#[derive(Debug, Serialize, Deserialize)]
pub struct Executable {
    pub kernel: String,
    /// By the driver's own names.
    pub statistics: BTreeMap<String, u64>,
    pub assembly: String,
}

/// Where the Vulkan loader keeps RADV's description, if anywhere.
pub fn driver_file() -> Option<PathBuf> {
    let directories = [
        "/usr/local/share/vulkan/icd.d",
        "/usr/share/vulkan/icd.d",
        "/etc/vulkan/icd.d",
    ];
    directories
        .iter()
        .filter_map(|directory| fs::read_dir(directory).ok())
        .flatten()
        .filter_map(|entry| Some(entry.ok()?.path()))
        .find(|path| {
            let name = path.file_name().unwrap_or_default().to_string_lossy();
            name.starts_with("radeon_icd") && name.ends_with(".json") && !name.contains("i686")
        })
}

/// Compiles `kernels` for a GPU family with the driver that `driver_file` describes; nothing if that has no null device
/// of the family.
pub fn compile(driver_file: &Path, family: &str, kernels: &[Kernel]) -> Result<Option<Compiled>> {
    let mut child = Command::new(env::current_exe()?)
        .arg(CHILD)
        .env("RADV_FORCE_FAMILY", family)
        .env("VK_DRIVER_FILES", driver_file)
        // The same for loaders before 1.3.207.
        .env("VK_ICD_FILENAMES", driver_file)
        // Mesa's device selection would look for a display server.
        .env("NODEVICE_SELECT", "1")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()?;
    let mut stdin = child.stdin.take().context("the child has an input")?;
    stdin.write_all(&serde_json::to_vec(kernels)?)?;
    drop(stdin);
    let output = child.wait_with_output()?;
    ensure!(
        output.status.success(),
        "the driver compiled nothing for {family}"
    );
    Ok(serde_json::from_slice(&output.stdout)?)
}

pub fn run_child() -> Result<()> {
    let kernels: Vec<Kernel> = serde_json::from_reader(io::stdin().lock())?;
    let compiled = match NullDevice::open()? {
        Some(device) => Some(Compiled {
            executables: kernels
                .iter()
                .map(|kernel| device.compile(kernel))
                .collect::<Result<_>>()?,
            driver: device.driver,
        }),
        None => None,
    };
    serde_json::to_writer(io::stdout().lock(), &compiled)?;
    Ok(())
}

/// Ends with the process: nothing is destroyed.
struct NullDevice {
    _entry: ash::Entry,
    device: ash::Device,
    properties: khr::pipeline_executable_properties::Device,
    driver: String,
    robust_buffer_access2: bool,
}

impl NullDevice {
    fn open() -> Result<Option<Self>> {
        // SAFETY: the loader is a Vulkan loader, and every structure is filled in as its type says.
        unsafe {
            let entry = ash::Entry::load()?;
            let application = vk::ApplicationInfo::default().api_version(vk::API_VERSION_1_3);
            let info = vk::InstanceCreateInfo::default().application_info(&application);
            let instance = entry.create_instance(&info, None)?;
            let physical_devices = instance.enumerate_physical_devices()?;
            let Some(physical) = physical_devices.first().copied() else {
                return Ok(None);
            };

            let mut driver = vk::PhysicalDeviceDriverProperties::default();
            let mut properties = vk::PhysicalDeviceProperties2::default().push_next(&mut driver);
            instance.get_physical_device_properties2(physical, &mut properties);
            if !text(&properties.properties.device_name).contains("Null") {
                return Ok(None);
            }

            // What wgpu enables and a compiler sees: the driver checks bounds, if it can.
            let mut robustness2 = vk::PhysicalDeviceRobustness2FeaturesEXT::default();
            let mut features = vk::PhysicalDeviceFeatures2::default().push_next(&mut robustness2);
            instance.get_physical_device_features2(physical, &mut features);
            let robust_buffer_access = features.features.robust_buffer_access;
            let robust_buffer_access2 = robustness2.robust_buffer_access2 != vk::FALSE;

            let mut extensions = vec![khr::pipeline_executable_properties::NAME.as_ptr()];
            if robust_buffer_access2 {
                extensions.push(ext::robustness2::NAME.as_ptr());
            }
            let mut robustness2 = vk::PhysicalDeviceRobustness2FeaturesEXT::default()
                .robust_buffer_access2(robust_buffer_access2);
            let mut executable_info =
                vk::PhysicalDevicePipelineExecutablePropertiesFeaturesKHR::default()
                    .pipeline_executable_info(true);
            let mut features = vk::PhysicalDeviceFeatures2::default()
                .features(vk::PhysicalDeviceFeatures {
                    robust_buffer_access,
                    ..Default::default()
                })
                .push_next(&mut executable_info);
            if robust_buffer_access2 {
                features = features.push_next(&mut robustness2);
            }
            let queues = [vk::DeviceQueueCreateInfo::default().queue_priorities(&[1.0])];
            let info = vk::DeviceCreateInfo::default()
                .queue_create_infos(&queues)
                .enabled_extension_names(&extensions)
                .push_next(&mut features);
            let device = instance.create_device(physical, &info, None)?;
            Ok(Some(Self {
                properties: khr::pipeline_executable_properties::Device::new(&instance, &device),
                _entry: entry,
                device,
                driver: format!(
                    "{}, {}",
                    text(&driver.driver_name),
                    text(&driver.driver_info)
                ),
                robust_buffer_access2,
            }))
        }
    }

    fn compile(&self, kernel: &Kernel) -> Result<Executable> {
        let spirv = Spirv::new(kernel, self.robust_buffer_access2)?;
        let entry_point = format!("{}\0", kernel.entry_point);
        // SAFETY: naga has validated the module, the layout is the one that it asks for, and what is made here is
        // used on the device that it was made on.
        unsafe {
            let layout = self.layout(&spirv)?;
            let info = vk::ShaderModuleCreateInfo::default().code(&spirv.words);
            let module = self.device.create_shader_module(&info, None)?;
            let stage = vk::PipelineShaderStageCreateInfo::default()
                .stage(vk::ShaderStageFlags::COMPUTE)
                .module(module)
                .name(CStr::from_bytes_with_nul(entry_point.as_bytes())?);
            let info = vk::ComputePipelineCreateInfo::default()
                .flags(
                    vk::PipelineCreateFlags::CAPTURE_STATISTICS_KHR
                        | vk::PipelineCreateFlags::CAPTURE_INTERNAL_REPRESENTATIONS_KHR,
                )
                .stage(stage)
                .layout(layout);
            let pipelines = self
                .device
                .create_compute_pipelines(vk::PipelineCache::null(), &[info], None)
                .map_err(|(_, error)| error)?;
            let pipeline = *pipelines.first().context("one pipeline was asked for")?;
            let info = vk::PipelineExecutableInfoKHR::default()
                .pipeline(pipeline)
                .executable_index(0);
            Ok(Executable {
                kernel: kernel.name.clone(),
                statistics: self.statistics(&info)?,
                assembly: self.assembly(&info)?,
            })
        }
    }

    /// The layout that wgpu makes of the library's bind group layouts.
    unsafe fn layout(&self, spirv: &Spirv) -> Result<vk::PipelineLayout> {
        let binding = |binding: u32, ty: vk::DescriptorType| {
            vk::DescriptorSetLayoutBinding::default()
                .binding(binding)
                .descriptor_type(ty)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
        };
        let of_group = |group: &Vec<(u32, bool)>| -> Vec<_> {
            let ty = |is_uniform| match is_uniform {
                true => vk::DescriptorType::UNIFORM_BUFFER_DYNAMIC,
                false => vk::DescriptorType::STORAGE_BUFFER,
            };
            let bindings = group.iter();
            bindings
                .map(|(index, is_uniform)| binding(*index, ty(*is_uniform)))
                .collect()
        };
        let groups: Vec<_> = spirv.groups.iter().map(of_group).collect();
        let immediates = vk::PushConstantRange::default()
            .stage_flags(vk::ShaderStageFlags::ALL)
            .size(spirv.immediate_bytes);
        // SAFETY: as for the caller.
        unsafe {
            let sets = groups
                .iter()
                .map(|bindings| {
                    let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(bindings);
                    Ok(self.device.create_descriptor_set_layout(&info, None)?)
                })
                .collect::<Result<Vec<_>>>()?;
            let mut info = vk::PipelineLayoutCreateInfo::default().set_layouts(&sets);
            if spirv.immediate_bytes > 0 {
                info = info.push_constant_ranges(slice::from_ref(&immediates));
            }
            Ok(self.device.create_pipeline_layout(&info, None)?)
        }
    }

    unsafe fn statistics(
        &self,
        info: &vk::PipelineExecutableInfoKHR<'_>,
    ) -> Result<BTreeMap<String, u64>> {
        // SAFETY: as for the caller; the format says which member of the union is there.
        unsafe {
            let statistics = self.properties.get_pipeline_executable_statistics(info)?;
            Ok(statistics
                .iter()
                .filter_map(|statistic| match statistic.format {
                    vk::PipelineExecutableStatisticFormatKHR::UINT64 => {
                        Some((text(&statistic.name), statistic.value.u64))
                    }
                    _ => None,
                })
                .collect())
        }
    }

    unsafe fn assembly(&self, info: &vk::PipelineExecutableInfoKHR<'_>) -> Result<String> {
        let get = self
            .properties
            .fp()
            .get_pipeline_executable_internal_representations_khr;
        let device = self.device.handle();
        // SAFETY: as for the caller. Asked three times: for how many there are, for how long they are, for them.
        unsafe {
            let mut count = 0;
            get(device, info, &mut count, std::ptr::null_mut()).result()?;
            let mut found =
                vec![vk::PipelineExecutableInternalRepresentationKHR::default(); count as usize];
            get(device, info, &mut count, found.as_mut_ptr()).result()?;
            let mut data: Vec<Vec<u8>> = found.iter().map(|it| vec![0; it.data_size]).collect();
            for (it, data) in found.iter_mut().zip(&mut data) {
                it.p_data = data.as_mut_ptr().cast();
            }
            get(device, info, &mut count, found.as_mut_ptr()).result()?;
            let (_, assembly) = found
                .iter()
                .zip(&data)
                .find(|(it, _)| text(&it.name) == "Assembly")
                .context("the driver shows no assembly: Mesa was built without a disassembler")?;
            let assembly = CStr::from_bytes_until_nul(assembly)?;
            Ok(assembly.to_string_lossy().into_owned())
        }
    }
}

/// A text in a fixed array.
fn text(chars: &[c_char]) -> String {
    let bytes: Vec<u8> = chars
        .iter()
        .take_while(|byte| **byte != 0)
        .map(|byte| *byte as u8)
        .collect();
    String::from_utf8_lossy(&bytes).into_owned()
}
