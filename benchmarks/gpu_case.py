"""One case of benchmarks/gpu.py: `python gpu_case.py CASE ENDS_S` prints what it has found as a line of JSON.

It prints again when it knows more: the last line counts. ENDS_S, by time.monotonic(), is when its rounds stop.
"""

import json
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from gpu_plan import PRECISIONS, Case, NoTimeError

from scalestudy.cluster.clock import now_s
from scalestudy.cluster.host import this_host
from scalestudy.trainers.measure import steps_for
from scalestudy.trainers.record import Costs, Record
from scalestudy.trainers.trial import Measurement, Trial

HERE = Path(__file__).resolve().parent
TESTS = HERE.parent / "tests/trainers/test_gpu.py"
# Contestants take turns in so many rounds of windows; energy needs a longer window, as its counter ticks.
WINDOW_S, ROUNDS, TELEMETRY_ROUNDS, ENERGY_WINDOW_S = 0.5, 12, 24, 4.0
DRY_WINDOW_S, DRY_ROUNDS = 0.02, 2
_ENERGY_INTERVAL_S = 0.05
_told: dict[str, Any] = {}
# What rounds take on a GPU, and how long one that has begun may go on.
_ROUNDS_S, _GRACE_S = 18.0, 5.0


def main() -> None:
    """Measure the case that the command line names."""
    case, ends_s = Case.model_validate_json(sys.argv[1]), float(sys.argv[2])
    threading.Thread(target=_die_with_parent, daemon=True).start()
    try:
        MEASURES[case.kind](case, ends_s)
    except NoTimeError as error:
        _tell(_told | {"outcome": "stopped", "why": str(error)})


def roofline(case: Case, ends_s: float) -> None:
    """Tell what the device reaches: FLOP/s of a large matrix product in each format, bytes/s of a large copy."""
    import torch

    gpu = not case.dry_run
    kind, side, floats = ("cuda", 8192, 2**28) if gpu else ("cpu", 128, 2**16)
    repeats = 10 if gpu else 2
    machine = {"python": platform.python_version(), "torch": str(torch.__version__), "device": this_host().cpu_model}
    if gpu:
        machine |= {"device": torch.cuda.get_device_name(), "cuda": str(torch.version.cuda)}
        machine |= {"cudnn": str(torch.backends.cudnn.version()), "driver": str(this_host().nvidia_driver)}
    found: dict[str, Any] = {"machine": machine, "matrix_product_flops_per_s": {}}

    def took_s(work: Callable[[], Any]) -> float:
        """Return the shortest of some turns of ten, for one."""
        turns = []
        for _ in range(repeats):
            began_s = time.perf_counter()
            for _ in range(10):
                work()
            if gpu:
                torch.cuda.synchronize()
            turns.append(time.perf_counter() - began_s)
        return min(turns) / 10

    for precision in PRECISIONS:
        if precision == "tf32" and not gpu:
            continue
        torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision, torch.float32)
        left, right = (torch.randn(side, side, device=kind).to(dtype) for _ in range(2))
        found["matrix_product_flops_per_s"][precision] = 2 * side**3 / took_s(partial(torch.matmul, left, right))
        _tell(found)
    source = torch.empty(floats, device=kind)
    target = torch.empty_like(source)
    copy_s = took_s(lambda: target.copy_(source))
    found["copy"] = {"bytes_per_s": 2 * source.nbytes / copy_s}
    watch = Watch(gpu)
    until_s = time.monotonic() + (1.0 if gpu else 0.0)
    while time.monotonic() < min(until_s, ends_s):
        took_s(lambda: target.copy_(source))
        watch()
    found["copy"] |= watch.found()
    _tell(found)


