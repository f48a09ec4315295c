"""The program every rank runs, the same under every launcher: `python -m scalestudy.trainers.worker TRIAL_FOLDER`.

It reads `trial.json`, measures, and leaves `rank-N.json`; rank 0 tells how far it is in `progress.jsonl`.
"""

import hashlib
import json
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalestudy.cluster.clock import now_s
from scalestudy.cluster.host import pin, process_age_s, this_host, usable_cpus
from scalestudy.cluster.rank import Rank
from scalestudy.cluster.slurm_step import ADDRESSES, step_environ
from scalestudy.cluster.telemetry import Sampling
from scalestudy.trainers.collectives import sweep
from scalestudy.trainers.data import epoch_of, first_unreadable, list_images
from scalestudy.trainers.files import write_atomically
from scalestudy.trainers.measure import Measured, measure, measure_causes
from scalestudy.trainers.record import RankError, RankReport
from scalestudy.trainers.software import capture, overruled
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Trial


def main() -> None:
    """Run one rank; exits 1 after writing a report that says why."""
    folder = Path(sys.argv[1])
    if ADDRESSES in os.environ:
        os.environ.update(step_environ(os.environ))
    rank = Rank.from_environ(os.environ)
    if os.environ.get("SCALESTUDY_LIFELINE") == "stdin":
        threading.Thread(target=_die_with_launcher, daemon=True).start()
    trial = Trial.model_validate_json((folder / "trial.json").read_bytes())
    report = run(trial, rank, folder)
    write_atomically(folder / f"rank-{rank.rank}.json", report.model_dump_json())
    # A framework's threads can hang or crash while the interpreter is torn down; the report is safe, so leave.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if report.error is None else 1)


def run(trial: Trial, rank: Rank, folder: Path) -> RankReport:
    """Measure one rank and report, also when it fails."""
    phases = _Phases()
    found: dict[str, Any] = {}
    rate_hz = trial.measurement.telemetry_hz
    # Before the rank is pinned to its CPUs, where the sampler would stay, and before the device is taken.
    sampling = Sampling(folder, rank.node_rank, rank.host, rate_hz) if rate_hz and rank.local_rank == 0 else None
    try:
        _run(trial, rank, folder, phases, found)
    except Exception as error:
        traceback.print_exc()
        found["error"] = _rank_error(error, trial)
    if sampling is not None:
        found["telemetry"] = sampling.stop()
    return RankReport(rank=rank, pid=os.getpid(), phases=phases.seconds, phase_starts_s=phases.starts_s, **found)


