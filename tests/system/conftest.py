"""What tests of whole studies share: short studies, looks at what they left, a real Slurm and a real Ray cluster."""

import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from scalestudy.cluster.ports import free_ports
from scalestudy.trainers.files import read_record, record_paths
from scalestudy.trainers.record import Record

ROOT = Path(__file__).resolve().parents[2]
SCALESTUDY = str(Path(sys.executable).with_name("scalestudy"))
TESTCLUSTER = ROOT / "slurm" / "testcluster.sh"
# Where Debian has Slurm's daemons.
PATH = f"{os.environ['PATH']}:/usr/sbin"
QUICK = {"window_s": 0.05, "windows": 2, "warm_up_max_s": 0.2, "deadline_s": 120, "cause_windows": 0}


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """Return a writer of study files; `measurement` changes single fields, `folder` is where it is to lie."""

    def write(*, folder: Path = tmp_path, measurement: dict[str, Any] | None = None, **fields: Any) -> Path:
        path = folder / "s.yaml"
        study = {"schema": 1, "name": "s", "device": "cpu", "batch": 8, "repeats": 1, **fields}
        path.write_text(yaml.safe_dump(study | {"measurement": QUICK | (measurement or {})}))
        return path

    return write


@pytest.fixture
def records() -> Callable[[Path], list[Record]]:
    """Return a reader of all records in a study's folder."""
    return lambda out: [read_record(path.parent) for path in record_paths(out / "trials")]


@pytest.fixture
def no_rank_runs() -> Callable[[Path], bool]:
    """Return a look whether every worker of a study is gone, within the seconds that a killed one may need."""

    def look(out: Path) -> bool:
        for _ in range(100):
            lines = []
            for process in psutil.process_iter(["cmdline", "status"]):
                if process.info["status"] != psutil.STATUS_ZOMBIE:
                    lines.append(" ".join(process.info["cmdline"] or []))
            if not any("scalestudy.trainers.worker" in line and str(out) in line for line in lines):
                return True
            time.sleep(0.05)
        return False

    return look


class SlurmCluster:
    """A cluster of nodes node1 to node4, each with 4 CPUs and 2 character devices that stand for GPUs."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environ = {**os.environ, "PATH": PATH, "SLURM_CONF": str(folder / "slurm.conf"), "SCALESTUDY": SCALESTUDY}

    def tell(self, *argv: str | Path, expected: int = 0) -> str:
        """Run a command against the cluster and return what it said."""
        told = subprocess.run(list(map(str, argv)), capture_output=True, text=True, env=self.environ, timeout=120)
        assert told.returncode == expected, told.stdout + told.stderr
        return told.stdout + told.stderr

    def sbatch(self, *options: str | Path) -> str:
        """Submit a job and return its number."""
        return self.tell("sbatch", "--parsable", *options).strip()

    def state(self, job: str) -> str:
        """Return a job's state, also when it has ended."""
        return str(re.findall(r"JobState=(\w+)", self.tell("scontrol", "show", "job", job))[0])

    def exit_code(self, job: str) -> str:
        """Return how a job's script ended, as code:signal."""
        return str(re.findall(r" ExitCode=(\S+)", self.tell("scontrol", "show", "job", job))[0])

    def drained(self, timeout_s: float = 180) -> None:
        """Wait until no job is left."""
        self.until(lambda: not self.tell("squeue", "--noheader"), timeout_s)

    def until(self, reached: Callable[[], object], timeout_s: float = 90) -> None:
        """Wait for something that only takes time."""
        ends_s = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < ends_s, f"not within {timeout_s} s:\n" + self.tell("scontrol", "show", "job")
            time.sleep(0.3)

    def kill_node(self, name: str) -> None:
        """End everything that runs on a node at once, as a power cut would."""
        doomed = {int((self.folder / f"slurmd-{name}.pid").read_text())}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                log = str(self.folder / f"slurmd-{name}.log")
                if (
                    process.name().startswith("slurmstepd")
                    and log in {file.path for file in process.open_files()}
                    or process.environ().get("SLURMD_NODENAME") == name
                ):
                    doomed.add(process.pid)
        for pid in doomed:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def all_nodes_up(self) -> None:
        """Wait until Slurm has all nodes back."""
        self.until(lambda: not re.search(r"down|\*", self.tell("sinfo", "--noheader", "--format=%T")))

    def boot_node(self, name: str) -> None:
        """Start a node that was killed."""
        self.tell("slurmd", "-f", self.folder / "slurm.conf", "-N", name)


