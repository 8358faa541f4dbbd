//! An opened adapter: allocations, copies and the counts of both.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, OnceLock};

use cubecl::MemoryScope;
use cubecl::future::block_on;
use cubecl::prelude::{Client, CubeCount, CubeDim};
use cubecl::server::ServerError;
use cubecl::wgpu::{RuntimeOptions, WgpuSetup, try_init_device, wgpu};

use crate::adapters::{Adapter, adapters};
use crate::buffer::Buffer;
use crate::counters::{Counters, Counts};
use crate::error::{Error, text};

/// The units of the cubes of most kernels.
pub(crate) const UNITS: u32 = 256;
/// The bytes that the units of a cube share in the kernel that needs most.
const SHARED_MEMORY: u32 = 16_384;
/// The buffers of the kernel that has most, and the one in which its numbers are passed.
const BINDINGS: u32 = 10;

/// An adapter that was opened. Its buffers and operations belong together: one device's buffer is no argument for another's operation.
pub struct Device {
    pub(crate) client: Client,
    #[cfg(test)]
    pub(crate) raw: wgpu::Device,
    adapter: Adapter,
    counters: Arc<Counters>,
    /// The most bytes of one buffer of a weight.
    weight_part: u64,
    /// The most bytes that may be held.
    memory: AtomicU64,
    /// The most buffers that may be asked for.
    allocations: AtomicU64,
    /// What failed first.
    failure: OnceLock<Error>,
    /// Stands for an argument that a kernel doesn't read.
    pub(crate) nothing: Buffer,
}

impl std::fmt::Debug for Device {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let mut out = formatter.debug_struct("Device");
        out.field("adapter", &self.adapter).finish_non_exhaustive()
    }
}

impl Device {
    /// Opens adapter `number` of [`adapters`].
    ///
    /// # Errors
    /// If there is no such adapter, its limits are too small, or its driver gives no device.
    pub fn open(number: usize) -> Result<Self, Error> {
        let all = adapters();
        let count = all.len();
        match all.into_iter().nth(number) {
            Some(adapter) => Self::of(adapter),
            None => Err(Error::NoAdapter { number, count }),
        }
    }

    /// Opens an adapter.
    ///
    /// # Errors
    /// If its limits are too small, or its driver gives no device.
    pub fn of(adapter: Adapter) -> Result<Self, Error> {
        let unusable = |reason: String| Error::Unusable {
            name: adapter.name.clone(),
            reason,
        };
        for (found, needed, what) in [
            (adapter.units, UNITS, "units in a cube"),
            (
                adapter.shared_memory,
                SHARED_MEMORY,
                "bytes of shared memory",
            ),
            (adapter.bindings, BINDINGS, "buffers of a kernel"),
        ] {
            if found < needed {
                return Err(unusable(format!(
                    "it has {found} {what}, {needed} are needed"
                )));
            }
        }
        let features = adapter.inner.features();
        let request = adapter.inner.request_device(&wgpu::DeviceDescriptor {
            label: None,
            required_features: features
                .difference(wgpu::Features::MAPPABLE_PRIMARY_BUFFERS)
                .difference(wgpu::Features::all_experimental_mask()),
            required_limits: adapter.inner.limits(),
            memory_hints: wgpu::MemoryHints::MemoryUsage,
            trace: wgpu::Trace::Off,
            experimental_features: wgpu::ExperimentalFeatures::disabled(),
        });
        let (device, queue) = block_on(request).map_err(|error| unusable(text(&error)))?;
        #[cfg(test)]
        let raw = device.clone();
        let setup = WgpuSetup {
            instance: adapter.instance.clone(),
            adapter: adapter.inner.clone(),
            device,
            queue,
            backend: adapter.inner.get_info().backend,
        };
        let options = RuntimeOptions::try_default().map_err(|error| unusable(text(&error)))?;
        let device = try_init_device(setup, options).map_err(|error| unusable(text(&error)))?;
        let mut client = cubecl::Device::from(device).client();
        // Without this each thread has a queue and memory of its own.
        let queue = client.empty(4).stream;
        // SAFETY: the queue is one of the client's own, and is chosen before the first buffer that is used: all are made in it.
        unsafe { client.set_stream(queue) };
        Ok(Self::with_client(
            client,
            adapter,
            #[cfg(test)]
            raw,
        ))
    }

    /// A device that has done nothing yet, on an opened adapter. All threads put their operations into the one queue of the client, where
    /// memory that was given back by one is taken by the next.
    fn with_client(client: Client, adapter: Adapter, #[cfg(test)] raw: wgpu::Device) -> Self {
        let counters = Arc::new(Counters::default());
        let nothing = Buffer::new(client.empty(4), 1, counters.clone());
        Self {
            client,
            #[cfg(test)]
            raw,
            weight_part: adapter.largest_binding,
            memory: AtomicU64::new(u64::MAX),
            allocations: AtomicU64::new(u64::MAX),
            failure: OnceLock::new(),
            adapter,
            counters,
            nothing,
        }
    }

