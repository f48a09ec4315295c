"""`batch: auto`: what is tried, and what comes of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from scalestudy.cluster.host import Topology, this_host
from scalestudy.launch.batch_search import Tries, settle_batches
from scalestudy.launch.errors import InputError
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.launcher import Exit
from scalestudy.launch.runner import Origin
from scalestudy.launch.study import Layout, Study, load_study, study_trials
from scalestudy.trainers.files import write_atomically
from scalestudy.trainers.record import CUT_SHORT, Costs, ErrorKind, RankError, Record
from scalestudy.trainers.trial import Trial

GPUS = Layout(device="gpu", devices_per_node=(4,), threads_per_device=1)
ORIGIN = Origin(study_name="t", study_text="name: t", costs=Costs(), host=this_host(), scalestudy="0", git_commit=None)
MakeRecord = Callable[..., Record]


class Memory:
    """Stands for GPUs: a trainer fits up to its number of images; says what was tried, by trainer and batch."""

    def __init__(self, make_record: MakeRecord, **fits: int) -> None:
        self._make_record = make_record
        self._fits = fits
        self.tried: list[tuple[str, int]] = []

    def __call__(self, trial: Trial) -> Record:
        self.tried.append((trial.trainer, trial.per_device_batch))
        if trial.per_device_batch > self._fits.get(trial.trainer.replace("-", "_"), 2**20):
            return self._make_record(trial, outcome="oom", reason="rank 0: CUDA out of memory")
        return self._make_record(trial)


@pytest.fixture
def read(tmp_path: Path) -> Callable[..., tuple[Study, Path]]:
    def read(**changes: Any) -> tuple[Study, Path]:
        path = tmp_path / "study.yaml"
        usual = {
            "schema": 1,
            "name": "t",
            "trainers": ["torch-ddp", "tf-multiworker"],
            "models": [{"name": "cnn", "data": "synthetic"}],
            "world_sizes": [1, 2, 4],
            "batch": "auto",
        }
        path.write_text(yaml.safe_dump(usual | changes))
        return load_study(path), path

    return read


def batches(study: Study) -> list[Any]:
    return [model.batch for model in study.models]


@pytest.mark.parametrize("fits", [1, 2, 3, 255, 256, 257, 65_535, 10**6])
def test_the_largest_power_of_two_that_fits_is_found(read: Any, make_record: MakeRecord, fits: int) -> None:
    study, path = read(trainers=["torch-ddp"])
    memory = Memory(make_record, torch_ddp=fits)
    settled = settle_batches(study, path, GPUS, memory)
    assert batches(settled) == [(min(2 ** (fits.bit_length() - 1), 65_536),)]
    # Halving the 17 powers: at most five tries.
    assert len(memory.tried) <= 5
    # What was settled is an ordinary study.
    assert {trial.world_size for trial in study_trials(settled, path, GPUS)} == {1, 2, 4}


def test_all_trainers_get_the_batch_that_fits_each(read: Any, make_record: MakeRecord) -> None:
    study, path = read()
    memory = Memory(make_record, torch_ddp=300, tf_multiworker=70)
    assert batches(settle_batches(study, path, GPUS, memory)) == [(64,)]
    assert ("tf-multiworker", 128) in memory.tried


def test_each_model_has_its_own_and_a_number_stays(read: Any, make_record: MakeRecord) -> None:
    study, path = read(models=[{"name": "cnn"}, {"name": "resnet18", "batch": [4, 8]}])
    assert batches(settle_batches(study, path, GPUS, Memory(make_record, torch_ddp=16))) == [(16,), (4, 8)]


def test_tries_are_short_and_at_the_largest_world_size(read: Any, make_record: MakeRecord) -> None:
    study, path = read()
    seen: list[Trial] = []

    def try_out(trial: Trial) -> Record:
        seen.append(trial)
        return make_record(trial)

    settle_batches(study, path, GPUS, try_out)
    assert {trial.world_size for trial in seen} == {4}
    assert {(trial.measurement.windows, trial.measurement.warm_up_max_s, trial.repeat) for trial in seen} == {(2, 0, 0)}


def without_parts(make_record: MakeRecord, trial: Trial, kind: ErrorKind = "oom") -> Record:
    """Return the record of a trial whose second rank could not time the parts of a step; the others were cut."""
    record = make_record(trial)
    missing = dict.fromkeys(range(trial.world_size), CUT_SHORT) | {1: RankError(kind=kind, message="no memory left")}
    reports = [
        report.model_copy(update={"missing": {"causes": missing[report.rank.rank]}}) for report in record.reports
    ]
    return record.model_copy(update={"reports": tuple(reports)})


@pytest.mark.parametrize(("asked", "tried"), [(0, 0), (1, 1), (4, 1)])
def test_tries_time_the_parts_of_a_step_where_the_study_does(
    read: Any, make_record: MakeRecord, asked: int, tried: int
) -> None:
    study, path = read(trainers=["torch-ddp"], measurement={"cause_windows": asked})
    seen: list[int] = []

    def try_out(trial: Trial) -> Record:
        seen.append(trial.measurement.cause_windows)
        return make_record(trial)

    settle_batches(study, path, GPUS, try_out)
    assert set(seen) == {tried}


def test_a_batch_with_which_the_parts_of_a_step_do_not_fit_is_too_large(read: Any, make_record: MakeRecord) -> None:
    study, path = read(trainers=["torch-ddp"])

    def try_out(trial: Trial) -> Record:
        if trial.per_device_batch > 1000:
            return make_record(trial, outcome="oom", reason="rank 0: CUDA out of memory")
        return make_record(trial) if trial.per_device_batch <= 100 else without_parts(make_record, trial)

    assert batches(settle_batches(study, path, GPUS, try_out)) == [(64,)]


def test_parts_that_fail_otherwise_say_nothing_of_the_batch(read: Any, make_record: MakeRecord) -> None:
    study, path = read(trainers=["torch-ddp"])
    settled = settle_batches(study, path, GPUS, lambda trial: without_parts(make_record, trial, "failed"))
    assert batches(settled) == [(65_536,)]


def test_where_only_the_parts_never_fit_the_error_says_how_to_go_without(read: Any, make_record: MakeRecord) -> None:
    study, path = read(trainers=["torch-ddp"])
    with pytest.raises(InputError) as error:
        settle_batches(study, path, GPUS, lambda trial: without_parts(make_record, trial))
    assert str(error.value) == (
        f"{path}: models.0 (cnn): batch: 'auto': not even one image a device fits: rank 1, in the phase 'causes': no "
        "memory left; the training fits: measurement.cause_windows: 0 measures it without the parts of a step"
    )


def test_where_the_test_does_not_fit_nobody_is_told_to_leave_the_parts_out(read: Any, make_record: MakeRecord) -> None:
    """A test that runs out costs the parts too, and would without them."""
    study, path = read(trainers=["torch-ddp"])

    def try_out(trial: Trial) -> Record:
        missing = dict.fromkeys(("test", "causes"), RankError(kind="oom", message="no memory left"))
        record = make_record(trial)
        reports = tuple(report.model_copy(update={"missing": missing}) for report in record.reports)
        return record.model_copy(update={"reports": reports})

    with pytest.raises(InputError) as error:
        settle_batches(study, path, GPUS, try_out)
    assert str(error.value).endswith("not even one image a device fits: rank 0, in the phase 'test': no memory left")


def test_a_global_batch_is_no_larger_than_an_epoch(read: Any, make_record: MakeRecord) -> None:
    study, path = read(models=[{"name": "cnn", "data": "digits"}], trainers=["torch-ddp"])
    # 1,438 images on 4 devices: 359 each.
    assert batches(settle_batches(study, path, GPUS, Memory(make_record))) == [(256,)]


def killed(make_record: MakeRecord, trial: Trial, parts: bool) -> Record:
    """Return the record of a trial whose ranks the kernel killed: in the parts of a step, or before."""
    if not parts:
        reason = "rank 0 was killed by signal 9 (out of memory on the host?); rank-0.log is empty"
        return make_record(trial, outcome="failed", reason=reason)
    record = make_record(trial)
    reports = [report.model_copy(update={"missing": {"causes": CUT_SHORT}}) for report in record.reports]
    return record.model_copy(update={"reports": tuple(reports)})


@pytest.mark.parametrize("parts", [False, True])
def test_ranks_that_the_kernel_killed_had_too_large_a_batch(read: Any, make_record: MakeRecord, parts: bool) -> None:
    study, path = read(trainers=["torch-ddp"])

    def try_out(trial: Trial) -> Record:
        return make_record(trial) if trial.per_device_batch <= 1000 else killed(make_record, trial, parts)

    assert batches(settle_batches(study, path, GPUS, try_out)) == [(512,)]


def test_who_cannot_use_several_nodes_is_tried_on_one(read: Any, make_record: MakeRecord) -> None:
    study, path = read(trainers=["torch-ddp", "tf-mirrored"], world_sizes=[1, 4, 16])
    seen = set()

    def try_out(trial: Trial) -> Record:
        seen.add((trial.trainer, trial.world_size))
        return make_record(trial)

    settle_batches(study, path, Layout(device="gpu", devices_per_node=(4,), threads_per_device=1), try_out)
    assert seen == {("torch-ddp", 16), ("tf-mirrored", 4)}


def test_what_failed_is_tried_again(tmp_path: Path, make_trial: Callable[..., Trial], make_record: MakeRecord) -> None:
    folder = StudyFolder(tmp_path)
    folder.create("t")
    tried: list[str] = []

    class Launcher:
        name = "local"

        def scheduler(self) -> dict[str, str]:
            return {}

        def run(self, trial: Trial, path: Path, *_: object) -> Exit:
            tried.append(trial.id)
            for report in make_record(trial).reports:
                (path / f"rank-{report.rank.rank}.json").write_text(report.model_dump_json())
            return Exit((0,) * trial.world_size, False, None)

    class Deaf:
        def started(self, *_: object) -> None: ...
        def tick(self) -> None: ...
        def finished(self, *_: object) -> None: ...

    failed, whole = make_trial(), make_trial(per_device_batch=16)
    for trial, outcome in ((failed, "failed"), (whole, "ok")):
        folder.finish(folder.begin(trial), make_record(trial, outcome=outcome, reason="no network"))
    launcher: Any = Launcher()
    tries = Tries(folder, launcher, ORIGIN, Deaf())
    assert [tries(failed).outcome, tries(whole).outcome] == ["ok", "ok"]
    assert tried == [failed.id]


def test_when_nothing_fits_the_error_says_why(read: Any, make_record: MakeRecord) -> None:
    study, path = read(trainers=["torch-ddp"])
    with pytest.raises(InputError) as error:
        settle_batches(study, path, GPUS, Memory(make_record, torch_ddp=0))
    assert str(error.value) == (
        f"{path}: models.0 (cnn): batch: 'auto': not even one image a device fits: rank 0: CUDA out of memory"
    )


def test_a_try_that_fails_otherwise_ends_the_search(read: Any, make_record: MakeRecord) -> None:
    study, path = read(trainers=["torch-ddp"])
    with pytest.raises(InputError, match="batch: 'auto': 256 images a device: failed: no network"):
        settle_batches(study, path, GPUS, lambda trial: make_record(trial, outcome="failed", reason="no network"))


def test_on_cpu_there_is_no_memory_to_fill(read: Any, make_record: MakeRecord) -> None:
    study, path = read()
    with pytest.raises(InputError, match="batch: 'auto' fills the memory of a GPU; the device is a cpu"):
        settle_batches(
            study, path, Layout(device="cpu", devices_per_node=(2,), threads_per_device=1), Memory(make_record)
        )


def test_auto_is_a_per_device_batch(read: Any) -> None:
    with pytest.raises(InputError, match="in strong scaling give the global batch"):
        read(scaling="strong")
    with pytest.raises(InputError, match="batch"):
        read(batch="automatic")
    study, path = read()
    with pytest.raises(InputError, match="'auto' is found by `scalestudy run`"):
        study_trials(study, path, GPUS)


class Ranks:
    """A launcher whose ranks run out of memory above 100 images."""

    name = "local"
    elastic = False

    def __init__(self, make_record: MakeRecord) -> None:
        self._make_record = make_record
        self.ran: list[int] = []

    def capacity(self) -> Topology:
        return Topology(nodes=1, cpus_per_node=4, gpus_per_node=4)

    def scheduler(self) -> dict[str, str]:
        return {}

    def resume(self, *, advanced: bool) -> None:
        return None

    def run(self, trial: Trial, folder: Path, deadline_s: float, tick: Callable[[], None]) -> Exit:
        self.ran.append(trial.per_device_batch)
        failed = trial.per_device_batch > 100
        for report in self._make_record(trial).reports:
            error = RankError(kind="oom", message="CUDA out of memory", allocator="| table |") if failed else None
            text = report.model_copy(update={"error": error}).model_dump_json()
            write_atomically(folder / f"rank-{report.rank.rank}.json", text)
        return Exit(codes=(int(failed),) * trial.world_size, timed_out=False, first_failed=0 if failed else None)


class Silent:
    def started(self, trial: Trial, folder: Path) -> None: ...
    def tick(self) -> None: ...
    def finished(self, record: Record) -> None: ...


def test_tries_are_on_record_and_run_once(read: Any, make_record: MakeRecord, tmp_path: Path) -> None:
    study, path = read(trainers=["torch-ddp"])
    folder = StudyFolder(tmp_path / "out")
    folder.create("t")
    ranks = Ranks(make_record)
    for _ in range(2):
        settled = settle_batches(study, path, GPUS, Tries(folder.tries(), ranks, ORIGIN, Silent()))
        assert batches(settled) == [(64,)]
    assert ranks.ran == [256, 16, 64, 128]
    outcomes = folder.tries().outcomes()
    assert outcomes == {"oom": 2, "ok": 2}
    # They are no trials of the study.
    assert list(folder.trials_path.iterdir()) == []
