"""Ranks on two hosts that are network namespaces: names that stand for the loopback, and IPv6 alone."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from scalestudy.cluster.network import joined
from scalestudy.cluster.ports import FIRST, LAST, free_ports
from scalestudy.cluster.slurm_step import ADDRESSES
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.launcher import worker_command, worker_variables
from scalestudy.trainers.record import RankReport, Record
from scalestudy.trainers.trial import Trial

pytestmark = pytest.mark.slow

MakeTrial = Callable[..., Trial]


class Hosts:
    """Two hosts, node1 and node2, with a link between them; both know both names by an /etc/hosts of their own."""

    def __init__(self, folder: Path, addresses: tuple[str, str], own: str) -> None:
        self._names = [f"ss{os.getpid()}-{index}" for index in (1, 2)]
        self._folder = folder
        self.addresses = addresses
        for name in self._names:
            _run("ip", "netns", "add", name)
        _run(
            "ip",
            "link",
            "add",
            "ss0",
            "netns",
            self._names[0],
            "type",
            "veth",
            "peer",
            "name",
            "ss0",
            "netns",
            self._names[1],
        )
        for index, (name, address) in enumerate(zip(self._names, addresses, strict=True)):
            ipv6 = ":" in address
            within = ("ip", "-netns", name)
            _run(*within, "link", "set", "lo", "up")
            _run(*within, "link", "set", "ss0", "up")
            _run(
                *within, "address", "add", f"{address}/{64 if ipv6 else 24}", "dev", "ss0", *(["nodad"] if ipv6 else [])
            )
            if ipv6:
                _run(*within, "address", "del", "127.0.0.1/8", "dev", "lo")
            known = [own if peer == index else there for peer, there in enumerate(addresses)]
            (folder / f"hosts-{index}").write_text(
                f"{'::1' if ipv6 else '127.0.0.1'} localhost\n{known[0]} node1\n{known[1]} node2\n"
            )

    def start(self, trial: Trial, folder: Path, index: int, hosts: list[str]) -> "subprocess.Popen[bytes]":
        """Start a rank as a task of Slurm's on one host."""
        task = {
            "SLURM_PROCID": str(index),
            "SLURM_LOCALID": "0",
            "SLURM_NODEID": str(index),
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURMD_NODENAME": f"node{index + 1}",
            ADDRESSES: ",".join(hosts),
        }
        with (folder / f"rank-{index}.log").open("wb") as log:
            return self.begin(
                index,
                *worker_command(sys.executable, trial, folder),
                env={**os.environ, **worker_variables({}, trial, 2), "SCALESTUDY_LIFELINE": "", **task},
                stdout=log,
            )

    def begin(self, index: int, *command: str, **options: Any) -> "subprocess.Popen[bytes]":
        """Start a program on one host."""
        own_hosts = self._folder / f"hosts-{index}"
        shell = f'hostname node{index + 1} && mount --bind {own_hosts} /etc/hosts && exec "$@"'
        inside = ["ip", "netns", "exec", self._names[index], "unshare", "--uts", "bash", "-c", shell, "_"]
        return subprocess.Popen([*inside, *command], stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, **options)

    def set(self, index: int, name: str, value: str) -> None:
        """Set a parameter of one host's network."""
        _run("ip", "netns", "exec", self._names[index], "sysctl", "--quiet", "--write", f"{name}={value}")

    def end(self) -> None:
        """Remove both."""
        for name in self._names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def _run(*command: str) -> None:
    subprocess.run(command, check=True)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Callable[..., Hosts]]:
    made: list[Hosts] = []

    def make(*addresses: str, own: str) -> Hosts:
        made.append(Hosts(tmp_path, (addresses[0], addresses[1]), own))
        return made[-1]

    yield make
    for host in made:
        host.end()


class Ended(NamedTuple):
    codes: list[int]
    reports: tuple[RankReport, ...]
    logs: str