    /// The same adapter as a device that has done nothing and failed in nothing yet. Kernels that were compiled for one are there for the
    /// other.
    #[must_use]
    pub fn again(&self) -> Self {
        Self::with_client(
            self.client.clone(),
            self.adapter.clone(),
            #[cfg(test)]
            self.raw.clone(),
        )
    }

    /// The adapter.
    pub fn adapter(&self) -> &Adapter {
        &self.adapter
    }

    /// The same device with weights in buffers of at most `bytes`; the adapter's limit holds in any case.
    #[must_use]
    pub fn with_weight_parts(mut self, bytes: u64) -> Self {
        self.weight_part = bytes.min(self.adapter.largest_binding);
        self
    }

    /// The most bytes of one buffer of a weight.
    pub(crate) fn weight_part(&self) -> u64 {
        self.weight_part
    }

    /// Sets the most bytes that may be held at a time; allocations beyond fail as if the device had no more memory.
    pub fn limit_memory(&self, bytes: u64) {
        self.memory.store(bytes, Ordering::Relaxed);
    }

    /// Sets how many buffers may be asked for; allocations beyond fail as if the device had no more memory.
    pub fn limit_allocations(&self, count: u64) {
        self.allocations.store(count, Ordering::Relaxed);
    }

    /// What the device was made to do so far.
    pub fn counts(&self) -> Counts {
        self.counters.counts()
    }

    /// The bytes that are reserved on the adapter, for buffers that are held and for those to come: what is given back is kept for the next.
    pub fn reserved(&self) -> u64 {
        let report = self.client.memory_report(MemoryScope::Device);
        let streams = report.streams.iter();
        streams
            .map(|stream| stream.pools.usage().bytes_reserved)
            .sum()
    }

    /// A buffer of `length` words with unspecified contents.
    ///
    /// # Errors
    /// If it is larger than the adapter binds, or there is no memory left for it.
    pub fn allocate(&self, length: usize) -> Result<Buffer, Error> {
        self.make(length, None)
    }

