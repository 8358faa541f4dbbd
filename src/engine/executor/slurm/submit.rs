//! Submits jobs, and tries again until Slurm takes them. Jobs that are alike and come together (combinations of a matrix, or shards of a
//! stage) are submitted as one array.

use std::ffi::OsString;
use std::path::Path;
use std::sync::Arc;
use std::sync::mpsc::{RecvTimeoutError, SendError, Sender};
use std::time::{Duration, Instant};

use anyhow::{anyhow, bail};

use super::super::super::control::Control;
use super::super::super::files::write_atomically;
use super::super::super::graph::declared;
use super::super::super::job::{ENVIRONMENT, JobFolder, LOG, SCRIPT, Submitted};
use super::super::super::part::Part;
use super::super::super::stage_events::StageEvents;
use super::super::super::task::Task;
use super::away::Away;
use super::client::{JobId, Trouble};
use super::gather::Role;
use super::script::{self, Location};
use super::{Answer, Like, NotPlaced, Order, PAUSE, Slurm, tell};

/// How long a submission is tried again while no controller answers.
const LONGEST_SILENCE: Duration = Duration::from_mins(15);
/// The jobs that have been collected are submitted when none like them has come for this time.
const QUIET: Duration = Duration::from_millis(300);
/// The same, where each job's task has to be sent to a remote before.
const QUIET_FAR: Duration = Duration::from_secs(2);
/// The longest pause between two attempts to submit. Each pause is longer than the one before by half.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

impl Slurm {
    /// Submits the job of a task.
    pub(super) fn submit(
        &self,
        folder: &JobFolder,
        task: &Task,
        events: &Arc<StageEvents>,
        control: &Control,
    ) -> anyhow::Result<JobId> {
        let order = self.order(folder, task, control)?;
        let teller = Teller {
            task,
            events,
            control,
        };
        let answer = match like(task, &order) {
            None => self.place_one(&order, &teller),
            Some(like) => self.place_together(&like, &order, &teller),
        };
        match answer {
            Ok(id) => {
                control.restart();
                Ok(id)
            }
            Err(NotPlaced::Refused(why)) => Err(anyhow!(why)),
            Err(NotPlaced::Stopped) => {
                control.check()?;
                bail!("interrupted")
            }
        }
    }

    /// Writes what a job needs, to its folder or to the remote.
    fn order(&self, folder: &JobFolder, task: &Task, control: &Control) -> anyhow::Result<Order> {
        let settings = &self.cluster.settings;
        let mut environment = script::environment(task, &self.env, &settings.env);
        note_scratch(task);
        let (location, environment) = if let Some(away) = self.away() {
            let digest = away.send(task, folder, control)?;
            environment.extend(away.variables().clone());
            let location = Location::Remote(Away::name(folder), digest);
            (location, Some(environment))
        } else {
            folder.write_private(ENVIRONMENT, &script::lines(&environment))?;
            (Location::Folder(folder.path().to_owned()), None)
        };
        // From here on a runner that comes after this one looks for the job by its name.
        let (name, element) = (self.name_of(&task.stage, folder), None);
        folder.write_submitted(&self.submitted(&name, element, None))?;
        folder.write_task(task)?;
        Ok(Order {
            stage: task.stage.clone(),
            folder: folder.clone(),
            options: settings.options(&task.resources, task.timeout),
            location,
            environment,
        })
    }

    fn submitted(&self, name: &str, element: Option<u32>, id: Option<u64>) -> Submitted {
        Submitted {
            executor: self.cluster.name.clone(),
            id,
            name: name.to_owned(),
            element,
        }
    }

    /// Submits a job, as one of an array if others like it come at the same time.
    fn place_together(&self, like: &Like, order: &Order, teller: &Teller<'_>) -> Answer {
        let most = self.client.largest_array().min(self.most_jobs()).max(1);
        let quiet = if order.environment.is_some() {
            QUIET_FAR
        } else {
            QUIET
        };
        match self.gathering.join(like, order.clone(), most, quiet) {
            Role::First(own, others) => self.lead(own, others, most, most, teller),
            Role::Other(word) => loop {
                // What waits to be submitted takes none of its time.
                teller.control.restart();
                match word.recv_timeout(PAUSE) {
                    Ok(Word::Lead(Rest { others, size })) => {
                        return self.lead(order.clone(), others, size, most, teller);
                    }
                    // The one before was stopped, and this one was not: it goes its own way.
                    Ok(Word::Answer(Err(NotPlaced::Stopped)))
                    | Err(RecvTimeoutError::Disconnected)
                        if teller.control.check().is_ok() =>
                    {
                        return self.place_one(order, teller);
                    }
                    Ok(Word::Answer(answer)) => return answer,
                    Err(RecvTimeoutError::Timeout) => {}
                    Err(RecvTimeoutError::Disconnected) => return Err(NotPlaced::Stopped),
                }
            },
        }
    }

    fn place_one(&self, order: &Order, teller: &Teller<'_>) -> Answer {
        self.lead(order.clone(), Vec::new(), 1, 1, teller)
    }

