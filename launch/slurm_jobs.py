"""Jobs for a study: one for each node count, and one for the report after them; what became of them."""

import shlex
import sys
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from scalestudy.cluster.host import NodeOffer, Topology
from scalestudy.launch import slurm_ask
from scalestudy.launch.errors import InputError
from scalestudy.launch.folder import StudyFolder
from scalestudy.launch.jobs import Row, Submitted, note, submitted
from scalestudy.launch.launcher import check_capacity, nodes_needed
from scalestudy.launch.launchers import own_programs
from scalestudy.launch.runner import pending
from scalestudy.launch.slurm_ask import SlurmError
from scalestudy.launch.study import Layout, SlurmOptions, Study, load_study, resolve, study_trials
from scalestudy.launch.yaml_file import read_yaml
from scalestudy.trainers.files import write_atomically
from scalestudy.trainers.trial import Trial

# The controller is told so long before the time limit: it stops the trial under way and requeues the job.
_NOTICE_S = 120
_ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "DEADLINE", "BOOT_FAIL", "OUT_OF_MEMORY"}


class Share(NamedTuple):
    """The trials of one node count that have no record, and their repeats."""

    nodes: int
    trials: tuple[Trial, ...]

    @property
    def repeats(self) -> list[int]:
        """Return the repeats, counted from 1 as people and array tasks do."""
        return sorted({trial.repeat + 1 for trial in self.trials})


class Plan(NamedTuple):
    """What a submission comes to: a study with nothing left to the machine, all its trials, and what is to be run."""

    study: Study
    text: str
    trials: list[Trial]
    shares: list[Share]

    @property
    def devices(self) -> int:
        """Return the devices of the study's fullest node; every job asks for so many, and settles it alike."""
        return max(min(trial.world_size, trial.devices_per_node) for trial in self.trials)


def plan(study: Study, path: Path, folder: StudyFolder, environ: Mapping[str, str]) -> Plan:
    """Settle a study on what the partition's nodes have; raises InputError, and SlurmError with Slurm's words."""
    partition = study.slurm.partition or environ.get("SBATCH_PARTITION")
    if partition is not None:
        try:
            for name in partition.split(","):
                slurm_ask.ask(["scontrol", "show", "partition", name])
        except SlurmError as error:
            raise InputError(f"{path}: slurm.partition: {partition!r}: Slurm says: {error}") from None
    # Those that are down too: they may be back in time.
    nodes = slurm_ask.nodes(partition=partition or slurm_ask.default_partition())
    least = max(study.devices_per_node or (1,))
    # A job that shares its nodes is given hardware threads, and which ones is Slurm's affair.
    offers = [NodeOffer(node.cpus, node.gpus, node.cores if study.slurm.exclusive else None) for node in nodes]
    offered = Topology.of(offers, study.device, least)
    layout = resolve(study, path, offered)
    trials = study_trials(study, path, layout)
    check_capacity(trials, path, "slurm", offered)
    if study.adaptive and study.slurm.jobs_at_once:
        raise InputError(
            f"{path}: slurm.jobs_at_once: makes a job of every repeat, and how many there are is decided on the way; "
            "leave one of the two out"
        )
    missing = pending(trials, folder, study.adaptive)
    shares = [
        Share(nodes, tuple(trial for trial in missing if nodes_needed(trial) == nodes))
        for nodes in sorted(set(map(nodes_needed, missing)))
    ]
    return Plan(study, settled(study, path, layout), trials, shares)


def settled(study: Study, path: Path, layout: Layout) -> str:
    """Return the study file with every value written out that the machine or the folder it lies in would decide."""
    content: dict[str, Any] = read_yaml(path)
    content |= {
        "launcher": "slurm",
        "device": layout.device,
        "devices_per_node": list(layout.devices_per_node),
        "threads_per_device": layout.threads_per_device,
        "loader_workers": layout.loader_workers,
        "hyper_threads": layout.hyper_threads,
        "environments": {
            trainer: own if isinstance(own, str) else own.model_dump(mode="json")
            for trainer, own in own_programs(study, path).items()
        },
        "models": [
            model.model_dump(exclude_none=True, mode="json") | {"data": _absolute(model.data or study.data, path)}
            for model in study.models
        ],
    }
    return f"# {path.resolve()}, settled for Slurm.\n{yaml.safe_dump(content, sort_keys=False, allow_unicode=True)}"


