//! Where a model is run: on the processor, or on a GPU that is opened here.

#[cfg(feature = "gpu")]
use std::sync::Arc;

#[cfg(feature = "gpu")]
use pipeline_kernels_gpu as gpu;
use serde::Serialize;

/// What was asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Wanted {
    /// The processor.
    #[default]
    Cpu,
    /// The first GPU if there is one and it can do what is needed, else the processor.
    Auto,
    /// The GPU with this number.
    Gpu(usize),
}

/// A GPU of this machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Adapter {
    /// The name that its driver gives.
    pub name: String,
    /// The driver's name and version.
    pub driver: String,
    /// The graphics interface: "vulkan", "metal" or "dx12".
    pub interface: String,
    /// Whether a processor computes in its stead.
    pub software: bool,
    /// The most bytes of one buffer; larger weights are split.
    pub largest_binding: u64,
    /// The most bytes that the units of a workgroup share.
    pub shared_memory: u32,
    /// The bytes of its own memory, where they are known.
    pub memory: Option<u64>,
}

/// What a GPU was made to do.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Work {
    /// The kernels that were launched.
    pub launches: u64,
    /// The copies to the GPU, and their bytes.
    pub uploads: u64,
    /// See [`Work::uploads`].
    pub uploaded_bytes: u64,
    /// The copies from the GPU, and their bytes.
    pub downloads: u64,
    /// See [`Work::downloads`].
    pub downloaded_bytes: u64,
    /// The most bytes that were held at a time.
    pub peak_bytes: u64,
    /// The bytes that are reserved, for buffers that are held and for those to come.
    pub reserved_bytes: u64,
}

impl Work {
    /// What was done since an earlier time.
    #[must_use]
    pub fn since(self, before: Self) -> Self {
        Self {
            launches: self.launches - before.launches,
            uploads: self.uploads - before.uploads,
            uploaded_bytes: self.uploaded_bytes - before.uploaded_bytes,
            downloads: self.downloads - before.downloads,
            downloaded_bytes: self.downloaded_bytes - before.downloaded_bytes,
            ..self
        }
    }
}

/// The sentence of a program without the feature.
#[cfg(not(feature = "gpu"))]
const NOT_BUILT: &str = "this program was built without the feature `gpu`";

/// The GPUs of this machine, as `gpu:0`, `gpu:1` and so on count them: real ones first. `None` if the program was built without the feature
/// `gpu`.
pub fn adapters() -> Option<Vec<Adapter>> {
    #[cfg(feature = "gpu")]
    {
        Some(gpu::adapters().iter().map(described).collect())
    }
    #[cfg(not(feature = "gpu"))]
    {
        None
    }
}

/// A place where models are run.
#[derive(Debug, Clone)]
pub struct Place {
    #[cfg(feature = "gpu")]
    pub(super) wanted: Wanted,
    /// The GPU, if it is one.
    #[cfg(feature = "gpu")]
    pub(super) gpu: Option<Arc<gpu::Device>>,
    /// Why it is the processor although a GPU would have been taken.
    pub(super) instead: Option<String>,
}

impl Place {
    /// The processor.
    pub fn cpu() -> Self {
        Self {
            #[cfg(feature = "gpu")]
            wanted: Wanted::Cpu,
            #[cfg(feature = "gpu")]
            gpu: None,
            instead: None,
        }
    }

    /// Opens the place that is wanted.
    ///
    /// # Errors
    /// A GPU is wanted, and the program was built without the feature, or there is none with this number, or it can't be used. The error is a
    /// sentence.
    pub fn open(wanted: Wanted) -> Result<Self, String> {
        let found = match wanted {
            Wanted::Cpu => return Ok(Self::cpu()),
            #[cfg(feature = "gpu")]
            Wanted::Auto => open(None),
            #[cfg(feature = "gpu")]
            Wanted::Gpu(number) => open(Some(number)),
            #[cfg(not(feature = "gpu"))]
            _ => Err(NOT_BUILT.to_owned()),
        };
        match found {
            #[cfg(feature = "gpu")]
            Ok(device) => Ok(Self {
                wanted,
                gpu: Some(device),
                instead: None,
            }),
            #[cfg(not(feature = "gpu"))]
            Ok(()) => Ok(Self::cpu()),
            Err(why) if wanted == Wanted::Auto => Ok(Self {
                #[cfg(feature = "gpu")]
                wanted,
                #[cfg(feature = "gpu")]
                gpu: None,
                instead: Some(why),
            }),
            Err(why) => Err(why),
        }
    }