    /// Submits a job as one array with the first of others like it: `size` of them, or half as many, a quarter, and so on where the queue
    /// has no room for more. These have their answers at once. The next of the others submits the rest, in arrays of up to `most`.
    fn lead(
        &self,
        own: Order,
        mut others: Others,
        size: usize,
        most: usize,
        teller: &Teller<'_>,
    ) -> Answer {
        let mut orders = vec![own];
        let more = others.iter().take(size.saturating_sub(1));
        orders.extend(more.map(|(order, _)| order.clone()));
        let placed = loop {
            match self.place(&orders, teller) {
                Placed::TooMany => {
                    let left_out = orders.split_off((orders.len() / 2).max(1));
                    // They are in no array now: a runner that comes after this one must not look for them there.
                    for order in &left_out {
                        self.note_alone(order);
                    }
                }
                Placed::At(ids) => break Ok(ids),
                Placed::Not(why) => break Err(why),
            }
        };
        let mut answers: Vec<Answer> = match placed {
            Ok(ids) => ids.into_iter().map(Ok).collect(),
            Err(why) => orders.iter().map(|_| Err(why.clone())).collect(),
        };
        let rest = others.split_off(orders.len() - 1);
        for ((_, listener), answer) in others.into_iter().zip(answers.drain(1..)) {
            // One that is gone wants to know nothing.
            let _ = listener.send(Word::Answer(answer));
        }
        let own = answers.pop().unwrap_or(Err(NotPlaced::Stopped));
        // Of one that was stopped the others learn by hearing no more of it.
        if !matches!(own, Err(NotPlaced::Stopped)) {
            // There may be more room for them than there was for these.
            hand_on(rest, (2 * orders.len()).min(most));
        }
        own
    }

    /// Notes of a job that it is not submitted yet.
    fn note_alone(&self, order: &Order) {
        let name = self.name_of(&order.stage, &order.folder);
        // Where that fails, its submission notes it, or fails, too.
        let _ = order
            .folder
            .write_submitted(&self.submitted(&name, None, None));
    }

    /// Submits one job, or one array.
    fn place(&self, orders: &[Order], teller: &Teller<'_>) -> Placed {
        let Some(first) = orders.first() else {
            return Placed::At(Vec::new());
        };
        let is_array = orders.len() > 1;
        let elements = (0..).map(|element| is_array.then_some(element));
        let of = if is_array {
            declared(&first.stage)
        } else {
            &first.stage
        };
        let name = self.name_of(of, &first.folder);
        let note = |id: Option<u64>| -> anyhow::Result<()> {
            for (order, element) in orders.iter().zip(elements.clone()) {
                let submitted = self.submitted(&name, element, id);
                order.folder.write_submitted(&submitted)?;
            }
            Ok(())
        };
        let prepared = note(None).and_then(|()| self.arguments(orders, &name, of));
        let arguments = match prepared {
            Ok(arguments) => arguments,
            Err(error) => return Placed::Not(NotPlaced::Refused(format!("{error:#}"))),
        };
        let id = match self.insist(&arguments, first, &name, is_array, teller) {
            Ok(Some(id)) => id,
            Ok(None) => return Placed::TooMany,
            Err(why) => return Placed::Not(why),
        };
        if let Err(error) = note(Some(id)) {
            let _ = self.client.cancel(id);
            return Placed::Not(NotPlaced::Refused(format!("{error:#}")));
        }
        let id = |element| JobId { job: id, element };
        Placed::At(elements.take(orders.len()).map(id).collect())
    }

    /// The arguments of `sbatch`.
    fn arguments(&self, orders: &[Order], name: &str, of: &str) -> anyhow::Result<Vec<OsString>> {
        let Some(first) = orders.first() else {
            bail!("there is nothing to submit")
        };
        let (cluster, path) = (&self.cluster, first.folder.path());
        let locations: Vec<Location> = orders.iter().map(|order| order.location.clone()).collect();
        let node_store = cluster.settings.node_store.as_deref();
        let text = script::script(&locations, &cluster.program, node_store, of);
        first.folder.write_private(SCRIPT, &text)?;
        let environment = if first.environment.is_some() {
            "ALL"
        } else {
            "NIL"
        };
        let mut arguments: Vec<OsString> = vec![
            "--parsable".into(),
            format!("--export={environment}").into(),
            "--open-mode=append".into(),
            format!("--job-name={name}").into(),
        ];
        if orders.len() > 1 {
            arguments.push(format!("--array=0-{}", orders.len() - 1).into());
        }
        if orders.len() > 1 || first.environment.is_some() {
            // There is no folder that all of them see, or have.
            arguments.extend(["--output=/dev/null", "--chdir=/"].map(OsString::from));
        } else {
            arguments.push(format!("--output={LOG}").into());
            let mut chdir = OsString::from("--chdir=");
            chdir.push(path);
            arguments.push(chdir);
        }
        arguments.extend(first.options.iter().map(OsString::from));
        arguments.push(path.join(SCRIPT).into_os_string());
        Ok(arguments)
    }

