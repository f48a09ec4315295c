"""Limits of control groups: trees of both versions as containers and hosts show them, and a real quota."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scalestudy.cluster.cgroup import Throttling, cpu_quota, memory_limit_bytes, throttling
from scalestudy.cluster.cpu_use import CpuMeter, CpuUse
from scalestudy.cluster.host import allowed_cpus


class Tree:
    """A /proc and control groups, made up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.proc = folder / "proc"
        (self.proc / "self").mkdir(parents=True)
        self._mounts: list[str] = ["22 1 0:20 / /proc rw - proc proc rw"]
        self._groups: list[str] = []
        self._write()

    def mount(self, name: str, kind: str, options: str, root: str = "/") -> Path:
        place = self.folder / name
        place.mkdir(parents=True)
        self._mounts.append(f"30 22 0:26 {root} {place} rw,nosuid shared:4 - {kind} {kind} rw,{options}")
        self._write()
        return place

    def group(self, number: int, controllers: str, path: str) -> None:
        self._groups.append(f"{number}:{controllers}:{path}")
        self._write()

    def _write(self) -> None:
        (self.proc / "self/mountinfo").write_text("\n".join(self._mounts) + "\n")
        (self.proc / "self/cgroup").write_text("\n".join(self._groups) + "\n")


@pytest.fixture
def tree(tmp_path: Path) -> Tree:
    return Tree(tmp_path)


