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
    /// The bytes of its own memory, where they are known: those of a GPU with Vulkan.
    pub memory: Option<u64>,
    pub(crate) inner: wgpu::Adapter,
    pub(crate) instance: wgpu::Instance,
}

/// The interfaces in which kernels run.
fn interfaces() -> wgpu::Backends {
    wgpu::Backends::VULKAN | wgpu::Backends::METAL | wgpu::Backends::DX12
}

/// The bytes of an adapter's largest heap of its own memory.
#[cfg(not(target_vendor = "apple"))]
fn memory(adapter: &wgpu::Adapter) -> Option<u64> {
    /// `VK_MEMORY_HEAP_DEVICE_LOCAL_BIT`
    const DEVICE_LOCAL: u32 = 1;
    // SAFETY: the adapter is only asked, and neither destroyed nor kept.
    let adapter = unsafe { adapter.as_hal::<wgpu::hal::api::Vulkan>() }?;
    let instance = adapter.shared_instance().raw_instance();
    // SAFETY: the physical device is one of this instance, and both live as long as the adapter.
    let found =
        unsafe { instance.get_physical_device_memory_properties(adapter.raw_physical_device()) };
    let heaps = found.memory_heaps.into_iter();
    let heaps = heaps.take(found.memory_heap_count as usize);
    let own = heaps.filter(|heap| heap.flags.as_raw() & DEVICE_LOCAL != 0);
    own.map(|heap| heap.size).max()
}

/// Metal tells a budget, and no memory.
#[cfg(target_vendor = "apple")]
fn memory(_: &wgpu::Adapter) -> Option<u64> {
    None
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
            let software = info.device_type == wgpu::DeviceType::Cpu;
            Adapter {
                memory: if software { None } else { memory(&inner) },
                name: info.name,
                driver: driver.collect::<Vec<_>>().join(" "),
                interface: info.backend.to_str().to_owned(),
                software,
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
