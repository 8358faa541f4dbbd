"""A matrix of many stages through a real Slurm: how long planning and submitting take, and how much memory the runner needs.

    cargo build --release
    python3 benches/slurm_matrix.py --pipeline target/release/pipeline [--stages 1000] [--finish]
    python3 benches/slurm_matrix.py --pipeline target/release/pipeline --chain 20

Starts a controller and a node of its own on the loopback address, in a folder that goes away, and ends them again; Debian's packages
`slurm-wlm` and `munge` have the programs. The node claims many processors, so that what is measured is the runner and not the queue. Each
stage is a `run_command` that writes its number. Without `--finish` the jobs are cancelled when all of them are in the queue. With `--chain` so many
stages run one after the other, as local stages and as jobs by turns, three times each: how long each took from its start to its result. Standard
library only.
"""

import argparse
import getpass
import json
import os
import shutil
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from datetime import datetime
from pathlib import Path

PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


class Cluster:
    """A controller and one node."""

    def __init__(self, folder, jobs):
        self.folder = folder
        for name in ["munge", "state", "spool", "log", "tmp"]:
            (folder / name).mkdir(parents=True)
        self.env = {"PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf")}
        host, user = socket.gethostname().split(".")[0], getpass.getuser()
        ports = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
        control, node = (port.getsockname()[1] for port in ports)
        for port in ports:
            port.close()
        (folder / "slurm.conf").write_text(
            f"ClusterName=bench\nSlurmctldHost={host}(127.0.0.1)\nSlurmUser={user}\nSlurmdUser={user}\nSlurmctldPort={control}\n"
            f"CommunicationParameters=NoCtldInAddrAny,NoInAddrAny\nAuthType=auth/munge\nAuthInfo=socket={folder}/munge/sock\n"
            f"CredType=cred/munge\nStateSaveLocation={folder}/state\nSlurmdSpoolDir={folder}/spool/%n\nTmpFS={folder}/tmp\n"
            f"SlurmctldPidFile={folder}/slurmctld.pid\nSlurmdPidFile={folder}/slurmd.pid\nSlurmctldLogFile={folder}/log/slurmctld.log\n"
            f"SlurmdLogFile={folder}/log/slurmd.log\nProctrackType=proctrack/linuxproc\nTaskPlugin=task/none\n"
            "JobAcctGatherType=jobacct_gather/none\nSwitchType=switch/none\nMpiDefault=none\nSelectType=select/cons_tres\n"
            "SelectTypeParameters=CR_Core\nSlurmdParameters=config_overrides\nReturnToService=2\n"
            f"AccountingStorageType=accounting_storage/none\nSchedulerType=sched/backfill\nMaxArraySize={jobs + 1}\n"
            f"MaxJobCount={10 * jobs + 1000}\nMailProg=/bin/true\nKillWait=3\n"
            f"NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={node} CPUs=64 Boards=1 SocketsPerBoard=1 CoresPerSocket=64 "
            "ThreadsPerCore=1 State=UNKNOWN\nPartitionName=main Nodes=ALL Default=YES MaxTime=120 State=UP\n"
        )
        munge = folder / "munge"
        self.run("mungekey", "--create", f"--keyfile={munge}/key")
        files = [f"--key-file={munge}/key", f"--socket={munge}/sock", f"--pid-file={munge}/pid", f"--log-file={munge}/log"]
        self.run("munged", *files, f"--seed-file={munge}/seed", "--force")
        self.run("slurmctld", "-c")
        self.run("slurmd", "-N", "n1", "-c")
        while "idle" not in self.told("sinfo", "-h", "-o", "%t"):
            time.sleep(0.1)

    def run(self, program, *arguments):
        with open(self.folder / "log" / f"{program}.out", "w") as log:
            subprocess.run([program, *arguments], env=self.env, stdin=subprocess.DEVNULL, stdout=log, stderr=log, check=True)

    def told(self, program, *arguments):
        return subprocess.run([program, *arguments], env=self.env, capture_output=True, text=True).stdout

    def queued(self):
        """The jobs that Slurm knows, in all states, and how many submissions they came by."""
        told = self.told("squeue", "--noheader", "--array", "--states=all", "--format=%F").split()
        return len(told), len(set(told))

    def stop(self):
        self.told("scancel", f"--user={getpass.getuser()}")
        time.sleep(1)
        for name in ["slurmd.pid", "slurmctld.pid", "munge/pid"]:
            try:
                os.kill(int((self.folder / name).read_text()), signal.SIGTERM)
            except (OSError, ValueError):
                pass
        time.sleep(2)


