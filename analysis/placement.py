"""Where ranks were pinned: which of them shared cores, and which were far from their GPU."""

from collections import Counter
from collections.abc import Sequence

from scalestudy.trainers.record import Placement, RankReport


def sharing(reports: Sequence[RankReport]) -> list[int]:
    """Return the ranks that computed on a core of which another rank had a hardware thread, or the same one."""
    used = Counter((report.rank.host, core) for report in reports for core in _cores(report))
    if used.total() == len(used):
        return []
    return [report.rank.rank for report in reports if any(used[report.rank.host, core] > 1 for core in _cores(report))]


def far_from_gpu(reports: Sequence[RankReport]) -> list[int]:
    """Return the ranks that have no CPU on the NUMA node of a GPU they drive."""
    return [report.rank.rank for report in reports if report.placement and _far(report.placement)]


def described(cpus: Sequence[int], placement: Placement | None, gpus: Sequence[int] = (), *, shares: bool) -> str:
    """Say which GPUs a rank drove, which CPUs it was pinned to, and what is known of where they lie."""
    words = f"GPU {_ranges(gpus)}, pinned to CPU {_ranges(cpus)}" if gpus else f"pinned to CPU {_ranges(cpus)}"
    if placement is None:
        return words
    cores = len(set(placement.cores))
    nodes = "s" if len(placement.numa_nodes) > 1 else ""
    words += f" ({cores} core{'s' if cores > 1 else ''}{', shared with another rank' if shares else ''}"
    words += f", NUMA node{nodes} {_ranges(placement.numa_nodes)}"
    if known := sorted({node for node in placement.gpu_numa_nodes if node is not None}):
        words += f"; GPU on {'another, ' if _far(placement) else ''}node {_ranges(known)}"
    return f"{words})"


def _cores(report: RankReport) -> set[int]:
    return set(report.placement.cores) if report.placement else set()


def _far(placement: Placement) -> bool:
    return bool({node for node in placement.gpu_numa_nodes if node is not None} - set(placement.numa_nodes))


def _ranges(numbers: Sequence[int]) -> str:
    """Write sorted numbers as Linux does: 0-3,8."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1][1:] = [number]
        else:
            runs.append([number])
    return ",".join("-".join(map(str, run)) for run in runs)