def train(case: Case, ends_s: float) -> None:
    """Tell the images/s of our loop, of a bare one and of one with timm's model, and what ours takes of the device."""
    if case.execution == "compiled" and case.dry_run:
        # Compiling takes a CPU half a minute a loop; the trainers' tests do it.
        os.environ["TORCHDYNAMO_DISABLE"] = "1"
    from gpu_contest import LOOPS, Contestant, NoAnswerError, flops_per_image

    batch = case.trial().per_device_batch
    found: dict[str, Any] = {"batch": batch, "missing": {}, "built": {}}
    loops, late = list(LOOPS), list[str]()
    if case.model == "cnn":
        loops.remove("timm")
        found["missing"]["timm"] = "the cnn is our own"
    contestants = {name: Contestant(case, name) for name in loops}
    if "TORCHDYNAMO_DISABLE" in os.environ:
        found["stand_in"] = "the compiler is off in a dry run"
    try:
        for name in loops:
            try:
                # What is compared with ours must leave it time for its rounds.
                found["built"][name] = contestants[name].build(ends_s if name == "ours" else ends_s - _ROUNDS_S)
            except (NoAnswerError, NoTimeError) as error:
                if name == "ours" and isinstance(error, NoTimeError):
                    raise
                contestants.pop(name).end()
                found["missing"][name] = str(error)
                late += [name] if isinstance(error, NoTimeError) else []
        if "ours" in found["missing"]:
            _tell(found)
            sys.exit(f"ours: {found['missing']['ours']}")
        few = 1 if case.dry_run else 5
        # The first steps say nothing of those that follow.
        for contestant in contestants.values():
            contestant.window(few, ends_s + _GRACE_S)
        step_s = max(contestant.window(few, ends_s + _GRACE_S).host_s for contestant in contestants.values()) / few
        found["steps"] = steps = steps_for(_window_s(case), step_s)
        found |= {"flops_per_image": flops_per_image(case), "rounds": 0}
        _tell(found)
        took_s: dict[str, list[float]] = {name: [] for name in contestants}
        by_device: list[float] = []
        for names in _turns(case, list(contestants), ends_s, len(contestants) * steps * step_s):
            row = {name: contestants[name].window(steps, ends_s + _GRACE_S) for name in names}
            for name, took in row.items():
                took_s[name].append(took.host_s)
            if (device_s := row["ours"].device_s) is not None:
                by_device.append(device_s / row["ours"].host_s)
            found |= {
                "rounds": len(took_s["ours"]),
                "rounds_took_s": took_s,
                "images_per_s": {name: batch * steps / median(values) for name, values in took_s.items()},
                "device_clock_over_host_clock": median(by_device) if by_device else None,
            }
            for name in took_s.keys() - {"ours"}:
                ratios = (theirs / ours for ours, theirs in zip(took_s["ours"], took_s[name], strict=True))
                found[f"ours_over_{name}"] = median(ratios)
            _tell(found)
        if not found["rounds"]:
            raise NoTimeError("no time was left for a round")
        steps = steps_for(min(ENERGY_WINDOW_S, max(0.0, ends_s - time.monotonic())), step_s) if not case.dry_run else 1
        watch = Watch(gpu=not case.dry_run)
        contestants["ours"].connection.send(steps)
        while not contestants["ours"].connection.poll(_ENERGY_INTERVAL_S):
            watch()
        took = contestants["ours"].answer(ends_s + _GRACE_S)
        found["device"] = watch.found()
        power_w = found["device"].get("power_w")
        found["joules_per_image"] = power_w and power_w * took.host_s / (steps * batch)
        _tell(found)
        if late:
            raise NoTimeError(f"{', '.join(late)}: not built in time")
    finally:
        for contestant in contestants.values():
            contestant.end()


