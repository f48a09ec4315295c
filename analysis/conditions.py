"""What must be equal before two trials are the same point: the work, how it was measured, and on what."""

from collections.abc import Iterator
from functools import lru_cache

from pydantic import BaseModel

from scalestudy.trainers.devices import own_devices
from scalestudy.trainers.record import RankReport, Record
from scalestudy.trainers.trainer import TRAINERS

# By subject, words in which a reader is told of it; (subject, words).
Conditions = tuple[tuple[str, str], ...]

# Subjects that are no work but that on which it is done: two folders that differ in them can be compared.
_SURROUNDINGS = "device model", "driver", "versions", "data.folder", "seed"
# What a workload, a series or a point's key says already.
_SAID = {
    *("schema_version", "trainer", "model", "scaling", "world_size", "devices_per_node", "device", "per_device_batch"),
    *("precision", "execution", "options", "repeat", "sweep", "loader_workers"),
    *("data.source", "data.channels", "data.image_size", "optimizer.name"),
}
_SAID_ON_CPU = {"threads_per_device", "hyper_threads"}
# A trial that ended within its limits would have been the same within others.
_LIMITS = {"measurement.warm_up_max_s", "measurement.measure_max_s", "measurement.deadline_s"}
_WORDS = {
    "data.folder": "data in {}",
    "data.classes": "{} classes",
    "optimizer.learning_rate": "learning rate {:g}",
    "optimizer.momentum": "momentum {:g}",
    "measurement.window_s": "windows of {:g} s",
    "measurement.windows": "{} windows",
    "measurement.warm_up_min_s": "a warm-up of {:g} s at least",
    "measurement.cause_windows": "{} windows a part of a step",
    "measurement.telemetry_hz": "{:g} samples a second",
    "seed": "seed {}",
    "threads_per_device": "{} threads a device",
}


def conditions(record: Record) -> Conditions:
    """Return by subject, in words, what must be equal; what a record does not tell is left out."""
    return (*_work(record), *_surroundings(record))


def work_alone(found: Conditions) -> Conditions:
    """Return the conditions but those on which the work is done: devices, drivers, versions, where the data lie."""
    return tuple(pair for pair in found if not pair[0].startswith(_SURROUNDINGS))


def device_models(record: Record) -> tuple[str, ...]:
    """Return the models of the devices that a trial used, each once: of GPUs, or of its hosts' processors.

    A set: on a cluster of two models a study has three kinds of trials at most, not as many as hosts, and one that ran
    on both is no repeat of one that ran on either.
    """
    found: set[str] = set()
    for first in record.reports:
        if first.host is None:
            continue
        if record.trial.device == "cpu":
            found.add(first.host.cpu_model)
        else:
            found |= _gpu_models(first, record) or set(first.host.gpus)
    return tuple(sorted(found))


def _work(record: Record) -> Iterator[tuple[str, str]]:
    first = record.reports[0]
    if first.parameter_count is not None:
        yield "parameters", f"{first.parameter_count:,} parameters"
    if first.software is not None:
        if "tf32" in first.software.settings:
            yield "tf32", f"TF32 {first.software.settings['tf32']}"
        yield "pinning", f"{len(first.software.cpus) / first.replicas:.0f} CPUs pinned a device"
    trial = record.trial
    if trial.data.source != "synthetic":
        yield "loader workers", f"{trial.loader_workers} loader workers"
    said = _SAID_ON_CPU if trial.device == "cpu" else ()
    yield from (pair for pair in _fields(trial, "") if pair[0] not in said)


def _surroundings(record: Record) -> Iterator[tuple[str, str]]:
    if models := device_models(record):
        yield "device model", f"on {' + '.join(models)}"
    drivers = {report.host.nvidia_driver for report in record.reports if report.host and report.host.nvidia_driver}
    if drivers and record.trial.device == "gpu":
        yield "driver", f"driver {' + '.join(sorted(drivers))}"
    if (software := record.reports[0].software) is not None:
        # Two frameworks have versions of their own, and of what they bring.
        framework = TRAINERS[record.trial.trainer].distributions[0]
        for name, version in software.versions.items():
            if name not in ("scalestudy", "numpy"):
                yield f"versions of {framework}: {name}", f"{name} {version}"


def _gpu_models(first: RankReport, record: Record) -> set[str]:
    """Return the models of the GPUs that the ranks of a node drive, whose first rank's report is given."""
    if first.telemetry is None:
        return set()
    visible = first.telemetry.visible
    ranks = [report.rank for report in record.reports if report.rank.node_rank == first.rank.node_rank]
    driven = [device for rank in ranks for device in own_devices(record.trial, rank)]
    names = [visible[device] for device in driven if device < len(visible)]
    return {gpu.model for gpu in first.telemetry.gpus if gpu.name in names}


def _fields(part: BaseModel, above: str) -> Iterator[tuple[str, str]]:
    """Yield the fields of a trial, or of a part of it, that its key does not say, each in words."""
    for field in type(part).model_fields:
        value, name = getattr(part, field), above + field
        if name in _SAID or name in _LIMITS or value is None:
            continue
        if isinstance(value, BaseModel):
            yield from _of_part(value, f"{name}.")
        else:
            yield name, _WORDS.get(name, f"{field} {{}}").format(value)


@lru_cache(maxsize=1024)
def _of_part(part: BaseModel, above: str) -> Conditions:
    # Thousands of trials share a plan.
    return tuple(_fields(part, above))