def submit(plan: Plan, folder: StudyFolder, environ: Mapping[str, str]) -> tuple[list[Submitted], list[Submitted]]:
    """Submit a job for every node count that has none, and one for the report; return these, and those still there.

    Raises InputError with Slurm's words where it refuses one; the others are then taken back.
    """
    name = f"study-{sha256(plan.text.encode()).hexdigest()[:8]}.yaml"
    there = living()
    alive = [job for job in submitted(folder, "slurm") if job.nodes and job.id in there]
    if foreign := [job.id for job in alive if job.study != name]:
        raise InputError(
            f"{folder.path}: --out: jobs of another version of this study are there; "
            f"wait for them, or end them: scancel {' '.join(foreign)}"
        )
    shares = [share for share in plan.shares if share.nodes not in {job.nodes for job in alive}]
    if not shares:
        return [], alive
    folder.jobs_path.mkdir(exist_ok=True)
    write_atomically(folder.jobs_path / name, plan.text)
    made: list[Submitted] = []
    try:
        for share in shares:
            argv, script = trials_job(plan.study, folder.path.resolve(), name, share, plan.devices)
            made.append(_sbatch(argv, script, share.nodes, name, environ))
        argv, script = report_job(plan.study, folder.path.resolve(), [job.id for job in [*alive, *made]])
        made.append(_sbatch(argv, script, None, name, environ))
    except SlurmError as error:
        if made:
            slurm_ask.ask(["scancel", *(job.id for job in made)])
        raise InputError(f"sbatch: Slurm says: {error}") from None
    note(made, folder)
    return made, alive


def trials_job(study: Study, out: Path, study_name: str, share: Share, devices: int) -> tuple[list[str], str]:
    """Return the sbatch and the script of the job that runs a share of the trials, with so many devices a node."""
    options = study.slurm
    first = share.trials[0]
    argv = _job_options(options, out, f"scalestudy-{study.name}-n{share.nodes}", options.jobs_at_once is not None) + [
        f"--nodes={share.nodes}",
        f"--ntasks-per-node={devices}",
        f"--cpus-per-task={first.threads_per_device}",
        # Stop in time and go on later; a node that fails costs its trial, not the job.
        f"--signal=B:USR1@{_NOTICE_S}",
        "--requeue",
        "--no-kill",
    ]
    if first.device == "gpu":
        argv.append(f"--gres={options.gres}" if options.gres else f"--gpus-per-node={devices}")
    elif options.gres:
        argv.append(f"--gres={options.gres}")
    if options.exclusive:
        argv += ["--exclusive", "--mem=0"]
    command = ["run", str(out / "jobs" / study_name), "--launcher", "slurm", "--out", str(out), "--nodes"]
    words = shlex.join([sys.executable, "-m", "scalestudy.launch", *command, str(share.nodes)])
    if options.jobs_at_once:
        repeats = ",".join(map(str, share.repeats))
        argv.append(f"--array={repeats}%{options.jobs_at_once}")
        words += ' --repeat "$SLURM_ARRAY_TASK_ID"'
    return argv, _script(options, words)


def report_job(study: Study, out: Path, after: Sequence[str]) -> tuple[list[str], str]:
    """Return the sbatch and the script of the job that writes the report when the others have ended, well or not."""
    argv = _job_options(study.slurm, out, f"scalestudy-{study.name}-report") + [
        "--nodes=1",
        "--ntasks=1",
        f"--dependency=afterany:{':'.join(after)}",
    ]
    return argv, _script(study.slurm, shlex.join([sys.executable, "-m", "scalestudy.launch", "report", str(out)]))


def living() -> dict[str, list[slurm_ask.Job]]:
    """Return this user's jobs that have not ended, by number; an array's tasks stand under the number of the array."""
    found: dict[str, list[slurm_ask.Job]] = {}
    for job in slurm_ask.jobs():
        if job.state not in _ENDED:
            found.setdefault(job.id.partition("_")[0], []).append(job)
    return found