def telemetry(case: Case, ends_s: float) -> None:
    """Tell throughput with the sampler at 10 Hz over that without, and of two windows without (noise)."""
    if why := _no_telemetry():
        _tell({"left_out": why})
        return
    from gpu_contest import Contestant
    from held_sampler import HeldSampler

    contestant = Contestant(case, "ours")
    with tempfile.TemporaryDirectory() as name:
        sampler = HeldSampler(Path(name), 0, 10.0)
        try:
            contestant.build(ends_s)
            # Past the sampler's own imports.
            time.sleep(0.5 if case.dry_run else 3)
            sampler.hold()
            step_s = contestant.window(5, ends_s).host_s / 5
            steps = steps_for(_window_s(case), step_s)
            rows: list[dict[str, float]] = []
            kinds = ["10 Hz", "none", "none again"]
            for kind in _turns(case, kinds, ends_s, 3 * steps * step_s, TELEMETRY_ROUNDS):
                row = {}
                for name in kind:
                    if name == "10 Hz":
                        sampler.go_on()
                    row[name] = contestant.window(steps, ends_s + _GRACE_S).host_s
                    sampler.hold()
                rows.append(row)
                found = {
                    "model": case.model,
                    "rounds": len(rows),
                    "rounds_took_s": rows,
                    "10_hz_over_none": median((row["none"] + row["none again"]) / 2 / row["10 Hz"] for row in rows),
                    "none_over_none": median(row["none"] / row["none again"] for row in rows),
                }
                _tell(found)
            if not rows:
                raise NoTimeError("no time was left for a round")
        finally:
            said = sampler.stop()
            contestant.end()
    _tell(found | {"samples": said.samples, "late": said.late, "sampler_missing": dict(said.missing)})
    if said.error:
        sys.exit(said.error)


def worker(case: Case, ends_s: float) -> None:
    """Tell how a trial ends that the local launcher runs, and what its ranks measured."""
    from scalestudy.launch.folder import StudyFolder
    from scalestudy.launch.local import LocalLauncher
    from scalestudy.launch.runner import Origin, run_trial

    why_no_telemetry = _no_telemetry()
    left_s = ends_s - time.monotonic()
    plan = Measurement(
        **_plan(case),
        telemetry_hz=0.0 if why_no_telemetry else 10.0,
        measure_max_s=max(0.1, left_s / 4),
        deadline_s=max(0.1, left_s),
    )
    with tempfile.TemporaryDirectory() as name:
        programs = {"torch-ddp": _one_gpu_program(Path(name))} if case.ranks > 1 else {}
        folder = StudyFolder(Path(name, "study"))
        folder.create("gpu")
        origin = Origin.of("gpu", "", Costs())
        record = run_trial(
            case.trial(measurement=plan), folder, LocalLauncher(programs), origin, Watcher(lambda record: None)
        )
        found = _summary(record)
        if why_no_telemetry:
            found["telemetry_left_out"] = why_no_telemetry
        _tell(found)
        if record.outcome == "timeout":
            raise NoTimeError(record.reason)
        if record.outcome == "ok" and record.missing:
            raise NoTimeError(f"the parts of a step: {'; '.join(record.missing.values())}")
        if record.outcome != "ok":
            for log in sorted(Path(name).rglob("rank-*.log")):
                sys.stderr.write(log.read_text(errors="replace")[-3000:])
            sys.exit(f"{record.outcome}: {record.reason}")