    /// A buffer with these floats.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn upload(&self, values: &[f32]) -> Result<Buffer, Error> {
        self.make(values.len(), Some(bytemuck::cast_slice(values)))
    }

    /// A buffer with these words.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn upload_words(&self, values: &[u32]) -> Result<Buffer, Error> {
        self.make(values.len(), Some(bytemuck::cast_slice(values)))
    }

    /// A buffer with these bytes, four in a word and the first one lowest; the last word is filled up with zeros.
    ///
    /// # Errors
    /// As [`Device::allocate`].
    pub fn upload_bytes(&self, bytes: &[u8]) -> Result<Buffer, Error> {
        if bytes.len().is_multiple_of(4) {
            return self.make(bytes.len() / 4, Some(bytes));
        }
        let mut padded = bytes.to_vec();
        padded.resize(bytes.len().next_multiple_of(4), 0);
        self.make(padded.len() / 4, Some(&padded))
    }

    /// A buffer as [`Device::allocate`] makes it. Where that fails, the device remembers why ([`Device::failure`]): from then on it does
    /// nothing, and all that is read from it is that error. So a pass of many operations needs to look for errors at its end alone.
    pub fn take(&self, length: usize) -> Buffer {
        self.or_remember(self.allocate(length), length)
    }

    /// A buffer with these floats, as [`Device::take`] makes one.
    pub fn take_with(&self, values: &[f32]) -> Buffer {
        self.or_remember(self.upload(values), values.len())
    }

    /// A buffer with these words, as [`Device::take`] makes one.
    pub fn take_with_words(&self, values: &[u32]) -> Buffer {
        self.or_remember(self.upload_words(values), values.len())
    }

    fn or_remember(&self, made: Result<Buffer, Error>, length: usize) -> Buffer {
        made.unwrap_or_else(|error| {
            // The first failure is the one to be told.
            let _ = self.failure.set(error);
            Buffer::missing(length, self.counters.clone())
        })
    }

    /// The failure after which the device does nothing any more.
    pub fn failure(&self) -> Option<&Error> {
        self.failure.get()
    }

    fn ready(&self) -> Result<(), Error> {
        self.failure().map_or(Ok(()), |error| Err(error.clone()))
    }

    /// Whether an operation on `count` values has nothing to do: there are none, or something failed before.
    pub(crate) fn idle(&self, count: usize) -> bool {
        count == 0 || self.failure().is_some()
    }

    fn make(&self, length: usize, contents: Option<&[u8]>) -> Result<Buffer, Error> {
        self.ready()?;
        let bytes = Buffer::bytes_of(length);
        let (limit, held) = (self.adapter.largest_binding, self.counts().held_bytes);
        if bytes > limit {
            return Err(Error::TooLarge { bytes, limit });
        }
        let full = |reason: String| Error::OutOfMemory {
            bytes,
            held,
            reason,
        };
        let allowed = self.memory.load(Ordering::Relaxed);
        if held.saturating_add(bytes) > allowed {
            return Err(full(format!("{allowed} bytes may be used")));
        }
        let asked = self.counts().allocations;
        if asked >= self.allocations.load(Ordering::Relaxed) {
            return Err(full(format!("{asked} buffers may be asked for")));
        }
        let handle = match contents.filter(|contents| !contents.is_empty()) {
            Some(contents) => {
                self.counters.uploads.fetch_add(1, Ordering::Relaxed);
                self.counters.uploaded.fetch_add(bytes, Ordering::Relaxed);
                self.client.create_from_slice(contents)
            }
            None => self.client.empty(bytes as usize),
        };
        match self.client.check([&handle]) {
            Ok(()) => Ok(Buffer::new(handle, length, self.counters.clone())),
            Err(error) if error.is_device_poisoned() => Err(failed(&error)),
            Err(error) => Err(full(text(&error))),
        }
    }

    /// Overwrites a buffer's floats.
    ///
    /// # Panics
    /// If `values` has another length than the buffer.
    pub fn write(&self, buffer: &mut Buffer, values: &[f32]) {
        assert_eq!(values.len(), buffer.len(), "the floats that are written");
        if self.idle(values.len()) {
            return;
        }
        let bytes: &[u8] = bytemuck::cast_slice(values);
        self.counters.uploads.fetch_add(1, Ordering::Relaxed);
        let size = bytes.len() as u64;
        self.counters.uploaded.fetch_add(size, Ordering::Relaxed);
        let bytes = cubecl::bytes::Bytes::from_bytes_vec(bytes.to_vec());
        if let Some(handle) = &buffer.handle {
            self.client.write(handle, bytes);
        }
    }

    /// A buffer's floats. This waits for all operations before it.
    ///
    /// # Errors
    /// If one of the operations that led to them failed, or the device was lost.
    pub fn read(&self, buffer: &Buffer) -> Result<Vec<f32>, Error> {
        self.read_bytes(buffer, bytemuck::pod_collect_to_vec)
    }

    /// A buffer's words, as [`Device::read`] reads floats.
    ///
    /// # Errors
    /// As [`Device::read`].
    pub fn read_words(&self, buffer: &Buffer) -> Result<Vec<u32>, Error> {
        self.read_bytes(buffer, bytemuck::pod_collect_to_vec)
    }

    fn read_bytes<T>(
        &self,
        buffer: &Buffer,
        collect: impl Fn(&[u8]) -> Vec<T>,
    ) -> Result<Vec<T>, Error> {
        self.ready()?;
        if buffer.is_empty() {
            return Ok(Vec::new());
        }
        let Some(handle) = &buffer.handle else {
            return Err(Error::Failed("a buffer has no memory".into()));
        };
        let bytes = self.client.read_one(handle.clone());
        let bytes = bytes.map_err(|error| failed(&error))?;
        let size = 4 * buffer.len();
        self.counters.downloads.fetch_add(1, Ordering::Relaxed);
        let counted = size as u64;
        self.counters
            .downloaded
            .fetch_add(counted, Ordering::Relaxed);
        let Some(bytes) = bytes.get(..size) else {
            let found = bytes.len();
            return Err(Error::Failed(format!("it gave {found} of {size} bytes")));
        };
        Ok(collect(bytes))
    }

    /// Waits for all operations.
    ///
    /// # Errors
    /// If the device was lost.
    pub fn wait(&self) -> Result<(), Error> {
        self.ready()?;
        block_on(self.client.sync()).map_err(|error| failed(&error))
    }

    /// Counts a launch of as many cubes as are asked for, in rows, as no adapter has more than 65,535 side by side.
    pub(crate) fn cubes(&self, count: usize) -> CubeCount {
        const ROW: usize = 65_535;
        self.counters.launches.fetch_add(1, Ordering::Relaxed);
        let (width, height) = if count <= ROW {
            (count, 1)
        } else {
            let height = count.div_ceil(ROW);
            (count.div_ceil(height), height)
        };
        CubeCount::Static(width as u32, height as u32, 1)
    }

    /// A launch with a unit for each of `count` values.
    pub(crate) fn units(&self, count: usize) -> (CubeCount, CubeDim) {
        let cubes = self.cubes(count.div_ceil(UNITS as usize));
        (cubes, CubeDim::new_1d(UNITS))
    }
}

fn failed(error: &ServerError) -> Error {
    Error::Failed(text(error))
}