    /// Calls `sbatch` until Slurm takes the job. Returns `None` for an array that the queue has no room for.
    fn insist(
        &self,
        arguments: &[OsString],
        order: &Order,
        name: &str,
        is_array: bool,
        teller: &Teller<'_>,
    ) -> Result<Option<u64>, NotPlaced> {
        let control = teller.control;
        let mut silence: Option<Instant> = None;
        let mut told = false;
        let mut pause = PAUSE;
        loop {
            // What waits to be submitted takes none of its time.
            control.restart();
            let submitted = match control.check() {
                Ok(()) => {
                    let environment = order.environment.as_ref();
                    self.client.submit(arguments, environment, control)
                }
                Err(_) => Err(Trouble::Stopped),
            };
            let trouble = match submitted {
                Ok(id) => return Ok(Some(id)),
                Err(Trouble::Stopped) => {
                    self.take_back(name);
                    return Err(NotPlaced::Stopped);
                }
                Err(trouble) => trouble,
            };
            let refused = || {
                let cluster = &self.cluster.name;
                let why = format!("the executor `{cluster}` did not take its job: {trouble}");
                Err(NotPlaced::Refused(why))
            };
            if !trouble.passes() {
                return refused();
            }
            if matches!(trouble, Trouble::Away(_)) {
                let since = *silence.get_or_insert_with(Instant::now);
                if since.elapsed() > LONGEST_SILENCE {
                    return refused();
                }
            } else {
                silence = None;
            }
            if !std::mem::replace(&mut told, true) {
                teller.tell(format!("`{}`: {trouble}; trying again", self.cluster.name));
            }
            let until = Instant::now() + pause;
            while Instant::now() < until && control.check().is_ok() {
                std::thread::sleep(Duration::from_millis(50));
            }
            pause = (pause * 3 / 2).min(LONGEST_PAUSE);
            // The answer may have been lost, and not the question.
            if let Ok(Some(id)) = self.client.find(name) {
                return Ok(Some(id));
            }
            if is_array && matches!(trouble, Trouble::Full(_)) {
                return Ok(None);
            }
        }
    }

    /// Cancels a job that may or may not have been submitted.
    fn take_back(&self, name: &str) {
        if let Ok(Some(id)) = self.client.find(name) {
            // Without its task it would do nothing.
            let _ = self.client.cancel(id);
        }
    }

    /// A job's name in Slurm's lists: recipe, stage, and a part that no other job has.
    fn name_of(&self, stage: &str, folder: &JobFolder) -> String {
        let plain = |text: &str| -> String {
            let safe = |c: char| {
                if c.is_ascii_alphanumeric() || matches!(c, '_' | '-' | '=') {
                    c
                } else {
                    '_'
                }
            };
            text.chars().take(60).map(safe).collect()
        };
        let (recipe, stage) = (plain(&self.cluster.recipe), plain(stage));
        format!("{recipe}.{stage}.{}", folder.name())
    }
}

/// What came of a submission.
enum Placed {
    /// The number of each job.
    At(Vec<JobId>),
    /// The queue has no room for that many at once.
    TooMany,
    Not(NotPlaced),
}

/// Jobs that wait to be submitted, each with what listens for the answer.
type Others = Vec<(Order, Sender<Word>)>;

/// What a job that waits to be submitted with others hears.
pub(super) enum Word {
    /// What came of it.
    Answer(Answer),
    /// It has to submit itself and the rest.
    Lead(Rest),
}

/// Jobs that are left to be submitted, in arrays of `size` at first.
pub(super) struct Rest {
    others: Others,
    size: usize,
}

/// Lets the first of these jobs submit all.
fn hand_on(mut jobs: Others, size: usize) {
    while !jobs.is_empty() {
        let (_, listener) = jobs.remove(0);
        let others = std::mem::take(&mut jobs);
        // If that one is gone, it is the turn of the next.
        if let Err(SendError(Word::Lead(rest))) = listener.send(Word::Lead(Rest { others, size })) {
            jobs = rest.others;
        }
    }
}

/// The task that a submission is for: its messages go to `events`, and `control` can stop it.
struct Teller<'a> {
    task: &'a Task,
    events: &'a Arc<StageEvents>,
    control: &'a Control,
}

impl Teller<'_> {
    fn tell(&self, text: String) {
        tell(self.task, self.events, text);
    }
}

/// What a job has in common with the jobs that can be in one array with it; `None` if there are no such jobs.
fn like(task: &Task, order: &Order) -> Option<Like> {
    let is_one_of_many = task.stage.contains('[') || matches!(task.part, Part::Shard(_));
    is_one_of_many.then(|| {
        let environment = order.environment.clone().unwrap_or_default();
        (
            declared(&task.stage).to_owned(),
            order.options.clone(),
            environment,
        )
    })
}

/// Notes beside the scratch folder which stage it belongs to, for `gc`.
fn note_scratch(task: &Task) {
    let note = Path::new(&task.scratch).with_extension("json");
    if !task.scratch_note.is_empty() && !note.exists() {
        let _ = write_atomically(&note, &task.scratch_note);
    }
}
