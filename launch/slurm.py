"""The Slurm launcher: inside an allocation, every trial is an srun step of its own size."""

import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

from scalestudy.cluster.cuda_devices import MIG_LIMIT
from scalestudy.cluster.host import Topology
from scalestudy.cluster.network import joined
from scalestudy.cluster.slurm_step import ADDRESSES
from scalestudy.launch import slurm_ask
from scalestudy.launch.children import kill_group, wait_for
from scalestudy.launch.errors import InputError
from scalestudy.launch.launcher import Exit, Program, processes, worker_command, worker_variables
from scalestudy.launch.slurm_ask import SlurmError
from scalestudy.launch.study import Container
from scalestudy.trainers.standing import STACKS_SIGNAL, STACKS_WAIT_S
from scalestudy.trainers.trial import Trial

LOG_NAME = "srun.log"
# srun ends its tasks by SIGKILL and waits for them; longer than that something is stuck.
_STOP_S = 20.0
_OUT_OF_MEMORY = "Out Of Memory"
_FAILED_TASKS = re.compile(r"^srun: error: \S+: tasks? ([\d,-]+): (.*?)(?: \(core dumped\))?$", re.MULTILINE)
_SIGNALS = {signal.strsignal(number): number for number in signal.valid_signals()}


class SlurmLauncher:
    """Ranks as tasks of steps in the allocation that `environ` is of; a node that was lost is not used again."""

    name = "slurm"
    elastic = False

    def __init__(
        self,
        programs: Mapping[str, Program],
        container: Container | None,
        environ: Mapping[str, str],
        device: str = "cpu",
    ) -> None:
        for variable in ("SLURM_JOB_ID", "SLURM_JOB_CPUS_PER_NODE"):
            if variable not in environ:
                raise InputError(
                    f"--launcher: slurm: no allocation here ({variable} is not set); "
                    "start it by `sbatch slurm/scale.sh STUDY.yaml` or `scalestudy submit STUDY.yaml`"
                )
        self._programs = programs
        self._usual_program = container or sys.executable
        self._environ = environ
        self._job_id = environ["SLURM_JOB_ID"]
        self._job = slurm_ask.job(self._job_id)
        self._gpus = gpus_of_job(self._job_id, device)
        self._lost: set[str] = set()
        self._names: list[str] = []
        self._threads_per_core = 1
        self._addresses: dict[str, str] = {}

    @property
    def _alone(self) -> bool:
        # squeue's word for nodes that no other job may use.
        return self._job.shared == "NO"

    def capacity(self) -> Topology:
        nodes = len(self._usable())
        cpus = slurm_ask.fewest_cpus(self._environ)
        gpus, limit = gpus_of_trial(self._gpus, self._environ.get("CUDA_VISIBLE_DEVICES", ""))
        return Topology(
            nodes=nodes,
            cpus_per_node=cpus,
            # On a shared node a job is given hardware threads.
            cores_per_node=max(1, cpus // self._threads_per_core) if self._alone else None,
            gpus_per_node=gpus,
            gpu_limit=limit,
        )

    def scheduler(self) -> dict[str, str]:
        job = self._job
        return {
            "Slurm job": job.id,
            "partition": job.partition,
            "nodes": job.nodes,
            # squeue's words: NO means that nobody else was on the nodes.
            "nodes shared with other jobs": {"NO": "no", "OK": "possibly"}.get(job.shared, job.shared.lower()),
        }

    def run(self, trial: Trial, folder: Path, deadline_s: float, tick: Callable[[], None]) -> Exit:
        names = self._usable()[: trial.nodes]
        if len(names) < trial.nodes:
            raise SlurmError(f"{trial.nodes} nodes are needed, {len(names)} of job {self._job_id} are left")
        count = processes(trial)
        try:
            addresses = rank_addresses(
                [self._addresses[name] for name in names], self._free_ports(names, count), count, _per_node(trial)
            )
        except SlurmError as error:
            return self._not_started(names, error)
        folder = folder.resolve()
        program = self._programs.get(trial.trainer, self._usual_program)
        gpus, _ = gpus_of_trial(self._gpus, self._environ.get("CUDA_VISIBLE_DEVICES", ""))
        step_argv = step_options(self._job_id, names, count, trial, folder, alone=self._alone, gpus=gpus)
        argv = [*step_argv, *worker_command(program, trial, folder)]
        ranks_end, our_end = os.pipe()
        with (folder / LOG_NAME).open("wb") as log:
            step = subprocess.Popen(
                argv,
                env=step_environment(self._environ, trial, count, addresses),
                stdin=ranks_end,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            timed_out, _ = wait_for([step], deadline_s, tick)
            if timed_out:
                self._signal_step(trial.id, STACKS_SIGNAL)
                time.sleep(STACKS_WAIT_S)
        finally:
            self._end(step, trial.id)
            os.close(our_end)
            os.close(ranks_end)
        said = (folder / LOG_NAME).read_text(encoding="utf-8", errors="replace")
        failures = failed_tasks(said)
        if (
            step.returncode
            and not timed_out
            and (slurm_ask.preempted(self._job_id) or not slurm_ask.running(self._job_id))
        ):
            # Slurm ended the step, which says nothing of the trial: the run stops here, as on a signal.
            raise KeyboardInterrupt
        if step.returncode and (lost := self._lost_among(names)):
            return Exit((), False, None, lost)
        if step.returncode and not failures and not timed_out:
            raise SlurmError(" ".join(said.split()) or f"srun ended with exit code {step.returncode}")
        codes = dict(failures)
        first = failures[0][0] if failures and not timed_out else None
        return Exit(tuple(codes.get(rank, 0) for rank in range(count)), timed_out, first)

    def resume(self, *, advanced: bool) -> str:
        again = "submit it again to go on"
        if not advanced:
            return f"job {self._job_id} finished no trial and would go round for ever: give it more --time and {again}"
        try:
            if not slurm_ask.running(self._job_id):
                return f"job {self._job_id} was ended from outside; unless Slurm requeues it, {again}"
            slurm_ask.ask(["scontrol", "requeue", self._job_id])
        except SlurmError as error:
            return f"job {self._job_id} could not be requeued ({error}); {again}"
        return f"job {self._job_id} is requeued and goes on by itself"

    def _usable(self) -> list[str]:
        """Return the allocation's nodes that steps can be started on, in Slurm's order."""
        try:
            found = slurm_ask.nodes(names=slurm_ask.job(self._job_id).nodes)
        except SlurmError:
            # While Slurm's controller is away the last answer stands.
            if not self._addresses:
                raise
        else:
            self._names = [node.name for node in found if node.up]
            self._addresses |= {node.name: node.address for node in found}
            self._threads_per_core = max((node.cpus // node.cores for node in found), default=1)
        return [name for name in self._names if name not in self._lost]

    def _free_ports(self, names: Sequence[str], count: int) -> list[list[int]]:
        """Return so many ports for every node that were free there just now."""
        said = self._on_every(names, [sys.executable, "-m", "scalestudy.cluster.ports", str(count)])
        return slurm_ask.numbers_by_task(said, len(names))

    def _lost_among(self, names: Sequence[str]) -> tuple[str, ...]:
        """Return the nodes that Slurm has given up, or on which nothing can be started, and use them no more."""
        usable = self._usable()
        lost = [name for name in names if name not in usable]
        if not lost and not self._answers(names):
            # Slurm takes minutes to notice; srun knows at once.
            with ThreadPoolExecutor(max_workers=16) as pool:
                answers = pool.map(self._answers, [[name] for name in names])
                lost = [name for name, answered in zip(names, answers, strict=True) if not answered]
        self._lost |= set(lost)
        return tuple(lost)

    def _not_started(self, names: Sequence[str], error: SlurmError) -> Exit:
        if lost := self._lost_among(names):
            return Exit((), False, None, lost)
        raise error

    def _answers(self, names: Sequence[str]) -> bool:
        with suppress(SlurmError):
            self._on_every(names, ["true"])
            return True
        return False

    def _on_every(self, names: Sequence[str], command: Sequence[str]) -> str:
        """Run a command once on every node, beside whatever runs there; raises SlurmError."""
        options = [f"--jobid={self._job_id}", f"--nodes={len(names)}", f"--ntasks={len(names)}"]
        placed = [f"--nodelist={','.join(names)}", "--distribution=block", "--overlap", "--gres=none", "--mem=0"]
        argv = ["srun", *options, *placed, "--mpi=none", "--label", *command]
        return slurm_ask.ask(argv, environ=slurm_ask.without_options(self._environ))

    def _end(self, step: subprocess.Popen[bytes], name: str) -> None:
        """End a step whose srun still runs, and make sure that it is gone."""
        if step.poll() is not None:
            return
        step.terminate()
        with suppress(subprocess.TimeoutExpired):
            step.wait(_STOP_S)
        kill_group(step)
        self._signal_step(name, signal.SIGKILL)

    def _signal_step(self, name: str, number: signal.Signals) -> None:
        """Send a signal to all that runs in a step, if Slurm still knows it."""
        with suppress(SlurmError):
            listed = ["squeue", "--noheader", "--steps", f"--jobs={self._job_id}", "--format=%i|%j"]
            for step_id, _, step_name in (line.partition("|") for line in slurm_ask.ask(listed).splitlines()):
                if step_name == name:
                    slurm_ask.ask(["scancel", f"--signal={number.name.removeprefix('SIG')}", step_id])


def gpus_of_job(job_id: str, device: str) -> int:
    """Return how many GPUs a job has on each node.

    Raises InputError where it lacks GPUs that its nodes have, unless the study's `device` is `cpu`.
    """
    given = slurm_ask.given_gpus(job_id)
    there = [node.gpus for node in slurm_ask.nodes(names=slurm_ask.job(job_id).nodes) if node.gpus]
    if not given and there and device != "cpu":
        raise InputError(
            f"device: {device!r}: job {job_id} was not given GPUs on every node; "
            f"ask for them with sbatch --gpus-per-node={min(there)} --ntasks-per-node={min(there)}, a task for each "
            "rank's CPUs, or use 'cpu'"
        )
    return given


def gpus_of_trial(given: int, visible: str) -> tuple[int, str | None]:
    """Return how many of the GPUs that a job has on a node a trial can use, and why no more if that is not all.

    `visible` is CUDA_VISIBLE_DEVICES in the job.
    """
    # Slurm counts MIG instances as GPUs.
    return (1, MIG_LIMIT) if given > 1 and visible.startswith("MIG-") else (given, None)


def step_options(
    job_id: str, names: Sequence[str], count: int, trial: Trial, folder: Path, *, alone: bool, gpus: int = 0
) -> list[str]:
    """Return the srun of a trial's step without the program: its nodes, its tasks and what each is bound to.

    `alone` is whether no other job may use the nodes, `gpus` how many of each node's a trial can use.
    """
    devices = trial.world_size // count
    needed = min(trial.world_size, trial.devices_per_node)
    # Of all the job has on a node a trial takes others in every repeat. On shared nodes Slurm chooses CPUs near those
    # GPUs that it gives to the step.
    shown = max(needed, gpus) if alone and trial.rotate_devices else needed
    if alone:
        # The step has all CPUs of its nodes, of which every rank takes its own (cluster/processors.py): Slurm would
        # choose others at another world size. --cpus-per-task would imply --exact, and leave only so many to choose of.
        # Slurm 22.05 never frees the CPUs of a step that a failed node took with it: the next must not wait for them.
        cpus = ["--cpu-bind=none", "--overlap"]
    else:
        # Which CPUs are ours only Slurm knows.
        cpus = [f"--cpus-per-task={trial.threads_per_device * devices}", "--cpu-bind=cores"]
    return [
        "srun",
        f"--jobid={job_id}",
        f"--job-name={trial.id}",
        f"--nodes={len(names)}",
        f"--nodelist={','.join(names)}",
        f"--ntasks={count}",
        # Rank by rank onto the first node until it is full, and so on: also where the last one takes fewer.
        f"--distribution=plane={_per_node(trial)}",
        *cpus,
        # Every task sees all of them and takes its own: with --gpus-per-task they would be shut off from each other,
        # and NCCL could not use NVLink. No --gpu-bind=none: in Slurm 22.05 it hides them from the tasks.
        f"--gres=gpu:{shown}" if trial.device == "gpu" else "--gres=none",
        # All that the job has.
        "--mem=0",
        "--mpi=none",
        "--kill-on-bad-exit=1",
        # The controller watches the deadline to the second; this is for the case that it is gone.
        f"--time={math.ceil(trial.measurement.deadline_s / 60) + 2}",
        f"--output={slurm_ask.log_pattern(folder, 'rank-%t.log')}",
    ]


def step_environment(
    inherited: Mapping[str, str], trial: Trial, count: int, addresses: Sequence[str]
) -> dict[str, str]:
    """Return the environment of a trial's step: how many threads a rank may use, and where all of them are."""
    return {
        **slurm_ask.without_options(inherited),
        **worker_variables(inherited, trial, count),
        ADDRESSES: ",".join(addresses),
    }


def rank_addresses(hosts: Sequence[str], free_ports: Sequence[Sequence[int]], count: int, per_node: int) -> list[str]:
    """Return host:port for every rank; no port twice, since several nodes may be one host."""
    taken: set[int] = set()
    addresses = []
    for rank in range(count):
        node = rank // per_node
        port = next(port for port in free_ports[node] if port not in taken)
        taken.add(port)
        addresses.append(joined(hosts[node], port))
    return addresses


def failed_tasks(said: str) -> list[tuple[int, int]]:
    """Return rank and exit code, negative for a signal, of the tasks that failed, in the order srun told of them."""
    found: dict[int, int] = {}
    for ranks, how in _FAILED_TASKS.findall(said):
        exited = re.fullmatch(r"Exited with exit code (\d+)", how)
        code = int(exited[1]) if exited else -_SIGNALS.get(how, signal.SIGKILL if how == _OUT_OF_MEMORY else 0) or 1
        for part in ranks.split(","):
            first, _, last = part.partition("-")
            for rank in range(int(first), int(last or first) + 1):
                found.setdefault(rank, code)
    return list(found.items())


def _per_node(trial: Trial) -> int:
    """Return how many processes a full node runs."""
    return min(processes(trial), trial.devices_per_node)