def device_cpus(cpus: list[int], trial: Trial, rank: Rank) -> list[int]:
    """Return this rank's own CPUs among those it may use: as many for a device at every world size."""
    share = trial.threads_per_device * (trial.world_size // rank.world_size)
    if len(cpus) >= share * rank.local_world_size:
        return cpus[rank.local_rank * share : (rank.local_rank + 1) * share]
    # Too few for all ranks of the node: a scheduler has given this rank its own, or ranks must share.
    return cpus


def checksum(parameters: Mapping[str, NDArray[np.float32]]) -> str:
    """Return a digest that is equal if and only if every parameter is equal to the bit."""
    digest = hashlib.sha256()
    for name, value in sorted(parameters.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


class _Phases:
    """When each phase of the rank began, and the seconds it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.starts_s: dict[str, float] = {}

    @contextmanager
    def timed(self, name: str, since_s: float | None = None) -> Iterator[None]:
        start_s = now_s() if since_s is None else since_s
        self.starts_s[name] = start_s
        try:
            yield
        finally:
            self.seconds[name] = now_s() - start_s


def _run(trial: Trial, rank: Rank, folder: Path, phases: _Phases, found: dict[str, Any]) -> None:
    if rank.local_rank == 0:
        found["host"] = this_host()
    if why := overruled(trial.precision, trial.device, os.environ):
        raise ValueError(why)
    given = os.environ.get("SCALESTUDY_CPUS")
    pin([int(cpu) for cpu in given.split(",")] if given else device_cpus(usable_cpus(), trial, rank))
    # From the start of the process: the interpreter and our own imports are part of what a job waits for.
    with phases.timed("import", since_s=now_s() - process_age_s()):
        trainer_class = TRAINERS[trial.trainer].load()
    with phases.timed("rendezvous"):
        trainer = trainer_class(trial, rank)
    if trial.sweep:
        with phases.timed("sweep"):
            found["collectives"] = sweep(trainer, trial.sweep, trial.world_size)
        found["software"] = capture(trainer, os.environ)
        found["memory"] = trainer.memory()
        trainer.close()
        return
    with phases.timed("build"):
        trainer.build()
    with phases.timed("first_step"):
        trainer.step()
        trainer.synchronize()
    found["software"] = capture(trainer, os.environ)

    with phases.timed("warm_up"):
        trainer.max_over_ranks(0.0)
    measured = measure(trainer, trial.measurement, _progress(trial, rank, folder))
    phases.seconds["warm_up"] += sum(window.end_s - window.start_s for window in measured.warm_up_windows)
    found["warm_up_windows"] = tuple(measured.warm_up_windows)
    found["warm_up_steady"] = measured.warm_up_steady
    found["windows"] = tuple(measured.windows)
    found["losses"] = tuple(measured.losses)
    found["memory"] = trainer.memory()
    if trial.measurement.cause_windows and measured.windows:
        with phases.timed("causes"):
            causes = measure_causes(
                trainer,
                trial.measurement.cause_windows,
                measured.windows[-1].steps,
                resident=trial.data.source == "synthetic",
                alone=trial.world_size == 1,
            )
        for part in ("whole", "resident", "local", "input", "exchange"):
            found[f"{part}_windows"] = tuple(getattr(causes, part))
        found["local_step_times_s"] = tuple(causes.local_step_times_s)
        if causes.exchange:
            found["exchanged_bytes"] = trainer.exchanged_bytes()

    replicas = trainer.replicas()
    found["replicas"] = len(replicas)
    found["parameter_count"] = sum(value.size for value in replicas[0].values())
    found["parameter_checksums"] = tuple(checksum(replica) for replica in replicas)
    with phases.timed("test"):
        found["test_accuracy"] = trainer.test_accuracy()
    if rank.rank == 0:
        found["training_images"], found["left_out"] = epoch_of(trial.data)
    trainer.close()


def _progress(trial: Trial, rank: Rank, folder: Path) -> Any:
    def write(measured: Measured) -> None:
        if rank.rank != 0:
            return
        start_s, end_s, steps, _ = (measured.windows or measured.warm_up_windows)[-1]
        line = {
            "phase": "measuring" if measured.windows else "warm-up",
            "windows": len(measured.windows),
            "images_per_s": trial.global_batch * steps / (end_s - start_s),
        }
        with (folder / "progress.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    return write


def _explain(error: Exception, trial: Trial) -> str:
    """Return the error in one line; TensorFlow's own line does not name an image that it cannot decode."""
    if str(error).startswith("Caught "):
        # torch's data loader quotes its worker's traceback: the cause is the last line.
        return str(error).strip().splitlines()[-1]
    line = " ".join(str(error).split())
    if len(line) > 500:
        # TensorFlow wraps a cause in pages: what was done stands first, why it failed last.
        line = f"{line[:200]} … {line[-300:]}"
    if trial.data.source == "images" and "Error" in type(error).__name__ and not isinstance(error, ValueError):
        broken = first_unreadable(list_images(Path(trial.data.folder or "")).paths)
        if broken:
            return f"{broken}: not a readable image"
    return f"{type(error).__name__}: {line}"


def _rank_error(error: Exception, trial: Trial) -> RankError:
    """Return what went wrong; when memory ran out, with what the device's allocator held."""
    if not _out_of_memory(error):
        return RankError(kind="failed", message=_explain(error, trial))
    allocator = TRAINERS[trial.trainer].load().allocator_summary()
    if allocator:
        print(allocator, file=sys.stderr)
    return RankError(kind="oom", message=_explain(error, trial), allocator=allocator)


def _out_of_memory(error: Exception) -> bool:
    # By name: this module imports no framework. CUDA's libraries and torch's allocator on CPU have no class for it.
    names = {cls.__name__ for cls in type(error).__mro__}
    said = ("out of memory", "_STATUS_ALLOC_FAILED", "DefaultCPUAllocator: can't allocate memory")
    return bool(names & {"OutOfMemoryError", "ResourceExhaustedError", "MemoryError"}) or any(
        words in str(error) for words in said
    )


def _die_with_launcher() -> None:
    """Wait until the launcher's end of our stdin closes, however it died, and take our whole group with us."""
    # Not sys.stdin.read(): it would hold a lock that a data loader forked meanwhile waits for without end.
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
