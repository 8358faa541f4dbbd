//! A weights file from anybody: its header is refused, or every tensor in it lies inside the file.
#![no_main]

use std::fs;
use std::path::PathBuf;
use std::sync::LazyLock;

use candle_core::Device;
use libfuzzer_sys::fuzz_target;
use pipeline::ml::io::weights::Weights;
use tempfile::TempDir;

static FOLDER: LazyLock<TempDir> = LazyLock::new(|| TempDir::new().expect("a temporary folder"));

fuzz_target!(|data: &[u8]| {
    let path: PathBuf = FOLDER.path().join("model.safetensors");
    fs::write(&path, data).expect("a file");
    let Ok(weights) = Weights::open(FOLDER.path()) else {
        return;
    };
    assert!(weights.bytes() <= data.len() as u64);
    for name in weights.names() {
        let raw = weights.raw(name).expect("a named tensor");
        assert!(raw.bytes().expect("its bytes").len() <= data.len());
        if let Ok(tensor) = weights.tensor(name, &Device::Cpu) {
            assert_eq!(tensor.dims(), raw.shape);
        }
        assert!(weights.file_of(name).is_some());
    }
    let _ = pipeline::ml::model::arch::Arch::read(FOLDER.path());
});
