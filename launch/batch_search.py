"""`batch: auto`: the largest per-device batch that fits, a power of two, found by trying."""

from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path

from scalestudy.launch.errors import InputError
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.launcher import Launcher, unfit
from scalestudy.launch.outcome import KILLED
from scalestudy.launch.runner import Observer, Origin, run_trial
from scalestudy.launch.study import AUTO, Layout, ModelEntry, Study, study_trials
from scalestudy.trainers.data import training_images
from scalestudy.trainers.record import CUT_SHORT, Record
from scalestudy.trainers.trial import Measurement, Trial

_MOST = 2**16
# The first step makes the optimizer's state, the second needs it beside the gradients: three hold all there is.
_TRY = {"windows": 2, "window_s": 1e-3, "warm_up_max_s": 0.0, "telemetry_hz": 0.0}
_WITHOUT_CAUSES = "; the training fits: measurement.cause_windows: 0 measures it without the parts of a step"


def settle_batches(study: Study, path: Path, layout: Layout, try_out: Callable[[Trial], Record]) -> Study:
    """Return the study with a number for every `auto`.

    One number a model, so that all do the same work: the largest power of two with which every trainer, execution,
    option and precision of the study fits into the memory of its devices, at the largest world size, together
    with the parts of a step where they are to be timed. Raises InputError where not even one image a device does, and
    where a try fails for another reason.
    """
    if layout.device == "cpu" and study.searches_batch:
        raise InputError(
            f"{path}: batch: 'auto' fills the memory of a GPU; the device is a cpu, whose memory is the host's: "
            "give a number"
        )
    return study.model_copy(
        update={
            "models": tuple(
                model.model_copy(update={"batch": (_largest(study, model, path, layout, try_out),)})
                if (model.batch or study.batch) == AUTO
                else model
                for model in study.models
            )
        }
    )


class Tries:
    """Runs a try as a trial in the folder `tries/`, until it is known whether it fits; a call returns the record."""

    def __init__(self, folder: StudyFolder, launcher: Launcher, origin: Origin, observer: Observer) -> None:
        self._folder = folder
        self._launcher = launcher
        self._origin = origin
        self._observer = observer

    def __call__(self, trial: Trial) -> Record:
        record = self._folder.record(trial)
        # What failed for another reason than its memory may not fail again.
        if record is None or record.outcome not in ("ok", "oom"):
            record = run_trial(trial, self._folder, self._launcher, self._origin, self._observer)
            self._observer.finished(record)
        return record


def _largest(study: Study, model: ModelEntry, path: Path, layout: Layout, try_out: Callable[[Trial], Record]) -> int:
    place = f"{path}: models.{study.models.index(model)} ({model.name}): batch: 'auto'"
    largest = max(study.world_sizes)
    # Where the study times the parts of a step they must fit too: batches and networks of their own are made for them.
    quick = Measurement(
        **(study.measurement.model_dump() | _TRY | {"cause_windows": min(1, study.measurement.cause_windows)})
    )
    reasons: dict[int, str] = {}

    def trials(batch: int) -> list[Trial]:
        """Return a trial of every trainer and way, each at the largest world size that it can have."""
        own = model.model_copy(update={"batch": (batch,)})
        found: dict[str, Trial] = {}
        for size in sorted(set(study.world_sizes), reverse=True):
            changes = {"models": (own,), "world_sizes": (size,), "repeats": 1, "measurement": quick}
            there = study_trials(study.model_copy(update=changes), path, layout)
            for trial in there:
                if not unfit(trial):
                    found.setdefault(trial.model_copy(update={"world_size": 1, "per_device_batch": 1}).id, trial)
            if len(found) == len(there):
                break
        return list(found.values())

    def too_large(exponent: int) -> bool:
        for trial in trials(2**exponent):
            record = try_out(trial)
            if reason := _does_not_fit(record):
                parts_alone = record.missing.keys() == {"causes"}
                reasons[exponent] = f"{reason}{_WITHOUT_CAUSES}" if parts_alone else reason
                return True
            if record.outcome != "ok":
                raise InputError(
                    f"{place}: {trial.per_device_batch} images a device: {record.outcome}: {record.reason}"
                )
        return False

    images = training_images(trials(1)[0].data)
    # An epoch must hold one global batch.
    most = min(_MOST, _MOST if images is None else images // largest)
    first_too_large = bisect_left(range(most.bit_length()), True, key=too_large)
    if first_too_large == 0:
        raise InputError(f"{place}: not even one image a device fits: {reasons.get(0, f'{images} training images')}")
    return int(2 ** (first_too_large - 1))


def _does_not_fit(record: Record) -> str | None:
    """Return why a try was too large, None where it was not, or failed for another reason.

    The kernel kills who has taken the last of the host's memory: such a rank says nothing.
    """
    if record.out_of_memory:
        return record.out_of_memory
    if record.outcome == "failed" and KILLED in (record.reason or ""):
        return record.reason
    cut_short = [report.missing for report in record.reports if report.missing]
    if cut_short and all(error == CUT_SHORT for missing in cut_short for error in missing.values()):
        return next(iter(record.missing.values()))
    return None
