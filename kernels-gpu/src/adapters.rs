//! The GPUs of this machine.

use cubecl::future::block_on;
use cubecl::wgpu::wgpu;

/// One adapter: a GPU with a driver, or a program that computes in its stead.
#[derive(Debug, Clone)]
pub struct Adapter {
    /// The name that the driver gives.
    pub name: String,
    /// The driver's name and version.
    pub driver: String,
    /// The graphics interface: "vulkan", "metal" or "dx12".
    pub interface: String,
    /// Whether a processor computes what a GPU should (Mesa's lavapipe): right, but slow.
    pub software: bool,
    /// The most bytes of a buffer that a kernel can be given.
    pub largest_binding: u64,
    /// The most bytes that the units of a cube (a workgroup) share.
    pub shared_memory: u32,
    /// The most units of a cube.
    pub units: u32,
    /// The most buffers of a kernel.
    pub bindings: u32,
    pub(crate) inner: wgpu::Adapter,
    pub(crate) instance: wgpu::Instance,
}

/// The interfaces in which kernels run.
fn interfaces() -> wgpu::Backends {
    wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12
}

/// All adapters of this machine, those of hardware first. The list is empty where there is no driver.
pub fn adapters() -> Vec<Adapter> {
    if (wgpu::Instance::enabled_backend_features() & interfaces()).is_empty() {
        return Vec::new();
    }
    let instance = wgpu::Instance::new(wgpu::InstanceDescriptor {
        backends: interfaces(),
        // Debug builds would look for validation layers; whoever wants these asks the loader (VK_INSTANCE_LAYERS).
        flags: wgpu::InstanceFlags::empty(),
        ..wgpu::InstanceDescriptor::new_without_display_handle()
    });
    let found = block_on(instance.enumerate_adapters(interfaces()));
    let mut all: Vec<Adapter> = { found }
        .into_iter()
        .map(|inner| {
            let (info, limits) = (inner.get_info(), inner.limits());
            let driver = [info.driver.trim(), info.driver_info.trim()];
            let driver = driver.into_iter().filter(|part| !part.is_empty());
            Adapter {
                name: info.name,
                driver: driver.collect::<Vec<_>>().join(" "),
                interface: info.backend.to_str().to_owned(),
                software: info.device_type == wgpu::DeviceType::Cpu,
                largest_binding: limits
                    .max_storage_buffer_binding_size
                    .min(limits.max_buffer_size),
                shared_memory: limits.max_compute_workgroup_storage_size,
                units: limits.max_compute_invocations_per_workgroup,
                bindings: limits.max_storage_buffers_per_shader_stage,
                inner,
                instance: instance.clone(),
            }
        })
        .collect();
    all.sort_by_key(|adapter| adapter.software);
    all
}