    /// The first GPU, opened once for all tests, as a place where nothing was done yet; `None` where there is no GPU, which is a failure with
    /// `PIPELINE_NEEDS_GPU=1`. Mesa's lavapipe is one that every processor can play.
    #[cfg(all(test, feature = "gpu"))]
    #[expect(
        clippy::disallowed_methods,
        clippy::print_stderr,
        reason = "a switch and a notice of the tests alone"
    )]
    pub(in crate::ml) fn of_tests() -> Option<Self> {
        use std::sync::OnceLock;

        static DEVICE: OnceLock<Option<gpu::Device>> = OnceLock::new();
        let opened = DEVICE.get_or_init(|| match gpu::Device::open(0) {
            Ok(device) => Some(device),
            Err(why) => {
                let needed =
                    std::env::var_os("PIPELINE_NEEDS_GPU").is_some_and(|value| value == "1");
                assert!(!needed, "{why}");
                eprintln!("skipped: {why}");
                None
            }
        });
        opened.as_ref().map(|device| Self {
            wanted: Wanted::Gpu(0),
            gpu: Some(Arc::new(device.again())),
            instead: None,
        })
    }

    /// The GPU, if it is one.
    pub fn adapter(&self) -> Option<Adapter> {
        #[cfg(feature = "gpu")]
        {
            self.gpu.as_ref().map(|gpu| described(gpu.adapter()))
        }
        #[cfg(not(feature = "gpu"))]
        {
            None
        }
    }

    /// What the GPU was made to do since it was opened.
    pub fn work(&self) -> Option<Work> {
        #[cfg(feature = "gpu")]
        {
            self.gpu.as_ref().map(|gpu| work(gpu))
        }
        #[cfg(not(feature = "gpu"))]
        {
            None
        }
    }

    /// Why it is the processor although a GPU would have been taken: a clause.
    pub fn instead(&self) -> Option<&str> {
        self.instead.as_deref()
    }
}

/// An adapter in our words.
#[cfg(feature = "gpu")]
fn described(adapter: &gpu::Adapter) -> Adapter {
    Adapter {
        name: adapter.name.clone(),
        driver: adapter.driver.clone(),
        interface: adapter.interface.clone(),
        software: adapter.software,
        largest_binding: adapter.largest_binding,
        shared_memory: adapter.shared_memory,
        memory: adapter.memory,
    }
}

/// Opens a GPU by its number, or the first one that is not software.
#[cfg(feature = "gpu")]
fn open(number: Option<usize>) -> Result<Arc<gpu::Device>, String> {
    let opened = match number {
        Some(number) => gpu::Device::open(number),
        None => match gpu::adapters().into_iter().find(|found| !found.software) {
            Some(adapter) => gpu::Device::of(adapter),
            None => {
                return Err(
                    "this machine has no GPU that Vulkan, Metal or DirectX 12 finds".into(),
                );
            }
        },
    };
    opened.map(Arc::new).map_err(|error| error.to_string())
}

/// What a device was made to do.
#[cfg(feature = "gpu")]
fn work(device: &gpu::Device) -> Work {
    let counts = device.counts();
    Work {
        launches: counts.launches,
        uploads: counts.uploads,
        uploaded_bytes: counts.uploaded_bytes,
        downloads: counts.downloads,
        downloaded_bytes: counts.downloaded_bytes,
        peak_bytes: counts.peak_bytes,
        reserved_bytes: device.reserved(),
    }
}
