//! The fixture of the tests of trainings.

use std::path::Path;

use crate::engine::Context;

/// A temporary folder with tokens, and with the output folders of stages.
pub(super) struct Fixture {
    folder: tempfile::TempDir,
}

impl Fixture {
    /// A fixture with the tokens that `write_tokens` writes to a folder.
    pub(super) fn new(write_tokens: fn(&Path)) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let tokens = folder.path().join("tokens");
        std::fs::create_dir(&tokens).unwrap();
        write_tokens(&tokens);
        Self { folder }
    }

    /// The temporary folder.
    pub(super) fn path(&self) -> &Path {
        self.folder.path()
    }

    /// The context of a stage whose output is the folder `name` here, with `tokens` among its inputs.
    pub(super) fn context(&self, name: &str, inputs: &[(&str, &Path)]) -> Context {
        let tokens = self.path().join("tokens");
        let inputs = [inputs, &[("tokens", tokens.as_path())]].concat();
        Context::for_test(&self.path().join(name), &inputs, &[])
    }
}
