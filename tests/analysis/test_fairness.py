"""What was not the same work never meets on one axis, and the known traps are named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalestudy.analysis import compare, fairness, metrics
from scalestudy.analysis.frames import frames
from scalestudy.trainers.files import RECORD_NAME
from scalestudy.trainers.record import Placement, RankReport, Record, Software, Window
from scalestudy.trainers.trial import Data, Trial

MakeTrial = Callable[..., Trial]
MakeRecord = Callable[..., Record]


def changed(record: Record, **fields: object) -> Record:
    """Return the record with other fields in every rank's report."""
    reports = tuple(report.model_copy(update=fields) for report in record.reports)
    return record.model_copy(update={"reports": reports})


def software(tf32: int = 0, cpus: int = 1) -> Software:
    return Software(python="3", versions={}, settings={"tf32": tf32}, cpus=tuple(range(cpus)), variables={})


UNLIKE: dict[str, tuple[dict[str, object], dict[str, object], str]] = {
    "parameters": ({"parameter_count": 61706}, {"parameter_count": 60000}, "60,000 parameters: tf-multiworker"),
    "tf32": ({"software": software()}, {"software": software(tf32=1)}, "TF32 1: tf-multiworker"),
    "pinning": ({"software": software()}, {"software": software(cpus=4)}, "4 CPUs pinned a device: tf-multiworker"),
}


@pytest.mark.parametrize("what", UNLIKE)
def test_unlike_work_is_not_put_on_one_axis_and_the_reader_is_told(
    make_trial: MakeTrial, make_record: MakeRecord, what: str
) -> None:
    one, other, said = UNLIKE[what]
    records = [
        changed(make_record(make_trial(trainer="torch-ddp"), 0.1), **one),
        changed(make_record(make_trial(trainer="tf-multiworker"), 0.1), **other),
    ]
    trials, sentences = fairness.guarded(frames(records, Path("/nowhere")).trials)
    assert trials.workload.nunique() == 2
    [sentence] = sentences
    assert "not put on one axis" in sentence
    assert said in sentence
    with_efficiency = metrics.with_efficiency(metrics.with_throughput(trials))
    assert with_efficiency.reference_world_size.notna().all()