def peak(pid):
    """The most memory that a process had so far, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1000
    return 0.0


def took(told):
    """The seconds of each stage, by the events of a run."""
    started, seconds = {}, []
    for line in told.splitlines():
        event = json.loads(line)
        moment = datetime.fromisoformat(event["time"].replace("Z", "+00:00")).timestamp()
        if event["event"] == "stage_started":
            started[event["stage"]] = moment
        elif event["event"] == "stage_done":
            seconds.append(moment - started[event["stage"]])
    return seconds


def chain(pipeline, folder, stages):
    """Runs stages one after the other."""
    project = folder / "project"
    names = [f"s{number}" for number in range(stages)]

    def write(word):
        recipe = "version: 1\nstages:\n"
        for name, before in zip(names, [None, *names]):
            inputs = f", inputs: {{ before: {before} }}" if before else ""
            recipe += f"  {name}:\n    run_command: {{ command: [sh, -c, 'echo {word}-{name} >{{out}}/made'], output: folder{inputs} }}\n"
        (project / "chain.yaml").write_text(recipe)

    cluster = Cluster(folder / "slurm", stages)
    env = {**cluster.env, "HOME": str(folder)}
    times = {"local": [], "cluster": []}
    try:
        for number in range(3):
            for executor, seconds in times.items():
                # Other words, so that nothing is fresh.
                write(f"{executor}{number}")
                command = [pipeline, "run", "chain.yaml", "--json", "--executor", executor]
                done = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
                assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
                found = took(done.stdout)
                assert len(found) == stages, found
                seconds += found
    finally:
        cluster.stop()
    for executor, seconds in times.items():
        parts = statistics.quantiles(seconds, n=20)
        print(f"{executor}: {len(seconds)} stages, p50 {statistics.median(seconds):.2f} s, p95 {parts[-1]:.2f} s")


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pipeline", type=Path, required=True)
    parser.add_argument("--stages", type=int, default=1000)
    parser.add_argument("--finish", action="store_true", help="waits for the results, too")
    parser.add_argument("--chain", type=int, help="stages that run one after the other")
    arguments = parser.parse_args()
    pipeline, stages = arguments.pipeline.resolve(), arguments.stages
    with tempfile.TemporaryDirectory() as folder:
        project = Path(folder) / "project"
        project.mkdir()
        (project / ".git").mkdir()
        settings = f"version: 1\nexecutors:\n  cluster:\n    slurm: {{ partition: main, jobs: {stages} }}\n"
        (project / "pipeline.config.yaml").write_text(settings)
        if arguments.chain:
            chain(pipeline, Path(folder), arguments.chain)
            return
        numbers = json.dumps(list(range(stages)))
        (project / "r.yaml").write_text(
            "version: 1\nstages:\n  own:\n    run_command: { command: [sh, -c, 'echo ${n} >{out}/made'], output: folder }\n"
            f"    matrix: {{ n: {numbers} }}\n    executor: cluster\n"
        )
        cluster = Cluster(Path(folder) / "slurm", stages)
        env = {**cluster.env, "HOME": folder}

        def measured(*words):
            began = time.monotonic()
            process = subprocess.Popen([pipeline, *words], cwd=project, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            _, status, usage = os.wait4(process.pid, 0)
            assert status == 0, words
            return f"{time.monotonic() - began:.2f} s, {usage.ru_utime + usage.ru_stime:.2f} CPU s, {usage.ru_maxrss / 1000:.0f} MB"

        try:
            print(f"plan of {stages} stages: {measured('plan', 'r.yaml')}")
            began = time.monotonic()
            with open(Path(folder) / "log", "w") as log:
                run = subprocess.Popen([pipeline, "run", "r.yaml"], cwd=project, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
            while run.poll() is None:
                jobs, submissions = cluster.queued()
                if jobs >= stages:
                    break
                time.sleep(0.2)
            assert jobs >= stages, (jobs, (Path(folder) / "log").read_text()[-2000:])
            took = time.monotonic() - began
            print(f"all {stages} submitted: {took:.1f} s after the start, by {submissions} submissions; the runner had at most {peak(run.pid):.0f} MB")
            if arguments.finish:
                while run.poll() is None:
                    most = peak(run.pid)
                    time.sleep(0.5)
                print(f"all done: {time.monotonic() - began:.1f} s after the start; the runner had at most {most:.0f} MB")
                assert run.returncode == 0, (Path(folder) / "log").read_text()[-2000:]
                print(f"plan, all fresh: {measured('plan', 'r.yaml')}")
            else:
                run.send_signal(signal.SIGINT)
                began = time.monotonic()
                run.wait()
                print(f"all cancelled: {time.monotonic() - began:.1f} s after Ctrl-C")
        finally:
            cluster.stop()


if __name__ == "__main__":
    if not shutil.which("slurmctld", path=PATH):
        raise SystemExit("needs Slurm: on Debian the packages slurm-wlm and munge")
    main()
