//! A real Slurm on the loopback address: controller, nodes and authentication of its own in a folder, gone with the test.
//!
//! Debian's packages `slurm-wlm` and `munge` have what it takes. Nothing outside the folder is written and nothing runs as a service, so
//! several clusters can be there at once.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write as _;
use std::fs;
use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::sleep;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tempfile::TempDir;

use super::program::Project;

/// The programs of a cluster.
const PROGRAMS: [&str; 9] = [
    "munged",
    "mungekey",
    "slurmctld",
    "slurmd",
    "sbatch",
    "squeue",
    "scancel",
    "scontrol",
    "sinfo",
];
/// Where they may be.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
/// The longest time that anything of the cluster may take.
const LONGEST: Duration = Duration::from_mins(2);

/// A cluster; everything that it started ends when this is dropped.
pub(crate) struct Cluster {
    folder: TempDir,
    nodes: usize,
}

/// Whether Slurm is installed. `PIPELINE_NEEDS_SLURM=1` makes its absence a failure.
#[expect(clippy::disallowed_methods, reason = "a switch of the tests")]
fn is_installed() -> bool {
    let missing: Vec<&str> = PROGRAMS
        .into_iter()
        .filter(|program| {
            !PATH
                .split(':')
                .any(|folder| Path::new(folder).join(program).exists())
        })
        .collect();
    if missing.is_empty() {
        return true;
    }
    assert!(
        std::env::var("PIPELINE_NEEDS_SLURM").is_err(),
        "PIPELINE_NEEDS_SLURM is set, and these programs are missing: {missing:?}"
    );
    eprintln!(
        "not tested: Slurm is not installed ({} is missing)",
        missing[0]
    );
    false
}

/// Ports that nobody listens at. They are below those that the system gives to connections, and none is given twice: between this look and the
/// daemon's start no other test takes one.
fn free_ports(count: usize) -> Vec<u16> {
    static TAKEN: AtomicU32 = AtomicU32::new(0);
    const FIRST: u32 = 10_000;
    const COUNT: u32 = 20_000;
    // Another run of the tests most likely begins elsewhere.
    let start = std::process::id().wrapping_mul(97);
    let ports = std::iter::repeat_with(|| {
        let taken = TAKEN.fetch_add(1, Ordering::Relaxed);
        (FIRST + start.wrapping_add(taken) % COUNT) as u16
    });
    let free = ports.filter(|port| TcpListener::bind(("127.0.0.1", *port)).is_ok());
    free.take(count).collect()
}

