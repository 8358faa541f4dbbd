//! The arguments that say how a model answers, and opening it.

use std::fs::File;
use std::io::Read as _;
use std::path::PathBuf;

use anyhow::Context as _;
use chrono::NaiveDate;

use super::target::Target;
use super::{Failure, eprint, eprint_note};
use crate::engine::DeviceChoice;
use crate::inference::{Folders, Loaded, Options};
use crate::ml::execution::{Execution, Kind};
use crate::ml::fused::Packing;
use crate::ml::generation_config::GenerationConfig;
use crate::ml::model::CausalLm;
use crate::ml::place::{Place, Wanted};
use crate::ml::sampling::Sampling;
use crate::text::template::LONGEST;

/// How a model answers. What is not given is what the model's `generation_config.json` says, else transformers' default: greedy.
#[derive(clap::Args)]
#[command(next_help_heading = "How it answers")]
pub(super) struct AnswerArgs {
    /// The most tokens of an answer [default: the model's setting, else 512]
    #[arg(long, value_name = "N")]
    max_new_tokens: Option<usize>,
    /// Takes the most probable token each time, whatever the model's settings say
    #[arg(long, conflicts_with_all = ["temperature", "top_k", "top_p", "min_p"])]
    greedy: bool,
    /// Draws tokens with this temperature; 0 is greedy
    #[arg(long, value_name = "X")]
    temperature: Option<f64>,
    /// Draws from the N most probable tokens; 0 is all of them
    #[arg(long, value_name = "N")]
    top_k: Option<usize>,
    /// Draws from the fewest tokens that have this probability together
    #[arg(long, value_name = "P")]
    top_p: Option<f64>,
    /// Draws from tokens whose probability is at least this part of the largest
    #[arg(long, value_name = "P")]
    min_p: Option<f64>,
    /// Divides the scores of tokens that occurred already; 1 changes nothing
    #[arg(long, value_name = "X")]
    repetition_penalty: Option<f64>,
    /// Decides on the draws: the same seed gives the same answers
    #[arg(long, value_name = "N", default_value_t = 0)]
    seed: u64,
    /// Ends an answer where this text comes; may be repeated
    #[arg(long, value_name = "TEXT")]
    stop: Vec<String>,
    /// A chat template to use instead of the model's own
    #[arg(long, value_name = "FILE")]
    template: Option<PathBuf>,
    /// What the template is told of the day, as YYYY-MM-DD [default: today]
    #[arg(long, value_name = "DATE")]
    date: Option<NaiveDate>,
    /// Computes matrix products in bf16, which is faster on some processors and rounds more; otherwise in f32
    #[arg(long)]
    bf16: bool,
    /// Where answers are computed: `cpu`, `gpu`, `gpu:1` or `auto`
    #[arg(long, value_name = "DEVICE", default_value_t = DeviceChoice::Cpu)]
    device: DeviceChoice,
}

/// The most tokens of an answer where nobody says anything.
const MAX_NEW_TOKENS: usize = 512;

impl AnswerArgs {
    /// How answers are made, by what is given and what the model says.
    pub(super) fn options(&self, model: &GenerationConfig) -> Result<Options, Failure> {
        let theirs = model.sampling;
        let draws = self.top_k.is_some() || self.top_p.is_some() || self.min_p.is_some();
        let greedy = self.greedy || self.temperature == Some(0.);
        let sampling = Sampling {
            do_sample: !greedy && (theirs.do_sample || draws || self.temperature.is_some()),
            temperature: self
                .temperature
                .filter(|_| !greedy)
                .unwrap_or(theirs.temperature),
            top_k: self.top_k.unwrap_or(theirs.top_k),
            top_p: self.top_p.unwrap_or(theirs.top_p),
            min_p: self.min_p.or(theirs.min_p),
            repetition_penalty: self.repetition_penalty.unwrap_or(theirs.repetition_penalty),
        };
        let usage = |text: String| Failure::Usage(super::error::plain(&text));
        sampling.check().map_err(|error| usage(error.to_string()))?;
        if self.stop.iter().any(String::is_empty) {
            return Err(usage("`--stop` is empty: expected a text".to_owned()));
        }
        Ok(Options {
            sampling,
            seed: self.seed,
            max_new_tokens: self
                .max_new_tokens
                .or(model.max_new_tokens)
                .unwrap_or(MAX_NEW_TOKENS),
            stop: self.stop.clone(),
        })
    }

