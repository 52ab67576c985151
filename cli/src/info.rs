//! `info`: the adapters of this machine and what the kernels would use on each.

use std::fmt::Write as _;

use serde::Serialize;
use wgpu_optim::{OPTIONAL_FEATURES, ScalarPath, adapters, wgpu};

use crate::args::CommonArgs;
use crate::backend::NO_ADAPTER_HINT;
use crate::{Failure, print};

#[derive(Debug, Serialize)]
struct Report {
    adapters: Vec<AdapterReport>,
    cpu_threads: usize,
}

#[derive(Debug, Serialize)]
struct AdapterReport {
    name: String,
    backend: String,
    device_type: String,
    driver: String,
    max_storage_buffer_binding_bytes: u64,
    max_buffer_bytes: u64,
    min_storage_buffer_offset_alignment_bytes: u32,
    max_compute_workgroups_per_dimension: u32,
    max_storage_buffers_per_shader_stage: u32,
    /// Optional features that the kernels use, and this adapter has.
    features_used: Vec<String>,
    scalars: &'static str,
}

impl AdapterReport {
    fn new(adapter: &wgpu::Adapter) -> Self {
        let (info, limits) = (adapter.get_info(), adapter.limits());
        let used = adapter.features() & OPTIONAL_FEATURES;
        Self {
            name: info.name,
            backend: info.backend.to_string(),
            device_type: format!("{:?}", info.device_type),
            driver: format!("{} {}", info.driver, info.driver_info)
                .trim()
                .to_owned(),
            max_storage_buffer_binding_bytes: limits.max_storage_buffer_binding_size,
            max_buffer_bytes: limits.max_buffer_size,
            min_storage_buffer_offset_alignment_bytes: limits.min_storage_buffer_offset_alignment,
            max_compute_workgroups_per_dimension: limits.max_compute_workgroups_per_dimension,
            max_storage_buffers_per_shader_stage: limits.max_storage_buffers_per_shader_stage,
            features_used: used.iter_names().map(|(name, _)| name.to_owned()).collect(),
            scalars: match ScalarPath::offered_by(used, &limits) {
                ScalarPath::Immediates => "immediates",
                ScalarPath::Uniforms => "uniform ring",
            },
        }
    }
}

pub fn run(common: &CommonArgs) -> Result<(), Failure> {
    let backends = wgpu::Backends::from_env().unwrap_or(wgpu::Backends::all());
    let named = |report: &AdapterReport| {
        common
            .adapter
            .as_ref()
            .is_none_or(|text| report.name.to_lowercase().contains(&text.to_lowercase()))
    };
    let found = pollster::block_on(adapters(backends));
    let report = Report {
        adapters: found.iter().map(AdapterReport::new).filter(named).collect(),
        cpu_threads: rayon::current_num_threads(),
    };
    if common.json {
        print(&serde_json::to_string_pretty(&report).map_err(Failure::failed)?)
    } else {
        print(&report.to_text())
    }
}

impl Report {
    fn to_text(&self) -> String {
        let mut text = String::new();
        if self.adapters.is_empty() {
            text += &format!("no adapter: {NO_ADAPTER_HINT}\n\n");
        }
        for adapter in &self.adapters {
            // Writing to a string cannot fail.
            let _ = writeln!(
                text,
                "{} ({}, {})\n  driver            {}\n  storage binding   {} MiB at most, offsets in steps of {} bytes\n  \
                 buffer            {} MiB at most\n  workgroups        {} per dimension at most\n  \
                 storage buffers   {} per stage at most, the kernels bind 3\n  scalars           {}\n",
                adapter.name,
                adapter.backend,
                adapter.device_type,
                adapter.driver,
                adapter.max_storage_buffer_binding_bytes >> 20,
                adapter.min_storage_buffer_offset_alignment_bytes,
                adapter.max_buffer_bytes >> 20,
                adapter.max_compute_workgroups_per_dimension,
                adapter.max_storage_buffers_per_shader_stage,
                match adapter.features_used.is_empty() {
                    true => adapter.scalars.to_owned(),
                    false => format!("{} ({})", adapter.scalars, adapter.features_used.join(", ")),
                },
            );
        }
        text + &format!("CPU twin: {} threads\n", self.cpu_threads)
    }
}