@pytest.fixture(scope="session")
def daemons(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    missing = [name for name in ("munged", "slurmctld", "slurmd", "srun") if shutil.which(name, path=PATH) is None]
    if missing:
        why = f"{', '.join(missing)} not installed (Debian: apt-get install slurm-wlm munge)"
        if os.environ.get("CI"):
            pytest.fail(f"{why}: CI must test against a real Slurm")
        pytest.skip(why)
    folder = tmp_path_factory.mktemp("slurm") / "cluster"
    environ = {**os.environ, "NODES": "4", "CPUS": "4", "GPUS": "2"}
    subprocess.run([TESTCLUSTER, "up", folder], check=True, env=environ)
    try:
        yield SlurmCluster(folder)
    finally:
        subprocess.run([TESTCLUSTER, "down", folder], check=True)


@pytest.fixture
def cluster(daemons: SlurmCluster) -> Iterator[SlurmCluster]:
    """Return the cluster with an empty queue, and leave none of the test's jobs in it."""
    yield daemons
    daemons.tell("scancel", "--user=root" if os.getuid() == 0 else "--me")
    daemons.drained()


class RayCluster:
    """Two raylets on this host, each with 2 CPUs and 2 GPUs that are but numbers; all on loopback addresses."""

    def __init__(self) -> None:
        # Short: sockets lie in it, and their paths have a limit.
        self.folder = Path(tempfile.mkdtemp(prefix="ray-", dir="/tmp"))
        dashboard, port, *self._agents = free_ports(4, None)
        self.address = f"127.0.0.2:{port}"
        self.dashboard = f"http://127.0.0.1:{dashboard}"
        self.environ = {
            **os.environ,
            # As one that was started without activating its environment.
            "PATH": ":".join(
                folder for folder in os.environ["PATH"].split(":") if folder != str(Path(sys.executable).parent)
            ),
            "RAY_USAGE_STATS_ENABLED": "0",
            "RAY_ADDRESS": self.address,
            "RAY_API_SERVER_ADDRESS": self.dashboard,
        }
        head = [f"--port={port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"]
        self._head = self._start("127.0.0.2", "--head", *head)
        self._worker = self._start("127.0.0.3", f"--address={self.address}")
        self.until(lambda: self.nodes() == 2)
        self.until(self._takes_jobs)

    def _takes_jobs(self) -> bool:
        ray = str(Path(sys.executable).with_name("ray"))
        told = subprocess.run([ray, "job", "submit", "--", "true"], env=self.environ, capture_output=True, timeout=60)
        return told.returncode == 0

    def _start(self, ip: str, *options: str) -> "subprocess.Popen[bytes]":
        ray = str(Path(sys.executable).with_name("ray"))
        resources = ["--num-cpus=2", "--num-gpus=2", "--object-store-memory=100000000"]
        environ = {name: value for name, value in self.environ.items() if not name.startswith("RAY_A")}
        # A folder of its own for each, as on two hosts: each unpacks the working directory there, and clears it.
        own = self.folder / ip.rpartition(".")[2]
        # The agent that takes jobs has one port by default, for all nodes.
        agent = self._agents[int(own.name) - 2]
        with (self.folder / f"{ip}.log").open("ab") as log:
            return subprocess.Popen(
                [
                    ray,
                    "start",
                    f"--node-ip-address={ip}",
                    *resources,
                    "--block",
                    f"--temp-dir={own}",
                    f"--dashboard-agent-listen-port={agent}",
                    *options,
                ],
                env=environ,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def tell(self, *argv: str | Path, expected: int = 0) -> str:
        """Run a command against the cluster and return what it said."""
        told = subprocess.run(list(map(str, argv)), capture_output=True, text=True, env=self.environ, timeout=300)
        assert told.returncode == expected, told.stdout + told.stderr
        return told.stdout + told.stderr

    def start(self, *argv: str | Path) -> "subprocess.Popen[bytes]":
        """Start a command against the cluster."""
        return subprocess.Popen(list(map(str, argv)), env=self.environ, stdout=subprocess.DEVNULL)

    def ask(self, expression: str) -> str:
        """Return what a driver of the cluster sees."""
        code = f"import logging, ray; ray.init(logging_level=logging.ERROR); print('answer:', {expression})"
        return self.tell(sys.executable, "-c", code).rpartition("answer: ")[2].strip()

    def nodes(self) -> int:
        """Return how many nodes are alive, 0 while the cluster does not answer."""
        with suppress(AssertionError):
            return int(self.ask("sum(node['Alive'] for node in ray.nodes())"))
        return 0

    def idle(self) -> bool:
        """Whether nothing is reserved on the cluster any more."""
        keys = "('CPU', 'GPU')"
        return (
            self.ask(f"all(ray.available_resources().get(k) == ray.cluster_resources()[k] for k in {keys})") == "True"
        )

    def until(self, reached: Callable[[], object], timeout_s: float = 90) -> None:
        """Wait for something that only takes time."""
        ends_s = time.monotonic() + timeout_s
        while not reached():
            assert time.monotonic() < ends_s, f"not within {timeout_s} s"
            time.sleep(0.3)

    def kill_node(self) -> None:
        """End everything that runs on the second node at once."""
        os.killpg(self._worker.pid, signal.SIGKILL)
        self._worker.wait()

    def boot_node(self) -> None:
        """Start the second node again."""
        self._worker = self._start("127.0.0.3", f"--address={self.address}")
        self.until(lambda: self.nodes() == 2)

    def end(self) -> None:
        """End both nodes."""
        for node in (self._worker, self._head):
            node.terminate()
            with suppress(subprocess.TimeoutExpired):
                node.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        shutil.rmtree(self.folder, ignore_errors=True)


@pytest.fixture(scope="session")
def raylets() -> Iterator[RayCluster]:
    cluster = RayCluster()
    try:
        yield cluster
    finally:
        cluster.end()