    /// Opens the place where answers are computed.
    pub(super) fn place(&self) -> Result<Place, Failure> {
        let wanted = match self.device {
            DeviceChoice::Cpu => Wanted::Cpu,
            DeviceChoice::Auto => Wanted::Auto,
            DeviceChoice::Gpu(number) => Wanted::Gpu(number),
        };
        let place = Place::open(wanted).map_err(|why| self.no_device(&why))?;
        if let Some(why) = place.instead() {
            eprint(&format!("note: computes on the processor: {why}\n"));
        }
        Ok(place)
    }

    /// Runs a model in that place.
    pub(super) fn execution<'m>(
        &self,
        model: &'m CausalLm,
        place: &Place,
    ) -> Result<Execution<'m>, Failure> {
        let execution = Execution::placed(model, Packing::default(), place);
        let execution = execution.map_err(|why| self.no_device(&why))?;
        if let (Some(adapter), Kind::Fused(_) | Kind::Reference) =
            (place.adapter(), execution.kind())
        {
            let why = execution.fallback().unwrap_or("it lacks something");
            let name = &adapter.name;
            eprint(&format!(
                "note: computes on the processor, for {name} can't: {why}\n"
            ));
        }
        Ok(execution)
    }

    fn no_device(&self, why: &str) -> Failure {
        let message = format!("`--device {}` can't be had: {why}", self.device);
        let hint = "with `--device auto` the processor computes where no GPU can, and `pipeline doctor` lists the GPUs";
        Failure::Usage(super::error::with_hint(&message, hint))
    }

    /// Opens a model.
    fn load(&self, folders: &Folders, place: &Place) -> Result<Loaded, Failure> {
        let template =
            match &self.template {
                None => None,
                Some(path) => {
                    let read = || -> anyhow::Result<String> {
                        let mut text = String::new();
                        let longest = LONGEST as u64 + 1;
                        File::open(path)?.take(longest).read_to_string(&mut text)?;
                        Ok(text)
                    };
                    let text = read();
                    Some(text.with_context(|| {
                        format!("could not read the template `{}`", path.display())
                    })?)
                }
            };
        let today = || chrono::Local::now().date_naive();
        let date = self.date.unwrap_or_else(today);
        let mut loaded = Loaded::open(folders, self.bf16, template.as_deref(), date)?;
        loaded.move_to(place)?;
        Ok(loaded)
    }

    /// Opens a target and, with `compare`, what it is compared with, if that is another model in memory, to be run in a place.
    pub(super) fn load_sides(
        &self,
        target: &Target,
        compare: bool,
        place: &Place,
    ) -> Result<(Loaded, Option<Loaded>), Failure> {
        if let Some(note) = &target.note {
            eprint_note(note);
        }
        let tuned = self.load(&target.tuned, place)?;
        let left_out = &tuned.generation().left_out;
        if !left_out.is_empty() {
            eprint(&format!(
                "warning: `generation_config.json` sets {}, which this program does not compute\n",
                left_out.join(", ")
            ));
        }
        let base = match (&target.tuned.adapter, &target.base) {
            _ if !compare => None,
            // The base is in memory with its adapter.
            (Some(_), _) => None,
            (None, Some(base)) => Some(self.load(base, place)?),
            (None, None) => {
                let message = format!("`{}` was made of no other model", target.name);
                let hint = "give the folder to compare with as `--base DIR`";
                return Err(Failure::Usage(super::error::with_hint(&message, hint)));
            }
        };
        Ok((tuned, base))
    }
}