def batch_auto(case: Case, ends_s: float) -> None:
    """Tell which batch `batch: auto` finds, and how every try ended."""
    from scalestudy.launch.batch_search import Tries, settle_batches
    from scalestudy.launch.errors import InputError
    from scalestudy.launch.folder import StudyFolder
    from scalestudy.launch.local import LocalLauncher
    from scalestudy.launch.runner import Origin
    from scalestudy.launch.study import Layout, Study

    data = case.data()
    model = {"name": case.model, "image_size": data.image_size, "channels": data.channels, "classes": data.classes}
    study = Study.model_validate(
        {
            "name": "gpu",
            "trainers": "torch-ddp",
            "models": [model],
            "batch": "auto",
            "world_sizes": [1],
            "precision": case.precision,
            "measurement": {"deadline_s": max(0.1, ends_s - time.monotonic())},
        }
    )
    found: dict[str, Any] = {"model": case.model, "precision": case.precision, "tries": []}

    def finished(record: Record) -> None:
        tried = {"batch": record.trial.per_device_batch, "outcome": record.outcome, "reason": record.reason}
        found["tries"].append(tried | {"took_s": round(record.environment.duration_s, 1)})
        _tell(found)

    with tempfile.TemporaryDirectory() as name:
        folder = StudyFolder(Path(name, "study"))
        folder.create("gpu")
        tries = Tries(folder.tries(), LocalLauncher({}), Origin.of("gpu", "", Costs()), Watcher(finished))

        def stand_in(trial: Trial) -> Record:
            """Try it on the CPU, whose memory holds everything, with few images; say that more do not fit."""
            fits = min(trial.per_device_batch, 2)
            record = tries(trial.model_copy(update={"device": "cpu", "per_device_batch": fits}))
            refused = {"outcome": "oom", "reason": "said not to fit, in a dry run"}
            return record if fits == trial.per_device_batch else record.model_copy(update=refused)

        if case.dry_run:
            found["stand_in"] = "tries are on the CPU, more than 2 images are said not to fit"
        layout = Layout(device="gpu", devices_per_node=(1,), threads_per_device=case.trial().threads_per_device)
        try:
            settled = settle_batches(study, Path("gpu.py"), layout, stand_in if case.dry_run else tries)
        except InputError as error:
            if found["tries"] and found["tries"][-1]["outcome"] == "timeout":
                raise NoTimeError(str(error)) from None
            raise
    _tell(found | {"batch": settled.models[0].batch})


def checks(case: Case, ends_s: float) -> None:
    """Tell how the tests that need a GPU ended; without one they are skipped."""
    try:
        import pytest
    except ImportError:
        _tell({"left_out": "pytest is not installed; `make gpu-bundle` has it"})
        return
    # Another version of torch may have other warnings.
    argv = [sys.executable, "-m", "pytest", "-W", "default", "-p", "no:cacheprovider", "--tb=short", str(TESTS)]
    try:
        told = subprocess.run(argv, capture_output=True, text=True, timeout=max(0.1, ends_s - time.monotonic()))
    except subprocess.TimeoutExpired as error:
        raise NoTimeError(f"pytest was not done within {error.timeout:.0f} s") from None
    lines = (told.stdout + told.stderr).strip().splitlines()
    _tell({"pytest": pytest.__version__, "exit_code": told.returncode, "said": lines[-40:]})
    if told.returncode:
        sys.exit(lines[-1] if lines else f"pytest ended with exit code {told.returncode}")


MEASURES: Mapping[str, Callable[[Case, float], None]] = {
    "roofline": roofline,
    "train": train,
    "worker": worker,
    "telemetry": telemetry,
    "batch_auto": batch_auto,
    "checks": checks,
}


class Watcher:
    """Hears of every record; the runner's observer."""

    def __init__(self, hear: Callable[[Record], None]) -> None:
        self._hear = hear

    def started(self, trial: Trial, folder: Path) -> None:
        return None

    def tick(self) -> None:
        return None

    def finished(self, record: Record) -> None:
        self._hear(record)


