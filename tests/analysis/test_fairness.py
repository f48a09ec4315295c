"""What was not the same work never meets on one axis, and the known traps are named."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalestudy.analysis import compare, conditions, fairness, metrics
from scalestudy.analysis.conditions import device_models
from scalestudy.analysis.frames import frames
from scalestudy.analysis.tables import tables
from scalestudy.cluster.host import Host
from scalestudy.cluster.telemetry import Gpu, Telemetry
from scalestudy.trainers.files import RECORD_NAME
from scalestudy.trainers.record import Placement, RankReport, Record, Software, Window
from scalestudy.trainers.trial import Data, Measurement, Optimizer, Trial

MakeTrial = Callable[..., Trial]
MakeRecord = Callable[..., Record]
HOST = Host(name="here", system="Linux", cpu_model="a CPU", cpu_count=2, memory_bytes=2**34)


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


GPUS = HOST.model_copy(update={"gpus": ("NVIDIA A100",), "nvidia_driver": "550.1"})
OTHER_CPU = HOST.model_copy(update={"cpu_model": "another CPU"})


def versions(**found: str) -> Software:
    return software().model_copy(update={"versions": {"scalestudy": "1", "numpy": "2", **found}})


def on(record: Record, *hosts: Host) -> Record:
    """Return the record with a rank on each of the hosts."""
    reports = tuple(
        report.model_copy(
            update={"host": host, "rank": report.rank.model_copy(update={"node_rank": node, "local_rank": 0})}
        )
        for node, (report, host) in enumerate(zip(record.reports, hosts, strict=True))
    )
    return record.model_copy(update={"reports": reports})


def split(records: list[Record]) -> tuple[list[list[str]], list[str]]:
    """Return the endings of the workloads, from where they differ, each once, and what is said."""
    trials, sentences = fairness.guarded(frames(records, Path("/nowhere")).trials)
    return sorted(name.split(", ")[5:] for name in trials.workload.unique()), sentences


def test_two_kinds_of_gpu_are_no_scaling(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    """A100 on one device and H100 on two would keep 167 %."""
    h100 = GPUS.model_copy(update={"gpus": ("NVIDIA H100",), "nvidia_driver": "570.2"})
    records = [
        changed(
            on(make_record(make_trial(device="gpu", devices_per_node=1), 0.1), GPUS),
            software=versions(torch="2.10.0", cuda="12.6"),
        ),
        changed(
            on(make_record(make_trial(device="gpu", world_size=2, devices_per_node=1), 0.06), h100, h100),
            software=versions(torch="2.11.0", cuda="12.8"),
        ),
    ]
    # What differs with the device stands in the sentence alone.
    endings, [sentence] = split(records)
    assert [ending[-1] for ending in endings] == ["on NVIDIA A100", "on NVIDIA H100"]
    assert "on NVIDIA H100, driver 570.2, torch 2.11.0, cuda 12.8: torch-ddp" in sentence
    points = tables(frames(records, Path("/nowhere"))).points
    assert points.efficiency.tolist() == [1, 1]


def test_versions_are_compared_within_a_framework(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    tensorflow = changed(make_record(make_trial(trainer="tf-mirrored")), software=versions(tensorflow="2.21", cuda="1"))
    torch = changed(make_record(make_trial()), software=versions(torch="2.11", cuda="2"))
    assert split([tensorflow, torch])[1] == []
    newer = changed(make_record(make_trial(world_size=2)), software=versions(torch="2.12", cuda="2"))
    endings, [sentence] = split([tensorflow, torch, newer])
    assert [ending[1:] for ending in endings] == [[], ["torch 2.11"], ["torch 2.12"]]
    assert "the others: tf-mirrored; torch 2.11: torch-ddp; torch 2.12: torch-ddp" in sentence


def test_a_cluster_of_two_models_makes_three_workloads_at_most(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    """However many hosts there are; a trial on both is no repeat of one on either, and is named."""
    records = [
        on(make_record(make_trial(world_size=2, devices_per_node=1, repeat=repeat)), one, other)
        for repeat, (one, other) in enumerate([(HOST, HOST), (HOST, OTHER_CPU), (OTHER_CPU, HOST), (OTHER_CPU,) * 2])
    ]
    endings, _ = split(records)
    assert [ending[-1] for ending in endings] == ["on a CPU", "on a CPU + another CPU", "on another CPU"]
    trials = metrics.with_throughput(frames(records, Path("/nowhere")).trials)
    mixed = [(trial, text) for trial, kind, text in fairness.traps(trials) if kind == "mixed"]
    assert mixed == [(records[repeat].trial.id, "a CPU + another CPU") for repeat in (1, 2)]


def test_of_the_gpus_of_a_host_those_count_that_the_ranks_use(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    gpus = tuple(Gpu(name=f"gpu{i}", uuid=str(i), model=f"model {i}") for i in range(3))
    telemetry = Telemetry(host="here", file="x", rate_hz=1, gpus=gpus, visible=("gpu2", "gpu0"))
    record = changed(on(make_record(make_trial(device="gpu")), GPUS), telemetry=telemetry)
    assert device_models(record) == ("model 2",)
    assert device_models(changed(record, telemetry=None)) == ("NVIDIA A100",)


EDITED: dict[str, tuple[dict[str, Any], str]] = {
    "windows' length": ({"measurement": Measurement(window_s=0.1)}, "windows of 0.1 s"),
    "learning rate": ({"optimizer": Optimizer(learning_rate=0.1)}, "learning rate 0.1"),
    "momentum": ({"optimizer": Optimizer(momentum=0)}, "momentum 0"),
    "seed": ({"seed": 7}, "seed 7"),
    "classes": ({"data": Data(source="synthetic", channels=1, image_size=32, classes=99)}, "99 classes"),
    "threads of a GPU's rank": ({"device": "gpu", "threads_per_device": 3}, "3 threads a device"),
}


@pytest.mark.parametrize("what", EDITED)
def test_an_edited_study_gives_no_more_repeats(make_trial: MakeTrial, make_record: MakeRecord, what: str) -> None:
    edit, named = EDITED[what]
    usual: dict[str, Any] = {"device": edit.get("device", "cpu"), "measurement": Measurement()}
    records = [
        make_record(make_trial(**usual | changes, repeat=repeat), 0.1) for changes in ({}, edit) for repeat in range(2)
    ]
    endings, [sentence] = split(records)
    assert [named in ending for ending in endings].count(True) == 1
    assert f"{named}: torch-ddp" in sentence
    assert tables(frames(records, Path("/nowhere"))).points.repeats.tolist() == [2, 2]


def test_a_field_of_a_trial_is_guarded_unless_it_is_said_by_its_key_or_a_limit(make_trial: MakeTrial) -> None:
    """A new field is guarded, too, unless somebody decides otherwise: nothing unlike is pooled unseen."""
    data = Data(source="digits", folder="x", channels=1, image_size=32, classes=10)
    trial = make_trial(data=data, measurement=Measurement(warm_up_min_s=1))
    parts = {"": trial, "data.": trial.data, "optimizer.": trial.optimizer, "measurement.": trial.measurement}
    fields = {above + name for above, part in parts.items() for name in type(part).model_fields}
    said = conditions._SAID | conditions._LIMITS
    assert said | conditions._SAID_ON_CPU <= fields
    assert {name for name, _ in conditions._fields(trial, "")} == fields - said - {"data", "optimizer", "measurement"}


def test_a_trial_that_ended_within_a_raised_limit_is_no_failure(make_trial: MakeTrial, make_record: MakeRecord) -> None:
    late = make_trial(measurement=Measurement(deadline_s=60))
    timed_out = make_record(late, outcome="timeout", reason="60 s were over", reports=())
    made = tables(
        frames([timed_out, make_record(make_trial(measurement=Measurement(deadline_s=120)))], Path("/nowhere"))
    )
    assert made.trials.outcome.tolist() == ["ok"]
    # One that fails since does.
    environment = timed_out.environment.model_copy(update={"started_at": "2027-01-01T00:00:00+00:00"})
    later = timed_out.model_copy(update={"environment": environment})
    ok = make_record(make_trial(measurement=Measurement(deadline_s=120)))
    made = tables(frames([timed_out, ok, later], Path("/nowhere")))
    assert sorted(made.trials.outcome) == ["ok", "timeout"]


def test_failed_trials_stay_with_those_of_their_series_where_a_workload_is_split(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    """What failed tells no parameters: it is of the series that did."""
    found = []
    for trainer, count in (("torch-ddp", 100), ("tf-multiworker", 101)):
        record = make_record(make_trial(trainer=trainer))
        reports = tuple(report.model_copy(update={"parameter_count": count}) for report in record.reports)
        found.append(record.model_copy(update={"reports": reports}))
    found.append(make_record(make_trial(repeat=1), outcome="failed", reason="x", reports=()))
    trials, [said] = fairness.guarded(frames(found, Path("/nowhere")).trials)
    of_torch = trials[trials.trainer == "torch-ddp"]
    assert of_torch.workload.nunique() == 1
    assert "100 parameters" in of_torch.workload.iloc[0]
    assert "not put on one axis" in said


def test_a_point_and_repeat_counts_once_and_the_later_record_is_named(
    make_trial: MakeTrial, make_record: MakeRecord
) -> None:
    """A study whose deadline was edited, and run again into the same folder."""
    plans = [Measurement(deadline_s=seconds) for seconds in (60, 120)]
    records = [
        make_record(make_trial(measurement=plan, repeat=repeat), 0.1 * (1 + index))
        for index, plan in enumerate(plans)
        for repeat in range(2)
    ]
    records = [
        record.model_copy(
            update={
                "environment": record.environment.model_copy(
                    update={"started_at": f"2026-01-0{2 - number // 2}T00:00:00+00:00"}
                )
            }
        )
        for number, record in enumerate(records)
    ]
    made = tables(frames(records, Path("/nowhere")))
    [point] = made.points.to_dict("records")
    # The second pair was started a day before the first.
    assert (point["repeats"], point["step_time_s"]) == (2, pytest.approx(0.2))
    assert made.unlike == [
        f"{late.trial.folder_name} measured the same repeat of the same point as {first.trial.folder_name}, and later: "
        "it is left out."
        for late, first in zip(records[:2], records[2:], strict=True)
    ]


def test_folders_of_other_versions_and_devices_can_be_compared(
    make_trial: MakeTrial, make_record: MakeRecord, tmp_path: Path
) -> None:
    for name, host, version, step_s in (("base", HOST, "2.10", 0.1), ("new", OTHER_CPU, "2.11", 0.11)):
        record = changed(on(make_record(make_trial(), step_s), host), software=versions(torch=version))
        folder = tmp_path / name / "trials" / record.trial.folder_name
        folder.mkdir(parents=True)
        (folder / RECORD_NAME).write_text(record.model_dump_json(by_alias=True))
    assert len(compare.compare(tmp_path / "base", tmp_path / "new", 0.0).points) == 1


def test_a_comparison_of_folders_refuses_unlike_work(
    make_trial: MakeTrial, make_record: MakeRecord, tmp_path: Path
) -> None:
    for name, count, step_s in (("base", 61706, 0.1), ("new", 60000, 0.11)):
        record = changed(make_record(make_trial(), step_s), parameter_count=count)
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