def test_loader_workers_count_where_there_is_something_to_load(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    for source, expected in (("synthetic", 1), ("digits", 2)):
        data = Data(source=source, channels=1, image_size=32, classes=10)
        trials = [make_trial(trainer="torch-ddp", data=data), make_trial(trainer="tf-mirrored", data=data)]
        records = [make_record(trial.model_copy(update={"loader_workers": n})) for n, trial in enumerate(trials)]
        guarded, _ = fairness.guarded(frames(records, Path("/nowhere")).trials)
        assert guarded.workload.nunique() == expected


def test_the_same_work_stays_together(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    records = [
        changed(make_record(make_trial(trainer=trainer, world_size=size), 0.1), software=software())
        for trainer in ("torch-ddp", "tf-multiworker")
        for size in (1, 2)
    ]
    # An older record does not say what was in force.
    records.append(make_record(make_trial(trainer="horovod-torch"), 0.1))
    trials, sentences = fairness.guarded(frames(records, Path("/nowhere")).trials)
    assert (trials.workload.nunique(), sentences) == (1, [])


def test_a_comparison_of_folders_refuses_unlike_work(
    make_trial: MakeTrial, make_record: MakeRecord, tmp_path: Path
) -> None:
    for name, count in (("base", 61706), ("new", 60000)):
        record = changed(make_record(make_trial(), 0.1), parameter_count=count)
        folder = tmp_path / name / "trials" / record.trial.folder_name
        folder.mkdir(parents=True)
        (folder / RECORD_NAME).write_text(record.model_dump_json(by_alias=True))
    found = compare.compare(tmp_path / "base", tmp_path / "new", 0.0)
    assert found.points.empty
    assert "60,000 parameters" in compare.markdown(found)


def timed(report: RankReport, step_times_s: list[float]) -> dict[str, object]:
    return {"windows": tuple(Window(10.0 * i, 10.0 * i + 5 * s, 5) for i, s in enumerate(step_times_s))}


def test_traps_are_named(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    steady = [0.1, 0.101, 0.099, 0.1, 0.1, 0.101, 0.099, 0.1, 0.1, 0.1]
    falls = [s * (1.09 - 0.01 * index) for index, s in enumerate(steady)]
    plain = make_record(make_trial(repeat=0, world_size=2))
    cases = {
        "steady": (plain, steady),
        "short": (make_record(make_trial(repeat=1, world_size=2)), [0.1]),
        "changed": (make_record(make_trial(repeat=2, world_size=2)), steady[:5] + [1.2 * s for s in steady[5:]]),
        "windows apart": (make_record(make_trial(repeat=3, world_size=2)), [*steady, 0.3]),
        "drifted": (make_record(make_trial(repeat=5, world_size=2)), [0.1 * 1.01**i for i in range(10)]),
        "warming up": (make_record(make_trial(repeat=6, world_size=2)), falls),
        "ranks": (plain.model_copy(update={"trial": make_trial(repeat=4, world_size=2)}), steady),
    }
    records = {kind: changed(record, **timed(record.reports[0], times)) for kind, (record, times) in cases.items()}
    records["ranks"] = records["ranks"].model_copy(update={"reports": records["ranks"].reports[:1]})
    trials = metrics.with_throughput(frames(records.values(), Path("/nowhere")).trials)
    by_trial = {record.trial.id: kind for kind, record in records.items()}
    found = {(by_trial[trial], kind): text for trial, kind, text in fairness.traps(trials) if kind != "repeat apart"}
    assert found == {
        ("short", "short"): "0.5 s timed in all; raise measurement.windows",
        ("changed", "changed"): "+20% from window 6 on",
        ("windows apart", "windows apart"): "1 window",
        ("drifted", "drifted"): "by +9%",
        ("warming up", "warming up"): "by 8%",
        ("ranks", "ranks"): "1 of 2 devices",
    }


def test_a_repeat_far_from_the_others_is_flagged_and_stays_in_the_numbers(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    records = [make_record(make_trial(repeat=i), s) for i, s in enumerate([0.1, 0.101, 0.099, 0.1, 0.102, 0.2])]
    trials = metrics.with_throughput(frames(records, Path("/nowhere")).trials)
    [(trial, text)] = [(trial, text) for trial, kind, text in fairness.traps(trials) if kind == "repeat apart"]
    assert trial == records[-1].trial.id
    assert text == "-50% against the median of its 6 repeats"
    assert metrics.with_efficiency(trials).efficiency.notna().sum() == 6


def placed(record: Record, *placements: Placement | None) -> Record:
    """Return the record with every rank pinned as said."""
    pairs = zip(record.reports, placements, strict=True)
    return record.model_copy(
        update={"reports": tuple(report.model_copy(update={"placement": own}) for report, own in pairs)}
    )


def pinned(*cpus: int, node: int = 0, gpus: tuple[int | None, ...] = ()) -> Placement:
    """Return a place on a host of eight cores of two hardware threads."""
    return Placement(cpus=cpus, cores=tuple(cpu % 8 for cpu in cpus), numa_nodes=(node,), gpu_numa_nodes=gpus)


def test_shared_cores_and_distant_gpus_are_named(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    def record(repeat: int) -> Record:
        return make_record(make_trial(repeat=repeat, world_size=2), 1.0)

    records = [
        placed(record(0), pinned(0), pinned(8)),
        placed(record(1), pinned(0, 8), pinned(1, 9)),
        placed(record(2), pinned(0, gpus=(0,)), pinned(1, gpus=(1,))),
        placed(record(3), pinned(0, gpus=(None,)), None),
        # The same CPU for both: they share it, too.
        placed(record(4), pinned(0, 8), pinned(0, 8)),
    ]
    # A core of the same number on another host is another core.
    apart = placed(record(5), pinned(0), pinned(8))
    other = apart.reports[1].rank.model_copy(update={"host": "there"})
    reports = (apart.reports[0], apart.reports[1].model_copy(update={"rank": other}))
    records.append(apart.model_copy(update={"reports": reports}))
    trials = metrics.with_throughput(frames(records, Path("/nowhere")).trials)
    by_id = {record.trial.id: record.trial.repeat for record in records}
    found = {
        (by_id[trial], kind): text
        for trial, kind, text in fairness.traps(trials)
        if kind in ("shared cores", "far from GPU")
    }
    assert found == {
        (0, "shared cores"): "2 ranks; lower threads_per_device or devices_per_node",
        (2, "far from GPU"): "1 rank",
        (4, "shared cores"): "2 ranks; lower threads_per_device or devices_per_node",
    }


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, True),
        ({"world_size": 1}, False),
        ({"execution": "graph"}, False),
        ({"device": "gpu"}, False),
        ({"trainer": "tf-multiworker"}, False),
    ],
)
def test_devices_that_compute_in_turns_are_named(
    make_trial: MakeTrial, make_record: MakeRecord, changes: dict[str, Any], named: bool
) -> None:
    trial = make_trial(trainer="tf-mirrored", world_size=2)
    trial = trial.model_copy(update={"execution": "compiled"} | changes)
    trials = metrics.with_throughput(frames([make_record(trial, 1.0)], Path("/nowhere")).trials)
    found = [(kind, text) for _, kind, text in fairness.traps(trials) if kind == "in turns"]
    assert found == ([("in turns", "2 devices a process; use execution: graph")] if named else [])


def test_hardware_threads_are_not_set_against_cores(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    records = [make_record(make_trial(hyper_threads=each, threads_per_device=2)) for each in (False, True)]
    workloads = frames(records, Path("/nowhere")).trials.workload
    assert [name.rpartition(", ")[2] for name in workloads] == ["2 CPUs a device", "2 hardware threads a device"]