def status(folder: StudyFolder) -> list[Row]:
    """Return a row for every job, or task of an array, and how far its trials are."""
    rows: list[Row] = []
    jobs = submitted(folder, "slurm")
    there = living() if jobs else {}
    # Or why the study of a job cannot be read: that costs its own rows what is done, and no more.
    trials: dict[str, list[Trial] | str] = {}
    for job in jobs:
        if job.nodes is None:
            what, done = "report", "written" if (folder.path / "report.html").exists() else "not yet"
        else:
            if job.study not in trials:
                try:
                    trials[job.study] = settled_trials(folder.jobs_path / job.study)
                except InputError as error:
                    trials[job.study] = str(error).splitlines()[0]
            what = f"{job.nodes} node{'s' if job.nodes > 1 else ''}"
            done = _progress(trials[job.study], job.nodes, folder)
        for task in there.get(job.id) or [slurm_ask.Job(job.id, "ended", "None", "", "", "", "")]:
            # A job that runs has no reason to wait.
            state = task.state.lower() + (f" ({task.reason})" if task.state == "PENDING" else "")
            rows.append(Row(task.id, what, state, task.elapsed, done))
    return rows


def _progress(trials: list[Trial] | str, nodes: int, folder: StudyFolder) -> str:
    if isinstance(trials, str):
        return trials
    own = [trial for trial in trials if nodes_needed(trial) == nodes]
    return f"{len(own) - len(pending(own, folder))} of {len(own)} trials done"


def settled_trials(path: Path) -> list[Trial]:
    """Return the trials of a settled study: the machine has no say in them any more."""
    study = load_study(path)
    if study.devices_per_node is None or study.threads_per_device is None or study.device == "auto":
        raise InputError(f"{path}: is torn: it leaves open which devices of a node to take, and with how many threads")
    layout = Layout(
        device=study.device,
        devices_per_node=study.devices_per_node,
        threads_per_device=study.threads_per_device,
        # It was 1 before it depended on the machine, and was not written out.
        loader_workers=1 if study.loader_workers is None else study.loader_workers,
        # A study that was settled by an earlier version does not say.
        hyper_threads=bool(study.hyper_threads),
    )
    return study_trials(study, path, layout)


def _job_options(options: SlurmOptions, out: Path, name: str, array: bool = False) -> list[str]:
    named = {
        "partition": options.partition,
        "account": options.account,
        "qos": options.qos,
        "constraint": options.constraint,
        "reservation": options.reservation,
        "time": options.time,
    }
    given = [f"--{option}={value}" for option, value in named.items() if value is not None]
    log = slurm_ask.log_pattern(out / "jobs", "%A_%a.log" if array else "%j.log")
    return ["sbatch", "--parsable", f"--job-name={name}", f"--output={log}", "--open-mode=append", *given]


def _script(options: SlurmOptions, command: str) -> str:
    return "\n".join(["#!/bin/bash", "set -e", *options.setup, f"exec {command}", ""])


def _sbatch(argv: Sequence[str], script: str, nodes: int | None, study: str, environ: Mapping[str, str]) -> Submitted:
    said = slurm_ask.ask(argv, text=script, environ=slurm_ask.without_options(environ))
    return Submitted(id=slurm_ask.job_number(said), launcher="slurm", nodes=nodes, study=study)


def _absolute(data: str, path: Path) -> str:
    source, _, folder = data.partition(":")
    return f"{source}:{(path.parent / Path(folder).expanduser()).resolve()}" if folder else data


def described(plan: Plan, out: Path) -> str:
    """Return what would be submitted, as a shell would be told."""
    jobs = [trials_job(plan.study, out, "study.yaml", share, plan.devices) for share in plan.shares]
    jobs += [report_job(plan.study, out, ["JOB"] * len(jobs))] if jobs else []
    return "\n\n".join(f"{shlex.join(argv)} <<'EOF'\n{script}EOF" for argv, script in jobs) or "nothing is missing"