impl Cluster {
    /// A cluster of so many nodes with two processors each; none where Slurm is not installed. `more` are further lines of `slurm.conf`.
    pub(crate) fn start(nodes: usize, more: &str) -> Option<Self> {
        if !is_installed() {
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let cluster = Self { folder, nodes };
        for name in ["munge", "state", "spool", "log", "tmp"] {
            fs::create_dir(cluster.path(name)).unwrap();
        }
        cluster.configure(more);
        let shown = |name: &str| cluster.path(name).display().to_string();
        cluster.run(
            "mungekey",
            &["--create", &format!("--keyfile={}", shown("munge/key"))],
        );
        cluster.run(
            "munged",
            &[
                &format!("--key-file={}", shown("munge/key")),
                &format!("--socket={}", shown("munge/sock")),
                &format!("--pid-file={}", shown("munge/pid")),
                &format!("--log-file={}", shown("munge/log")),
                &format!("--seed-file={}", shown("munge/seed")),
                "--num-threads=2",
                // The folder of temporary files is everybody's.
                "--force",
            ],
        );
        cluster.start_controller(&["-c"]);
        for node in 1..=nodes {
            fs::create_dir(cluster.path(&format!("tmp/n{node}"))).unwrap();
            cluster.start_node(node);
        }
        cluster.wait_until("all nodes are there", || {
            let idle = cluster.told("sinfo", &["-h", "-N", "-t", "idle", "-o", "%N"]);
            idle.split_whitespace().collect::<BTreeSet<_>>().len() == nodes
        });
        Some(cluster)
    }

    fn configure(&self, more: &str) {
        let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap();
        let host = host.trim().split('.').next().unwrap().to_owned();
        let user = self.told("id", &["-un"]);
        let (user, dir) = (user.trim(), self.folder.path().display());
        let ports = free_ports(self.nodes + 1);
        let mut text = format!(
            "ClusterName=test\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser={user}\nSlurmdUser={user}\nSlurmctldPort={}\n\
             CommunicationParameters=NoCtldInAddrAny,NoInAddrAny\nAuthType=auth/munge\nAuthInfo=socket={dir}/munge/sock\n\
             CredType=cred/munge\nStateSaveLocation={dir}/state\nSlurmdSpoolDir={dir}/spool/%n\nTmpFS={dir}/tmp/%n\n\
             SlurmctldPidFile={dir}/slurmctld.pid\nSlurmdPidFile={dir}/slurmd-%n.pid\n\
             SlurmctldLogFile={dir}/log/slurmctld.log\nSlurmdLogFile={dir}/log/slurmd-%n.log\nSlurmctldDebug=info\nSlurmdDebug=info\n\
             ProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\nJobAcctGatherType=jobacct_gather/none\nSwitchType=switch/none\n\
             MpiDefault=none\nSelectType=select/cons_tres\nSelectTypeParameters=CR_Core_Memory\nDefMemPerCPU=500\n\
             SlurmdParameters=config_overrides\nReturnToService=2\nAccountingStorageType=accounting_storage/none\n\
             JobCompType=jobcomp/filetxt\nJobCompLoc={dir}/log/jobcomp.log\nSchedulerType=sched/backfill\n\
             SchedulerParameters=batch_sched_delay=0,sched_min_interval=0,sched_interval=2,bf_interval=2\n\
             KillWait=3\nSlurmdTimeout=10\nSlurmctldTimeout=10\nTCPTimeout=3\nMessageTimeout=5\nUnkillableStepTimeout=30\n\
             BatchStartTimeout=10\nCompleteWait=0\nInactiveLimit=0\nOverTimeLimit=0\nMailProg=/bin/true\nGresTypes=gpu\n",
            ports[0]
        );
        for (node, port) in (1..=self.nodes).zip(&ports[1..]) {
            writeln!(
                text,
                "NodeName=n{node} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=2 Boards=1 SocketsPerBoard=1 \
                 CoresPerSocket=2 ThreadsPerCore=1 RealMemory=4000 Gres=gpu:1 State=UNKNOWN"
            )
            .unwrap();
        }
        text.push_str(
            "PartitionName=main Nodes=ALL Default=YES MaxTime=120 DefaultTime=60 State=UP OverSubscribe=NO\n",
        );
        // What is given twice would be complained of by each program.
        for line in more.lines() {
            let key = line.split('=').next().unwrap_or(line);
            let start = format!("\n{key}=");
            if let Some(at) = text.find(&start) {
                let end = text[at + 1..]
                    .find('\n')
                    .map_or(text.len(), |end| at + 1 + end);
                text.replace_range(at..end, "");
            }
        }
        text.push_str(more);
        fs::write(self.conf(), text).unwrap();
        fs::write(self.path("gres.conf"), "Name=gpu File=/dev/null\n").unwrap();
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn conf(&self) -> PathBuf {
        self.path("slurm.conf")
    }

    /// Makes a project's program use this cluster, and names it `cluster` in the project's settings.
    pub(crate) fn serve(&self, project: &mut Project, settings: &str) {
        project.variable("PATH", PATH);
        project.variable("SLURM_CONF", self.conf().to_str().unwrap());
        let text = format!("version: 1\nexecutors:\n  cluster:\n    slurm: {{ {settings} }}\n");
        project.write("pipeline.config.yaml", &text);
    }

    /// One of Slurm's programs, not started yet.
    fn command(&self, program: &str, arguments: &[&str]) -> Command {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env_clear()
            .env("PATH", PATH)
            .env("SLURM_CONF", self.conf())
            .stdin(Stdio::null());
        command
    }

    /// What one of Slurm's programs prints, whether it succeeds or not.
    pub(crate) fn told(&self, program: &str, arguments: &[&str]) -> String {
        let output = self.command(program, arguments).output().unwrap();
        let text = [output.stdout, output.stderr].concat();
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Runs a command of a shell in a project.
    pub(crate) fn sh(&self, project: &Project, command: &str) -> Output {
        let mut shell = self.command("sh", &["-c", command]);
        shell.current_dir(project.path("")).output().unwrap()
    }

    /// Runs one of Slurm's programs, which has to succeed. Daemons go into the background and keep no pipe of ours.
    #[track_caller]
    pub(crate) fn run(&self, program: &str, arguments: &[&str]) {
        let log = fs::File::create(self.path("log").join(format!("{program}.out"))).unwrap();
        let mut command = self.command(program, arguments);
        let status = command
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .status();
        let log = || fs::read_to_string(self.path("log").join(format!("{program}.out")));
        assert!(
            status.unwrap().success(),
            "{program} {arguments:?}: {:?}",
            log()
        );
    }

    /// Waits until something holds.
    #[track_caller]
    pub(crate) fn wait_until(&self, what: &str, holds: impl Fn() -> bool) {
        let start = Instant::now();
        while !holds() {
            assert!(
                start.elapsed() < LONGEST,
                "it never came to be that {what}\n{}\n{}",
                self.told("squeue", &["--states=all"]),
                self.log("slurmctld.log")
            );
            sleep(Duration::from_millis(50));
        }
    }

    /// One of the logs.
    pub(crate) fn log(&self, name: &str) -> String {
        fs::read_to_string(self.path("log").join(name)).unwrap_or_default()
    }

    /// The jobs that are over: for each the fields by name.
    pub(crate) fn finished(&self) -> Vec<String> {
        self.log("jobcomp.log").lines().map(str::to_owned).collect()
    }

    /// The numbers of the jobs in the queue, in all states or in one.
    pub(crate) fn queued(&self, states: &str) -> Vec<String> {
        let told = self.told(
            "squeue",
            &["--noheader", &format!("--states={states}"), "--format=%i"],
        );
        told.split_whitespace().map(str::to_owned).collect()
    }

    pub(crate) fn start_controller(&self, arguments: &[&str]) {
        self.run("slurmctld", arguments);
        self.wait_until("the controller answers", || {
            let pinged = self.command("scontrol", &["ping"]).output().unwrap();
            String::from_utf8_lossy(&pinged.stdout).contains(" UP")
        });
    }

    pub(crate) fn stop_controller(&self) {
        Self::end(&self.path("slurmctld.pid"), Signal::SIGTERM);
    }

    pub(crate) fn start_node(&self, node: usize) {
        self.run("slurmd", &["-N", &format!("n{node}"), "-c"]);
    }

    /// Keeps the nodes from seeing a folder: where it is they see an empty one that nobody can write. False where the system does not allow that.
    pub(crate) fn hide(&self, folder: &Path) -> bool {
        let allowed = self
            .command("unshare", &["--mount", "true"])
            .output()
            .unwrap();
        if !allowed.status.success() {
            eprintln!("not tested: no node can be kept from seeing a folder here");
            return false;
        }
        for node in 1..=self.nodes {
            Self::end(&self.path(&format!("slurmd-n{node}.pid")), Signal::SIGTERM);
            let script = "mount -t tmpfs -o ro,size=4k none \"$1\" && exec slurmd -N \"$2\" -c";
            let (folder, node) = (folder.to_str().unwrap(), format!("n{node}"));
            self.run(
                "unshare",
                &["--mount", "sh", "-c", script, "sh", folder, &node],
            );
        }
        self.wait_until("all nodes are there again", || {
            let idle = self.told("sinfo", &["-h", "-N", "-t", "idle", "-o", "%N"]);
            idle.split_whitespace().collect::<BTreeSet<_>>().len() == self.nodes
        });
        true
    }

    /// A variable of the environment of the job's process that has this word among its arguments.
    pub(crate) fn environment_of(&self, word: &str, variable: &str) -> String {
        let processes = self.processes();
        let start = format!("{variable}=");
        let found = processes.iter().find_map(|pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            if !String::from_utf8_lossy(&line).contains(word) {
                return None;
            }
            let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
            let environment = String::from_utf8_lossy(&environment).into_owned();
            let mut variables = environment.split('\0');
            variables.find_map(|text| text.strip_prefix(&start).map(str::to_owned))
        });
        found.unwrap()
    }

    /// Kills the daemon of a node; the jobs on it go on, and nobody hears of them. The controller is told that the node is lost.
    pub(crate) fn lose_node(&self, node: &str) {
        Self::end(&self.path(&format!("slurmd-{node}.pid")), Signal::SIGKILL);
        self.run(
            "scontrol",
            &[
                "update",
                &format!("nodename={node}"),
                "state=down",
                "reason=test",
            ],
        );
    }

    /// Ends all that runs on a node at once, as when its power fails.
    pub(crate) fn cut_power(&self, node: &str) {
        Self::end(&self.path(&format!("slurmd-{node}.pid")), Signal::SIGKILL);
        let mark = format!("SLURMD_NODENAME={node}");
        let tasks = self.processes().into_iter();
        let tasks: Vec<Pid> = tasks
            .filter(|pid| has_in_environment(*pid, &mark))
            .collect();
        // The steps first: they would tell the controller that their tasks ended.
        for step in steps_of(&tasks) {
            let _ = kill(step, Signal::SIGKILL);
        }
        for pid in tasks {
            let _ = kill(pid, Signal::SIGKILL);
        }
        self.lose_node(node);
    }

    /// Puts the job that runs into the queue again, and has it started again at once.
    pub(crate) fn requeue(&self, id: &str) {
        let steps = steps_of(&self.processes());
        assert!(!steps.is_empty(), "job {id} runs");
        self.run("scontrol", &["requeue", id]);
        self.wait_until("it is in the queue again", || {
            self.queued("PENDING").contains(&id.to_owned())
        });
        // Slurm waits two minutes before it starts it again. That is also the time for its first start to tell its end, which would otherwise
        // be taken for the end of the second; and a node remembers to the second since when it may not start a job.
        self.wait_until("its first start has told its end", || {
            steps
                .iter()
                .all(|step| kill(*step, None).is_err() || is_zombie(*step))
        });
        self.run(
            "scontrol",
            &["update", &format!("jobid={id}"), "starttime=now+3seconds"],
        );
    }

    /// Ends the process of a file with its number, and waits for that.
    fn end(file: &Path, signal: Signal) {
        let number = fs::read_to_string(file).ok();
        let Some(pid) = number.and_then(|number| number.trim().parse().ok()) else {
            return;
        };
        let pid = Pid::from_raw(pid);
        let start = Instant::now();
        let mut signal = signal;
        while kill(pid, signal).is_ok() && !is_zombie(pid) {
            if start.elapsed() > Duration::from_secs(10) {
                signal = Signal::SIGKILL;
            }
            if start.elapsed() > Duration::from_secs(20) {
                return;
            }
            sleep(Duration::from_millis(50));
        }
    }

    /// The processes that were started with this cluster's settings, daemons and steps, and all that those started.
    fn processes(&self) -> Vec<Pid> {
        let mark = format!("SLURM_CONF={}", self.conf().display());
        let entries = fs::read_dir("/proc").into_iter().flatten().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
        let parents: BTreeMap<i32, i32> = pids.map(|pid| (pid, parent(pid))).collect();
        let is_marked = |pid: i32| has_in_environment(Pid::from_raw(pid), &mark);
        let is_ours = |pid: &&i32| {
            let line = std::iter::successors(Some(**pid), |pid| parents.get(pid).copied());
            line.take_while(|pid| *pid > 1).any(is_marked)
        };
        parents
            .keys()
            .filter(is_ours)
            .map(|pid| Pid::from_raw(*pid))
            .collect()
    }
}

/// The daemons of steps that started some of these processes.
fn steps_of(tasks: &[Pid]) -> Vec<Pid> {
    let parents: BTreeSet<i32> = tasks.iter().map(|pid| parent(pid.as_raw())).collect();
    let is_step = |pid: &i32| {
        let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
        name.trim() == "slurmstepd"
    };
    let steps = parents.into_iter().filter(is_step);
    steps.map(Pid::from_raw).collect()
}

/// Whether a process was started with a variable of this name and value.
fn has_in_environment(pid: Pid, variable: &str) -> bool {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap_or_default();
    environment
        .split(|byte| *byte == 0)
        .any(|entry| entry == variable.as_bytes())
}

/// The parent of a process; 0 if it is gone.
fn parent(pid: i32) -> i32 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    // Behind the name, which may have anything in it: the state and the parent.
    let rest = stat.rsplit_once(") ").map(|(_, rest)| rest);
    let parent = rest.and_then(|rest| rest.split(' ').nth(1)?.parse().ok());
    parent.unwrap_or_default()
}

impl Cluster {
    /// How many of the cluster's processes have this word among their arguments.
    pub(crate) fn processes_of(&self, word: &str) -> usize {
        let has = |pid: &&Pid| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            String::from_utf8_lossy(&line).contains(word)
        };
        self.processes().iter().filter(has).count()
    }
}