def trained(there: Hosts, trial: Trial, tmp_path: Path, names: tuple[str, str]) -> Ended:
    folder = StudyFolder(tmp_path / trial.trainer)
    folder.create("t")
    path = folder.begin(trial)
    addresses = [joined(name, port) for name, port in zip(names, free_ports(2), strict=True)]
    ranks = [there.start(trial, path, index, addresses) for index in (0, 1)]
    try:
        codes = [rank.wait(60) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    logs = "".join(log.read_text(errors="replace") for log in path.glob("*.log"))
    reports, _ = folder.reports(path, 2)
    return Ended(codes, reports, logs)


@pytest.mark.parametrize("trainer", ["torch-ddp", "tf-multiworker"])
def test_nodes_whose_own_name_is_the_loopback_train_together(
    trainer: str, hosts: Callable[..., Hosts], make_trial: MakeTrial, tmp_path: Path
) -> None:
    there = hosts("10.214.0.1", "10.214.0.2", own="127.0.1.1")
    ended = trained(there, make_trial(trainer=trainer, world_size=2, devices_per_node=1), tmp_path, ("node1", "node2"))
    assert ended.codes == [0, 0], ended.logs
    assert all(report.windows for report in ended.reports)
    for report in ended.reports:
        assert report.software is not None
        assert report.software.variables["GLOO_SOCKET_IFNAME"] == "ss0"


@pytest.mark.parametrize("trainer", ["torch-ddp", "tf-multiworker"])
def test_nodes_with_ipv6_addresses_alone_train_together(
    trainer: str, hosts: Callable[..., Hosts], make_trial: MakeTrial, tmp_path: Path
) -> None:
    there = hosts("fd00:214::1", "fd00:214::2", own="::1")
    trial = make_trial(trainer=trainer, world_size=2, devices_per_node=1)
    ended = trained(there, trial, tmp_path, ("node1", "node2"))
    assert ended.codes == [0, 0], ended.logs
    assert all(report.windows for report in ended.reports)


@pytest.mark.horovod
@pytest.mark.parametrize(
    ("addresses", "own", "why"),
    [
        (("10.214.0.1", "10.214.0.2"), "127.0.1.1", r"this node's own name, node[12], stands for 127\.0\.1\.1, where"),
        (("fd00:214::1", "fd00:214::2"), "::1", r"node[12] has no IPv4 address, and Horovod's ranks meet over IPv4"),
    ],
)
def test_what_horovod_cannot_do_is_refused_at_once(
    addresses: tuple[str, str],
    own: str,
    why: str,
    hosts: Callable[..., Hosts],
    make_trial: MakeTrial,
    tmp_path: Path,
) -> None:
    there = hosts(*addresses, own=own)
    trial = make_trial(trainer="horovod-torch", world_size=2, devices_per_node=1)
    ended = trained(there, trial, tmp_path, ("node1", "node2"))
    assert ended.codes == [1, 1], ended.logs
    for report in ended.reports:
        assert report.error is not None
        assert re.match(f"ValueError: {why}", report.error.message)


@pytest.fixture
def run_study(
    write_study: Callable[..., Path], records: Callable[[Path], list[Record]], tmp_path: Path
) -> Callable[..., set[int]]:
    """Return a runner of studies on node1 that all end well; it returns the ports on which anybody listened there."""

    def run(there: Hosts, trainers: list[str]) -> set[int]:
        study = write_study(trainers=trainers, models="cnn", world_sizes=[2])
        scalestudy, out = Path(sys.executable).with_name("scalestudy"), tmp_path / "out"
        seen = set()
        with (
            (tmp_path / "told").open("wb") as told,
            there.begin(0, str(scalestudy), "run", str(study), "--out", str(out), stdout=told) as process,
        ):
            while process.poll() is None:
                seen |= listening(process.pid)
                time.sleep(0.01)
        found = [(record.trial.trainer, record.outcome, record.reason) for record in records(out)]
        assert sorted(found) == sorted((trainer, "ok", None) for trainer in trainers), (tmp_path / "told").read_text()
        return seen

    return run


def listening(pid: int) -> set[int]:
    """Return the TCP ports on which anybody listens where a process is."""
    found: set[int] = set()
    # The process may end meanwhile.
    with suppress(OSError):
        # Before it has entered its host's network it is in ours.
        if Path(f"/proc/{pid}/ns/net").samefile("/proc/self/ns/net"):
            return found
        for name in ("tcp", "tcp6"):
            lines = Path(f"/proc/{pid}/net/{name}").read_text().splitlines()[1:]
            for _, address, _, state, *_ in map(str.split, lines):
                if state == "0A":
                    found.add(int(address.rpartition(":")[2], 16))
    return found


def test_a_study_runs_on_a_host_whose_loopback_is_ipv6s(
    hosts: Callable[..., Hosts], run_study: Callable[..., set[int]]
) -> None:
    run_study(hosts("fd00:214::1", "fd00:214::2", own="fd00:214::1"), ["torch-ddp", "tf-multiworker"])


@pytest.mark.horovod
@pytest.mark.parametrize(
    ("trainer", "by_the_kernel"),
    [("torch-ddp", True), ("tf-multiworker", False)],
)
def test_ranks_listen_where_slurms_page_says(
    trainer: str, by_the_kernel: bool, hosts: Callable[..., Hosts], run_study: Callable[..., set[int]]
) -> None:
    there = hosts("10.214.0.1", "10.214.0.2", own="10.214.0.1")
    ours, kernels = range(FIRST, LAST), range(42_000, 42_100)
    there.set(0, "net.ipv4.ip_local_port_range", f"{kernels[0]} {kernels[-1]}")
    seen = run_study(there, [trainer])
    assert seen & set(ours)
    assert not seen - set(ours) - set(kernels)
    assert bool(seen & set(kernels)) == by_the_kernel, seen
