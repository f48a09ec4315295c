"""What kept ranks from their CPUs: other work on them, a quota, memory or disks that the host waited for."""

from collections.abc import Iterator, Sequence

from scalestudy.cluster.cpu_use import CpuUse
from scalestudy.trainers.record import RankReport, Record

# Of the time of the rank's CPUs, and at least so many seconds: the kernel counts a CPU's time in ticks of 10 ms.
_OTHERS_SHARE, _OTHERS_S = 0.1, 0.05
# Of one CPU's time, where the rank's threads had to wait as well: all of them wait for the one that shares its CPU.
_OTHERS_CPUS = 0.2
# Of a span's time.
_DELAY_SHARE, _THROTTLED_SHARE, _STALLED_SHARE = 0.2, 0.005, 0.02
_STALLED = {"memory": "memory (it swaps, or reclaims what is cached)", "io": "disks"}


def notices(record: Record) -> Iterator[tuple[str, str, str]]:
    """Yield trial, kind and text of whatever held the ranks up, in the timed windows and before them."""
    for kind, text in (
        *_others(record.reports, "cpu_measured", "shared", "while it was measured"),
        *_claimed(record.reports),
        *_others(record.reports, "cpu_before", "busy before", "before the timed windows"),
        *_by_host(record.reports),
    ):
        yield record.trial.id, kind, text


def throttled_share(reports: Sequence[RankReport]) -> float | None:
    """Return the largest share of its quota's periods in which a rank was held up in the timed windows."""
    uses = [report.cpu_measured for report in reports]
    shares = [
        use.throttled_periods / use.periods for use in uses if use and use.periods and use.throttled_periods is not None
    ]
    return max(shares, default=None)


def _others(reports: Sequence[RankReport], span: str, kind: str, when: str) -> Iterator[tuple[str, str]]:
    for report in reports:
        use: CpuUse | None = getattr(report, span)
        if use is None or report.placement is None:
            continue
        cpus = set(report.placement.cpus)
        place = f"rank {report.rank.rank} on {report.rank.host}"
        if use.busy_s is not None and use.elapsed_s > 0:
            # Ranks that share CPUs are no other work. Where they share a part, all of their time is taken for theirs.
            beside = [other for other in reports if other.rank.host == report.rank.host and _shares(other, cpus)]
            own_s = sum(own.own_s for other in beside if (own := getattr(other, span)))
            others_s = use.busy_s - own_s
            share = others_s / (len(cpus) * use.elapsed_s)
            waited = use.run_delay_s is not None and use.run_delay_s > _DELAY_SHARE * use.elapsed_s
            on_one = waited and others_s > _OTHERS_CPUS * use.elapsed_s
            if (share > _OTHERS_SHARE or on_one) and others_s > _OTHERS_S:
                yield kind, f"other work took {min(share, 1):.0%} of the time of the CPUs of {place} {when}"
        elif use.run_delay_s is not None and use.run_delay_s > _DELAY_SHARE * use.elapsed_s:
            yield kind, f"{place} was ready and waited {use.run_delay_s:.2g} s for a CPU {when}"


def _claimed(reports: Sequence[RankReport]) -> Iterator[tuple[str, str]]:
    for report in reports:
        if report.placement and report.placement.claimed_by:
            place = f"rank {report.rank.rank} on {report.rank.host}"
            yield "shared", f"{place} used CPUs or GPUs that another trial had claimed ({report.placement.claimed_by})"


def _shares(other: RankReport, cpus: set[int]) -> bool:
    return other.placement is not None and not cpus.isdisjoint(other.placement.cpus)


def _by_host(reports: Sequence[RankReport]) -> Iterator[tuple[str, str]]:
    """Yield what ranks of one host have in common: its quota and what it waited for."""
    seen: set[str] = set()
    for report in reports:
        use = report.cpu_measured
        if use is None or report.rank.host in seen or use.elapsed_s <= 0:
            continue
        seen.add(report.rank.host)
        if use.throttled_s and use.throttled_s > _THROTTLED_SHARE * use.elapsed_s:
            yield (
                "quota",
                f"{report.rank.host}: {use.throttled_periods} of {use.periods} periods, its CPU quota is "
                f"{use.quota_cpus or 0:.3g} CPUs",
            )
        for resource, words in _STALLED.items():
            share = use.stalled_s.get(resource, 0.0) / use.elapsed_s
            if share > _STALLED_SHARE:
                yield "stalled", f"{report.rank.host} waited for {words} {min(share, 1):.0%} of the time"