#[cfg(feature = "mpi")]
impl Cluster {
    /// Kills the last of the cluster's processes that have this word among their arguments and were not started by one that has it, too; gives
    /// their number.
    pub(crate) fn kill_one_of(&self, word: &str) -> usize {
        let has = |pid: i32| {
            let name = fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_default();
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            !name.starts_with("srun") && String::from_utf8_lossy(&line).contains(word)
        };
        let all = self.processes();
        let own = all
            .into_iter()
            .filter(|pid| has(pid.as_raw()) && !has(parent(pid.as_raw())));
        let own: Vec<Pid> = own.collect();
        if let Some(last) = own.last() {
            kill(*last, Signal::SIGKILL).unwrap();
        }
        own.len()
    }
}

fn is_zombie(pid: Pid) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ")
        .is_some_and(|(_, rest)| rest.starts_with('Z'))
}

impl Drop for Cluster {
    fn drop(&mut self) {
        // The whole of it, whether the test went well or not: first the daemons, so that they start nothing, then what they started.
        for node in 1..=self.nodes {
            Self::end(&self.path(&format!("slurmd-n{node}.pid")), Signal::SIGTERM);
        }
        Self::end(&self.path("slurmctld.pid"), Signal::SIGTERM);
        for pid in self.processes() {
            let _ = kill(pid, Signal::SIGKILL);
        }
        Self::end(&self.path("munge/pid"), Signal::SIGTERM);
        if std::thread::panicking() {
            // For whoever reads why the test failed.
            let nodes = (1..=self.nodes).map(|node| format!("slurmd-n{node}.log"));
            for name in std::iter::once("slurmctld.log".to_owned()).chain(nodes) {
                eprintln!("{name}:\n{}", self.log(&name));
            }
        }
    }
}
