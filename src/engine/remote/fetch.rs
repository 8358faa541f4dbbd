//! Decides which files have to come from the remote before a run, and which may stay there.
//!
//! A result that nobody reads here needs no files here: its record tells its contents, and those decide what is fresh below it.
//! Files are wanted of the last stages, of outputs, and of whatever a stage reads that will run.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::Sender;

use super::super::Event;
use super::super::plan::{Inspection, Session, known};
use super::super::sources::Sources;

impl Session<'_> {
    /// Before a run: fetches the files it needs, and notes which results are fresh without theirs. A result that can't be had
    /// counts as absent, and what it is made from is looked at again.
    pub(crate) fn fetch(
        &self,
        needed: &[bool],
        targets: &[usize],
        sources: &mut Sources,
        events: &Sender<Event>,
        cancel: &AtomicBool,
    ) -> anyhow::Result<()> {
        if !self.shared.pulls() && !self.store.has_remote_only()? {
            return self.shared.check();
        }
        let wanted = self.wanted(needed, targets);
        loop {
            let inspections = self.inspect(needed, sources);
            let mut missed = false;
            let obtainable = self.shared.pulls();
            for index in self.lacking(&inspections, &wanted, obtainable) {
                let Some(remote_only) = known(&inspections, index) else {
                    continue;
                };
                if cancel.load(Ordering::Relaxed) {
                    return Ok(());
                }
                if !self.shared.pulls() {
                    self.shared.distrust(remote_only);
                    missed = true;
                    continue;
                }
                let name = &self.graph.nodes[index].name;
                // A reporter that is gone misses nothing else.
                let _ = events.send(Event::StageFetching {
                    stage: name.clone(),
                });
                missed |= self
                    .shared
                    .restore(self.store, remote_only, (name, events), cancel)?
                    .is_none();
            }
            self.shared.check()?;
            if missed && !cancel.load(Ordering::Relaxed) {
                continue;
            }
            for inspection in inspections.into_iter().flatten() {
                if let Some(fingerprint) = inspection.fingerprint.filter(|_| inspection.remote_only)
                {
                    self.shared.set_remote_only(&fingerprint);
                }
            }
            return Ok(());
        }
    }

    /// Fetches the files of these stages' results, and of no others. Gives for each stage whether its files are here now.
    pub fn pull(
        &self,
        targets: &[usize],
        events: &Sender<Event>,
        cancel: &AtomicBool,
    ) -> anyhow::Result<Vec<bool>> {
        let _in_use = self.store.use_results(cancel, &mut |holder| {
            let holder = holder.to_owned();
            // A reporter that is gone misses nothing else.
            let _ = events.send(Event::RunWaiting { holder });
        })?;
        let (shared, _) = self.shared.open(self.store, events);
        let needed = self.graph.needed(targets);
        let all: Vec<usize> = (0..needed.len()).collect();
        let targets = if targets.is_empty() { &all } else { targets };
        let mut sources = self.sources();
        self.fetch(&needed, targets, &mut sources, events, cancel)?;
        drop(shared);
        // Only spares work next time.
        let _ = sources.save();
        let inspections = self.inspect(&needed, &mut sources);
        let here = |inspection: Option<&Inspection>| {
            inspection
                .is_some_and(|inspection| inspection.content.is_some() && !inspection.remote_only)
        };
        Ok((0..needed.len())
            .map(|index| here(inspections[index].as_ref()))
            .collect())
    }

    /// The stages whose files are wanted whoever reads them.
    pub(crate) fn wanted(&self, needed: &[bool], targets: &[usize]) -> Vec<bool> {
        let mut wanted = vec![false; self.graph.nodes.len()];
        if targets.is_empty() {
            for (index, readers) in self.graph.readers().iter().enumerate() {
                wanted[index] = readers.is_empty();
            }
            for &index in &self.outputs {
                wanted[index] = true;
            }
        }
        for &index in targets {
            wanted[index] = true;
        }
        for (wanted, needed) in wanted.iter_mut().zip(needed) {
            *wanted &= needed;
        }
        wanted
    }

    /// The stages whose files are not here but needed: wanted, or read by a stage that may run. If they can't be obtained, they
    /// have to run themselves, and need what they read.
    pub(crate) fn lacking(
        &self,
        inspections: &[Option<Inspection>],
        wanted: &[bool],
        obtainable: bool,
    ) -> Vec<usize> {
        let mut read = wanted.to_vec();
        let mut lacking = Vec::new();
        for &index in self.graph.order.iter().rev() {
            let Some(inspection) = &inspections[index] else {
                continue;
            };
            let remote_only = inspection.remote_only;
            if remote_only && read[index] {
                lacking.push(index);
            }
            if inspection.content.is_none() || (remote_only && read[index] && !obtainable) {
                for &input in &self.graph.inputs[index] {
                    read[input] = true;
                }
            }
        }
        lacking.reverse();
        lacking
    }
}
