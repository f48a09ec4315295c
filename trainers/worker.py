"""The program every rank runs, the same under every launcher: `python -m scalestudy.trainers.worker TRIAL_FOLDER`.

It reads `trial.json`, measures, and leaves `rank-N.json`; rank 0 tells how far it is in `progress.jsonl`.
"""

import faulthandler
import hashlib
import json
import os
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scalestudy.cluster.clock import now_s
from scalestudy.cluster.cpu_use import CpuMeter
from scalestudy.cluster.cuda_memory import least_free_share
from scalestudy.cluster.host import process_age_s, this_host
from scalestudy.cluster.network import reach_directly
from scalestudy.cluster.rank import Rank, rank_addresses
from scalestudy.cluster.slurm_step import ADDRESSES, step_environ
from scalestudy.cluster.telemetry import Sampling
from scalestudy.cluster.temporary_folder import make_room_for_sockets
from scalestudy.trainers import standing
from scalestudy.trainers.collectives import sweep
from scalestudy.trainers.data import broken_image, epoch_of, undecodable
from scalestudy.trainers.devices import own_devices
from scalestudy.trainers.files import write_atomically
from scalestudy.trainers.measure import Measured, measure, measure_causes
from scalestudy.trainers.out_of_memory import is_doubtful, shared_memory_advice, whose_memory
from scalestudy.trainers.pinning import leave_place, placed, take_place
from scalestudy.trainers.record import CUT_SHORT, RankError, RankReport
from scalestudy.trainers.scratch import remove_scratch
from scalestudy.trainers.software import capture, overruled
from scalestudy.trainers.trainer import TRAINERS, Trainer
from scalestudy.trainers.trial import Trial

# One for algorithms of small messages, and 16 MiB for those of large ones.
_CONNECTING_VALUES = (1, 2**22)
_PARTS = ("whole", "resident", "local", "exchange")
# A process group that is left in order needs a second or two.
CLOSE_LIMIT_S = 60.0
# So long a broken image is looked for while the other ranks wait.
_LOOK_LIMIT_S = 30.0


def main() -> None:
    """Run one rank; exits 1 where others may wait for it."""
    # Where a library crashes, the rank's log says in which of our calls.
    faulthandler.enable()
    standing.answer_for_stacks()
    make_room_for_sockets(os.environ)
    folder = Path(sys.argv[1])
    if ADDRESSES in os.environ:
        os.environ.update(step_environ(os.environ))
    rank = Rank.from_environ(os.environ)
    if os.environ.get("SCALESTUDY_LIFELINE") == "stdin":
        threading.Thread(target=_die_with_launcher, daemon=True).start()
    trial = Trial.model_validate_json((folder / "trial.json").read_bytes())
    report = run(trial, rank, folder)
    standing.enter(standing.DONE)
    remove_scratch()
    # A framework's threads can hang or crash while the interpreter is torn down; the report is safe, so leave.
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0 if "close" in report.phases else 1)


def run(trial: Trial, rank: Rank, folder: Path) -> RankReport:
    """Measure one rank and leave its report, also when it fails; only then leave the other ranks.

    The report is there, whole, before the first thing that may go wrong without harm to what was measured: the parts
    of a step, the test, and closing, where frameworks are known to hang and to crash. A rank that fails in those leaves
    without closing, so that the launcher ends whoever waits for it in a collective.
    """
    try:
        return _reported(trial, rank, folder)
    finally:
        leave_place()


def _reported(trial: Trial, rank: Rank, folder: Path) -> RankReport:
    phases = _Phases()
    found: dict[str, Any] = {}
    rate_hz = trial.measurement.telemetry_hz
    # Before the rank is pinned to its CPUs, where the sampler would stay, and before the device is taken.
    sampling = Sampling(folder, rank.node_rank, rank.host, rate_hz) if rate_hz and rank.local_rank == 0 else None
    trainer = None

    def report() -> RankReport:
        left = RankReport(rank=rank, pid=os.getpid(), phases=phases.seconds, phase_starts_s=phases.starts_s, **found)
        write_atomically(folder / f"rank-{rank.rank}.json", left.model_dump_json())
        return left

    try:
        rank = placed(trial, rank, os.environ)
        trainer = _run(trial, rank, folder, phases, found)
    except Exception as error:
        traceback.print_exc()
        found["error"] = _rank_error(error, trial, rank, phases)
    if sampling is not None:
        found["telemetry"] = sampling.stop()
    if trainer is None:
        return report()
    later = {} if trial.sweep else _later_phases(trial, trainer, found)
    found["missing"] = {name: CUT_SHORT for name in later if name != "test" or trial.data.has_test}
    report()
    try:
        # From here on any rank may be the first to end.
        trainer.max_over_ranks(0.0)
        for name, phase in later.items():
            with phases.timed(name):
                found |= phase()
            found["missing"].pop(name, None)
            report()
    except Exception as error:
        traceback.print_exc()
        reason = _rank_error(error, trial, rank, phases)
        found["missing"] = dict.fromkeys(found["missing"], reason)
        return report()
    _close(trainer, phases)
    return report()


