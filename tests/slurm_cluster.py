"""A SLURM cluster of one node, started on this machine and removed again: real daemons, real jobs, no accounting."""

import fcntl
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

# Where every command of SLURM looks. SLURM_CONF would name another place, but jobs' environments are stripped of it.
FOLDER = Path("/etc/slurm")
MARK = "# Of gdn-mup's tests: removed when they end.\n"
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scancel")
SECONDS_TO_START = 60

# No cgroups, which containers lack; GPUs that are a file, for what schedules them.
CONFIGURATION = """\
ClusterName=gdn-mup-tests
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser=root
SlurmdUser=root
AuthInfo=socket={folder}/munge.socket
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
SlurmdParameters=config_overrides
ReturnToService=2
GresTypes=gpu
NodeName=node NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=16000 Gres=gpu:1
PartitionName=cpu Nodes=node Default=YES
PartitionName=gpu Nodes=node
"""


class Cluster:
    """Asks the cluster what it does."""

    def jobs(self, *states: str) -> list[dict[str, str]]:
        """Id, partition, state and comment (rule and wildcards) of the jobs in these states, or in any."""
        names = ("id", "partition", "state", "comment")
        chosen = f"--states={','.join(states) or 'all'}"
        listed = _run("squeue", "--noheader", "--format=%i|%P|%T|%k", chosen)
        return [dict(zip(names, line.split("|", 3), strict=True)) for line in listed.splitlines()]

    def cancel(self, job: str) -> None:
        """As a user or an administrator cancels it."""
        _run("scancel", job)


@contextmanager
def slurm_cluster(folder: Path) -> Iterator[Cluster]:
    """Start a cluster whose files lie in `folder`; skips the test where none can be started."""
    _skip_unless_possible()
    with ExitStack() as stack:
        lock = stack.enter_context((FOLDER / "gdn-mup-tests.lock").open("w"))
        fcntl.flock(lock, fcntl.LOCK_EX)  # two runs of the tests on one machine take turns
        stack.callback(os.unlink, lock.name)
        _write_configuration(folder, stack)
        munge = [f"--{name}={folder}/munge.{name}" for name in ("socket", "pid-file", "log-file")]
        munge += [f"--key-file={folder}/munge.key", f"--seed-file={folder}/munge.seed"]
        # By force: it would want a folder that every user may enter, and root is the only one here.
        munged = _start(["munged", "--foreground", "--force", *munge], folder, stack)
        _wait(lambda: (folder / "munge.socket").exists(), munged, folder)
        _start(["slurmctld", "-D"], folder, stack)
        slurmd = _start(["slurmd", "-D", "-N", "node"], folder, stack)
        _wait(lambda: _run("sinfo", "--noheader", "--format=%t", check=False) == "idle\n", slurmd, folder)
        stack.callback(_end_all_jobs)
        yield Cluster()


def _skip_unless_possible() -> None:
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if sys.platform != "linux" or missing:
        pytest.skip(f"needs SLURM (Debian: slurm-wlm and munge); not here: {', '.join(missing)}")
    if os.getuid() != 0:
        pytest.skip("needs root, to start SLURM's daemons")
    for name in ("slurm.conf", "gres.conf"):
        path = FOLDER / name
        if path.exists() and not path.read_text().startswith(MARK):
            pytest.skip(f"{path} belongs to a cluster of this machine's own")


def _write_configuration(folder: Path, stack: ExitStack) -> None:
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(1024))
    (folder / "munge.key").chmod(0o600)
    with socket.socket() as first, socket.socket() as second:
        ports = []
        for free in (first, second):
            free.bind(("127.0.0.1", 0))
            ports.append(free.getsockname()[1])
    host = socket.gethostname().partition(".")[0]
    files = {
        "slurm.conf": CONFIGURATION.format(folder=folder, host=host, ports=ports),
        "gres.conf": "NodeName=node Name=gpu File=/dev/null\n",
    }
    for name, text in files.items():
        (FOLDER / name).write_text(MARK + text)
        stack.callback((FOLDER / name).unlink)


def _start(command: list[str], folder: Path, stack: ExitStack) -> "subprocess.Popen[bytes]":
    """Start a daemon, to be ended when the stack is closed."""
    log = stack.enter_context((folder / f"{command[0]}.log").open("w"))
    daemon = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)

    def end() -> None:
        daemon.terminate()
        try:
            daemon.wait(timeout=20)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    stack.callback(end)
    return daemon


def _wait(ready: Callable[[], bool], daemon: "subprocess.Popen[bytes]", folder: Path) -> None:
    deadline = time.monotonic() + SECONDS_TO_START
    while not ready():
        if daemon.poll() is not None or time.monotonic() > deadline:
            logs = "\n".join(f"{path.name}:\n{path.read_text()}" for path in sorted(folder.glob("*.log")))
            raise AssertionError(f"{daemon.args} does not start\n{logs}")
        time.sleep(0.1)


def _end_all_jobs() -> None:
    _run("scancel", "--signal=KILL", "--full", "--user=root", check=False)
    _run("scancel", "--user=root", check=False)
    deadline = time.monotonic() + 20
    while _run("squeue", "--noheader", check=False) and time.monotonic() < deadline:
        time.sleep(0.1)


def _run(*command: str, check: bool = True) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 or not check, done.stderr
    return done.stdout