class Watch:
    """What NVML says of the first GPU that CUDA shows, each time it is called; nothing without one."""

    def __init__(self, gpu: bool) -> None:
        self._gpus: Any = None
        self._rows: list[dict[str, Any]] = []
        if gpu:
            from scalestudy.cluster.cuda_devices import visible_gpus
            from scalestudy.cluster.nvml import Gpus

            self._gpus = Gpus()
            self._name = (
                visible_gpus(os.environ.get("CUDA_VISIBLE_DEVICES"), self._gpus.gpus, self._gpus.driver) or ("none",)
            )[0]

    def __call__(self) -> None:
        if self._gpus is not None:
            self._rows += [row for row in self._gpus.sample(now_s()) if row["device"] == self._name]

    def found(self) -> dict[str, Any]:
        """Return the means of what was seen, and the power by the energy counter."""
        # The counter ticks some ten times a second: from one tick to another it is exact.
        ticks: list[tuple[float, float]] = []
        for row in self._rows:
            if (energy_j := row.get("energy_j")) is not None and (not ticks or ticks[-1][1] != energy_j):
                ticks.append((row["time_s"], energy_j))
        means: dict[str, Any] = {}
        # The first reading is no tick.
        if len(ticks) > 2:
            means["power_w"] = (ticks[-1][1] - ticks[1][1]) / (ticks[-1][0] - ticks[1][0])
        for column in ("busy", "sm_active", "tensor_active", "dram_active", "sm_clock_mhz", "temperature_c"):
            if values := [row[column] for row in self._rows if row.get(column) is not None]:
                means[column] = fmean(values)
        if self._gpus is not None:
            means["missing"] = dict(self._gpus.missing)
        return means


def _turns(case: Case, names: list[str], ends_s: float, round_s: float, rounds: int = ROUNDS) -> Iterator[list[str]]:
    """Yield the names for each round, everyone first in turn, while there is time for one."""
    for index in range(DRY_ROUNDS if case.dry_run else rounds):
        if time.monotonic() + round_s > ends_s:
            return
        first = index % len(names)
        yield names[first:] + names[:first]


def _window_s(case: Case) -> float:
    return DRY_WINDOW_S if case.dry_run else WINDOW_S


def _plan(case: Case) -> dict[str, Any]:
    if case.dry_run:
        return {"window_s": DRY_WINDOW_S, "windows": DRY_ROUNDS, "warm_up_max_s": 0.1, "cause_windows": 1}
    return {"window_s": WINDOW_S, "windows": 10, "warm_up_max_s": 10.0, "cause_windows": 4}


def _summary(record: Record) -> dict[str, Any]:
    """Return what a record says in few numbers; seconds of a step are medians over a rank's windows."""
    ranks = []
    for report in record.reports:
        windows = {
            name.removesuffix("_windows"): getattr(report, name)
            for name in type(report).model_fields
            if name.endswith("windows") and name != "warm_up_windows"
        }
        steps_s = {
            name: median((window.end_s - window.start_s) / window.steps for window in seen)
            for name, seen in windows.items()
            if seen
        }
        ranks.append(
            {
                "step_s": steps_s,
                "windows": len(report.windows),
                "warm_up_steady": report.warm_up_steady,
                "phases_s": report.phases,
                "exchanged_bytes": report.exchanged_bytes,
                "memory": report.memory and report.memory.model_dump(),
                "software": report.software and report.software.model_dump(include={"versions", "settings", "cpus"}),
                "telemetry": report.telemetry and report.telemetry.model_dump(exclude={"gpus", "links"}),
                "error": report.error and report.error.message,
                "missing": {phase: error.message for phase, error in report.missing.items()},
            }
        )
    found: dict[str, Any] = {"model": record.trial.model, "batch": record.trial.per_device_batch}
    found |= {"trial_outcome": record.outcome, "reason": record.reason, "ranks": ranks}
    if record.outcome == "ok":
        found["images_per_s"] = record.throughput_images_per_s
    return found


def _one_gpu_program(folder: Path) -> str:
    """Return a program that runs a worker as a rank that shares the first GPU."""
    program = folder / "one-gpu-python"
    program.write_text(f'#!/bin/sh\nexec {shlex.join([sys.executable, str(HERE / "one_gpu_rank.py")])} "$@"\n')
    program.chmod(0o755)
    return str(program)


def _no_telemetry() -> str | None:
    """Return why the sampler cannot write its samples here, or None."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        return f"the sampler writes Parquet, and {error}"
    return None


def _tell(found: dict[str, Any]) -> None:
    _told.update(found)
    print(json.dumps(found), flush=True)


def _die_with_parent() -> None:
    """Wait until the parent's end of our stdin closes, however it died, and take our whole group with us."""
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