def checksum(parameters: Mapping[str, NDArray[np.float32]]) -> str:
    """Return a digest that is equal if and only if every parameter is equal to the bit."""
    digest = hashlib.sha256()
    for name, value in sorted(parameters.items()):
        digest.update(name.encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()[:16]


class _Phases:
    """When each phase of the rank began, and the seconds it took; and whether the device's allocator refused anything.

    `refusals` counts that, once there is a framework.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.starts_s: dict[str, float] = {}
        self.refusals: Callable[[], int | None] = lambda: None
        self._refused_before: int | None = None

    def refused(self) -> bool:
        """Return whether the allocator refused a request since the last phase began.

        Before that it may have, without harm: cuDNN's search for the fastest algorithm asks for more than there is.
        """
        return (self.refusals() or 0) > (self._refused_before or 0)

    @contextmanager
    def timed(self, name: str, since_s: float | None = None) -> Iterator[None]:
        standing.enter(name)
        start_s = now_s() if since_s is None else since_s
        self.starts_s[name] = start_s
        self._refused_before = self.refusals()
        try:
            yield
        finally:
            self.seconds[name] = now_s() - start_s


def _run(trial: Trial, rank: Rank, folder: Path, phases: _Phases, found: dict[str, Any]) -> Trainer:
    """Meet the others, train and time, and check the parameters; or sweep. Returns what is yet to be closed."""
    if rank.local_rank == 0:
        found["host"] = this_host()
    if why := overruled(trial.precision, trial.device, os.environ):
        raise ValueError(why)
    reach_directly(os.environ, rank_addresses(os.environ), rank.rank)
    found["placement"] = take_place(trial, rank, os.environ, folder)
    meter = CpuMeter(found["placement"].cpus)
    # From the start of the process: the interpreter and our own imports are part of what a job waits for.
    with phases.timed("import", since_s=now_s() - process_age_s()):
        trainer_class = TRAINERS[trial.trainer].load()
    phases.refusals = trainer_class.allocator_refusals
    with phases.timed("rendezvous"):
        trainer = trainer_class(trial, rank)
        _connect(trainer)
    if trial.sweep:
        with phases.timed("sweep"):
            found["collectives"] = sweep(trainer, trial.sweep, trial.world_size)
        found["software"] = capture(trainer, os.environ)
        found["memory"] = trainer.memory()
        return trainer
    with phases.timed("build"):
        trainer.build()
    with phases.timed("first_step"):
        trainer.step()
        trainer.synchronize()
    found["software"] = capture(trainer, os.environ)

    with phases.timed("warm_up"):
        trainer.max_over_ranks(0.0)
    standing.enter(standing.MEASURING)

    def begin() -> None:
        found["cpu_before"] = meter.lap()

    measured = measure(
        trainer, trial.measurement, _progress(trial, rank, folder), begin, warm_up_min_s=trial.warm_up_min_s
    )
    found["cpu_measured"] = meter.lap()
    # Again: DDP makes its buckets anew after the first steps.
    found["software"] = capture(trainer, os.environ)
    phases.seconds["warm_up"] += sum(window.end_s - window.start_s for window in measured.warm_up_windows)
    found["warm_up_windows"] = tuple(measured.warm_up_windows)
    found["warm_up_steady"] = measured.warm_up_steady
    found["windows"] = tuple(measured.windows)
    found["losses"] = tuple(measured.losses)
    found["warm_up_memory"] = measured.warm_up_memory
    found["memory"] = measured.memory

    replicas = trainer.replicas()
    found["replicas"] = len(replicas)
    found["parameter_count"] = sum(value.size for value in replicas[0].values())
    found["parameter_checksums"] = tuple(checksum(replica) for replica in replicas)
    if rank.rank == 0:
        found["training_images"], found["left_out"] = epoch_of(trial.data)
    return trainer


def _connect(trainer: Trainer) -> None:
    """Have the ranks connect now: most libraries do so in their first collective, and would in the first step.

    NCCL from 2.22 on connects for each of its algorithms when it is first chosen, and chooses by the size.
    """
    for count in _CONNECTING_VALUES:
        trainer.all_reduce(lambda _, count=count: np.zeros(count, np.float32))()  # type: ignore[misc]
    trainer.synchronize()


def _later_phases(trial: Trial, trainer: Trainer, found: dict[str, Any]) -> dict[str, Callable[[], dict[str, Any]]]:
    """Return the phases after the timed windows: what each adds to the report."""
    windows = found["windows"]

    def causes() -> dict[str, Any]:
        seen = measure_causes(
            trainer,
            trial.measurement.cause_windows,
            windows[-1].steps,
            resident=trial.data.source == "synthetic",
            alone=trial.world_size == 1,
            # The same on every rank, and another one in each repeat.
            seed=trial.seed + trial.repeat,
            drain_max_s=trial.measurement.measure_max_s,
        )
        return {
            **{f"{part}_windows": tuple(getattr(seen, part)) for part in _PARTS},
            "local_step_times_s": tuple(seen.local_step_times_s),
            "exchanged_bytes": trainer.exchanged_bytes() if seen.exchange else None,
        }

    def test() -> dict[str, Any]:
        return {"test_accuracy": trainer.test_accuracy()}

    # The test first: its network is as the timed windows left it, and should the parts not fit, it is not lost.
    return {"test": test, **({"causes": causes} if trial.measurement.cause_windows and windows else {})}


def _close(trainer: Trainer, phases: _Phases) -> None:
    """Leave the other ranks; whatever goes wrong is logged, and a hang ends the process."""
    # By a thread that needs no interpreter: what hangs may hold its lock.
    faulthandler.dump_traceback_later(CLOSE_LIMIT_S, exit=True, file=sys.__stderr__ or 2)
    try:
        # Not before everybody's report is there: if this rank crashes, the launcher ends the others.
        _logged(lambda: trainer.max_over_ranks(0.0))
        with phases.timed("close"):
            _logged(trainer.close)
    finally:
        faulthandler.cancel_dump_traceback_later()


def _logged(call: Callable[[], object]) -> None:
    try:
        call()
    except BaseException:
        traceback.print_exc()


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
        with (folder / "progress.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    return write


def _rank_error(error: Exception, trial: Trial, rank: Rank, phases: _Phases) -> RankError:
    """Return what went wrong; when memory ran out, with what the device's allocator held.

    The framework may be broken by now: whatever is asked of it here may fail, and costs no more than itself.
    """
    owner = whose_memory(error)
    if owner is None and trial.device == "gpu" and is_doubtful(error):
        owner = whose_memory(error, _free_share(trial, rank, phases))
    message = f"{type(error).__name__}: {_line(error)}"
    if owner is None:
        # To explain an error is no reason for another one.
        with suppress(Exception):
            message = _explained(error, trial) or message
        return RankError(kind="failed", message=message)
    if owner == "host":
        return RankError(kind="oom", message=f"{message} (the memory of the host ran out, not a GPU's)")
    allocator = None
    with suppress(Exception):
        allocator = TRAINERS[trial.trainer].load().allocator_summary()
    if allocator:
        print(allocator, file=sys.stderr)
    return RankError(kind="oom", message=message, allocator=allocator)


def _free_share(trial: Trial, rank: Rank, phases: _Phases) -> float | None:
    """Return which share of the fullest of the rank's devices is free; 0 where the framework was refused memory."""
    with suppress(Exception):
        if phases.refused():
            return 0.0
    return least_free_share(own_devices(trial, rank))


def _line(error: Exception) -> str:
    """Return the error in one line."""
    line = " ".join(str(error).split())
    # TensorFlow wraps a cause in pages: what was done stands first, why it failed last.
    return line if len(line) <= 500 else f"{line[:200]} … {line[-300:]}"


def _explained(error: Exception, trial: Trial) -> str | None:
    """Return what is behind an error whose own words do not say it, None where they do."""
    if re.search("DataLoader worker .* killed by signal: Killed", str(error)):
        return f"{type(error).__name__}: {_line(error)} (out of memory on the host?)"
    if advice := shared_memory_advice(error):
        return f"{type(error).__name__}: {_line(error)}: {advice}"
    if str(error).startswith("Caught "):
        # torch's data loader quotes its worker's traceback: the cause is the last line.
        return str(error).strip().splitlines()[-1]
    if trial.data.source == "images" and undecodable(error):
        return broken_image(Path(trial.data.folder or ""), _LOOK_LIMIT_S)
    return None


def _die_with_launcher() -> None:
    """Wait until the launcher's end of our stdin closes, however it died, and take our whole group with us."""
    # Not sys.stdin.read(): it would hold a lock that a data loader forked meanwhile waits for without end.
    os.read(sys.stdin.fileno(), 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    main()