def files(folder: Path, **contents: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_text(content)


def test_a_host_without_control_groups_limits_nothing(tree: Tree) -> None:
    assert (cpu_quota(tree.proc), throttling(tree.proc), memory_limit_bytes(tree.proc)) == (None, None, None)
    assert cpu_quota(tree.folder / "nowhere") is None


def test_the_tightest_of_all_groups_around_a_process_holds(tree: Tree) -> None:
    """A pod of Kubernetes: the container's own group has less than the pod, which has less than the node."""
    root = tree.mount("cgroup", "cgroup2", "nsdelegate")
    tree.group(0, "", "/kubepods/pod1/box")
    files(root / "kubepods", cpu__max="max 100000\n", memory__max="max\n")
    files(root / "kubepods/pod1", cpu__max="400000 100000\n", memory__max="8589934592\n")
    stat = "usage_usec 5\nnr_periods 991\nnr_throttled 128\nthrottled_usec 2500000\nnr_bursts 0\n"
    files(root / "kubepods/pod1/box", cpu__max="150000 100000\n", memory__max="2147483648\n", cpu__stat=stat)
    assert cpu_quota(tree.proc) == 1.5
    assert throttling(tree.proc) == Throttling(991, 128, 2.5)
    assert memory_limit_bytes(tree.proc) == 2**31


def test_a_limit_of_a_group_around_holds_too(tree: Tree) -> None:
    root = tree.mount("cgroup", "cgroup2", "rw")
    tree.group(0, "", "/slice/job/step")
    files(root / "slice", cpu__max="50000 100000\n", cpu__stat="nr_periods 4\nnr_throttled 1\nthrottled_usec 7\n")
    files(root / "slice/job/step", cpu__max="max 100000\n", memory__max="max\n")
    assert cpu_quota(tree.proc) == 0.5
    assert throttling(tree.proc) == Throttling(4, 1, 7e-6)


def test_what_a_looser_group_around_has_cost_is_not_overlooked(tree: Tree) -> None:
    """It holds for others, too, and they may have used it up."""
    root = tree.mount("cgroup", "cgroup2", "rw")
    tree.group(0, "", "/slice/box")
    quiet = "nr_periods 1000\nnr_throttled 0\nthrottled_usec 0\n"
    files(root / "slice/box", cpu__max="200000 100000\n", cpu__stat=quiet)
    busy = "nr_periods 1000\nnr_throttled 900\nthrottled_usec 9000000\n"
    files(root / "slice", cpu__max="300000 100000\n", cpu__stat=busy)
    assert cpu_quota(tree.proc) == 2
    assert throttling(tree.proc) == Throttling(1000, 900, 9.0)


def test_a_container_sees_its_own_group_as_the_root(tree: Tree) -> None:
    """Docker with version 1: the host's name of the group, and the group itself mounted."""
    cpu = tree.mount("cpu", "cgroup", "cpu,cpuacct", root="/docker/abc")
    memory = tree.mount("memory", "cgroup", "memory", root="/docker/abc")
    tree.group(4, "memory", "/docker/abc")
    tree.group(3, "cpu,cpuacct", "/docker/abc")
    tree.group(0, "", "/system.slice")
    files(cpu, cpu__cfs_quota_us="250000\n", cpu__cfs_period_us="100000\n")
    files(cpu, cpu__stat="nr_periods 10\nnr_throttled 3\nthrottled_time 1500000000\n")
    files(memory, memory__limit_in_bytes="1073741824\n")
    assert cpu_quota(tree.proc) == 2.5
    assert throttling(tree.proc) == Throttling(10, 3, 1.5)
    assert memory_limit_bytes(tree.proc) == 2**30


@pytest.mark.parametrize("said", ["-1\n", "", "what\n", "0\n"])
def test_what_is_no_quota_limits_nothing(tree: Tree, said: str) -> None:
    cpu = tree.mount("cpu", "cgroup", "cpu")
    memory = tree.mount("memory", "cgroup", "memory")
    tree.group(3, "cpu", "/")
    tree.group(4, "memory", "/")
    files(cpu, cpu__cfs_quota_us=said, cpu__cfs_period_us="100000\n")
    files(memory, memory__limit_in_bytes="9223372036854771712\n")
    assert cpu_quota(tree.proc) is None
    assert memory_limit_bytes(tree.proc) is None


@pytest.mark.parametrize(
    ("quota", "allowed"), [(None, 8), (8.0, 8), (12.0, 8), (3.0, 3), (3.9, 3), (1.5, 1), (0.25, 1)]
)
def test_as_many_cpus_are_offered_as_a_quota_keeps_busy(
    monkeypatch: pytest.MonkeyPatch, quota: float | None, allowed: int
) -> None:
    monkeypatch.setattr("scalestudy.cluster.host.cpu_quota", lambda: quota)
    count, why = allowed_cpus(8)
    assert count == allowed
    assert why == (None if allowed == 8 else f"a quota gives {quota:.3g} of 8 CPUs")


OWN = Path("/sys/fs/cgroup/cpu")
WORK = """
import os, sys, time
from scalestudy.cluster.cpu_use import CpuMeter
from scalestudy.cluster.host import local_topology
print(local_topology().cpus_per_node)
cpu = min(os.sched_getaffinity(0))
os.sched_setaffinity(0, {cpu})
meter = CpuMeter([cpu])
end_s = time.monotonic() + 1
while time.monotonic() < end_s:
    pass
print(meter.lap().model_dump_json())
"""


@pytest.fixture
def limited() -> Iterator[Path]:
    """Return a real group whose processes may use half a CPU."""
    group = OWN / f"scalestudy-{os.getpid()}"
    try:
        group.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made here, and no real quota is shown: {error}")
    (group / "cpu.cfs_quota_us").write_text("50000")
    yield group
    group.rmdir()


def test_a_real_quota_is_seen_and_what_it_costs_is_counted(limited: Path) -> None:
    enter = f'echo $$ > {limited}/cgroup.procs && exec "$@"'
    told = subprocess.run(
        ["bash", "-c", enter, "_", sys.executable, "-c", WORK], capture_output=True, encoding="utf-8", check=True
    )
    cpus, use = told.stdout.splitlines()
    assert cpus == "1"
    found = CpuUse.model_validate_json(use)
    assert found.quota_cpus == 0.5
    assert found.periods
    assert found.throttled_periods
    assert found.throttled_periods > found.periods / 2
    assert found.throttled_s
    assert found.throttled_s > 0
    assert found.own_s < 0.7 * found.elapsed_s


def test_other_work_on_a_process_cpus_is_told_from_its_own() -> None:
    """Half of the CPU goes to a process that the meter's own has not started."""
    cpu = min(os.sched_getaffinity(0))
    busy = f"import os, time; os.sched_setaffinity(0, {{{cpu}}})\nwhile True: pass"
    measured = (
        f"import os, time; os.sched_setaffinity(0, {{{cpu}}})\n"
        "from scalestudy.cluster.cpu_use import CpuMeter\n"
        f"meter = CpuMeter([{cpu}]); end_s = time.monotonic() + 1\n"
        "while time.monotonic() < end_s: pass\n"
        "use = meter.lap(); print(use.busy_s - use.own_s, use.run_delay_s, use.elapsed_s)"
    )
    other = subprocess.Popen([sys.executable, "-c", busy])
    try:
        told = subprocess.run([sys.executable, "-c", measured], capture_output=True, encoding="utf-8", check=True)
    finally:
        other.kill()
        other.wait()
    others_s, delay_s, elapsed_s = map(float, told.stdout.split())
    assert others_s > 0.2 * elapsed_s
    assert delay_s > 0.2 * elapsed_s


def test_the_work_of_children_is_a_process_own() -> None:
    meter = CpuMeter(sorted(os.sched_getaffinity(0)))
    spin = "import time\nend = time.process_time() + 0.3\nwhile time.process_time() < end: pass"
    ended = subprocess.run([sys.executable, "-c", spin], check=True)
    assert ended.returncode == 0
    running = subprocess.Popen([sys.executable, "-c", f"{spin}\ntime.sleep(60)"])
    try:
        end_s = time.monotonic() + 30
        own_s = 0.0
        while own_s < 0.6 and time.monotonic() < end_s:
            time.sleep(0.1)
            own_s += meter.lap().own_s
    finally:
        running.kill()
        running.wait()
    assert own_s >= 0.6
