"""Slurm's own commands: asked in one place, their answers taken apart by pure functions."""

import re
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from scalestudy.cluster.slurm_step import tasks_per_node
from scalestudy.launch.errors import InputError

# A controller that is busy or restarting answers late; Slurm's own clients try for as long.
_PATIENCE_S = 60.0
# How Slurm's commands write that there is nothing to say.
_UNSAID = ("", "(null)", "n/a", "N/A", "(None assigned)")
_QUOTED = 300
# Set in an allocation, they would change what a command asked for there means (srun(1), INPUT ENVIRONMENT VARIABLES);
# SLURM_CONF alone says which cluster is meant. SBATCH_* are a user's own defaults.
_OPTIONS = re.compile(r"(SLURM|SRUN|SLURMD)_(?!CONF$)")


class SlurmError(OSError):
    """A command of Slurm's failed, with Slurm's own words."""


class Node(NamedTuple):
    """A node as sinfo sees it; its address is how other nodes reach it, which its name need not be.

    `cpus` are what Slurm hands out: hardware threads, unless the cluster counts cores.
    """

    name: str
    address: str
    state: str
    cpus: int
    gpus: int
    cores: int

    @property
    def up(self) -> bool:
        """Whether steps can be started there; `*` stands behind the state of a node that does not respond."""
        return not (self.state.endswith("*") or re.match("down|drained|fail|error|power|unknown|future", self.state))


class Job(NamedTuple):
    """A job or an array's task as squeue sees it; `nodes` is the node list in Slurm's short form."""

    id: str
    state: str
    reason: str
    nodes: str
    partition: str
    shared: str
    elapsed: str


def ask(argv: Sequence[str], *, text: str = "", environ: Mapping[str, str] | None = None) -> str:
    """Run one of Slurm's commands and return what it prints; raises SlurmError with what it says of its failure."""
    try:
        answer = subprocess.run(
            argv,
            capture_output=True,
            input=text,
            # Whatever the locale; a name in another encoding is no reason to fail.
            encoding="utf-8",
            errors="backslashreplace",
            env=environ,
            timeout=_PATIENCE_S,
        )
    except FileNotFoundError:
        raise SlurmError(f"{argv[0]} is not on PATH: this is no host of a Slurm cluster") from None
    except subprocess.TimeoutExpired:
        raise SlurmError(f"{argv[0]} did not answer within {_PATIENCE_S:g} s") from None
    if answer.returncode:
        said = " ".join(answer.stderr.split()) or " ".join(answer.stdout.split())
        raise SlurmError(said or f"{' '.join(argv)} ended with exit code {answer.returncode}")
    return answer.stdout


def log_pattern(folder: Path, name: str) -> str:
    """Return the --output of a job or step for a file `name`, a pattern of Slurm's, in a folder that is none.

    Raises InputError for a folder that no pattern can lie in.
    """
    if "\\" in str(folder):
        raise InputError(
            f"{folder}: --out: holds a backslash, behind which Slurm fills in no names; name another folder"
        )
    return f"{str(folder).replace('%', '%%')}/{name}"


def running(job_id: str) -> bool:
    """Return whether a job runs, and is not being cancelled, requeued or ended at its time limit."""
    # RESIZING: it has just lost a node.
    return re.search("JobState=(RUNNING|RESIZING)", _shown(job_id)) is not None


def preempted(job_id: str) -> bool:
    """Return whether a job that runs has been told to make room for another."""
    return re.search("PreemptTime=(?!None)", _shown(job_id)) is not None


def without_options(environ: Mapping[str, str]) -> dict[str, str]:
    """Return an environment in which nothing that Slurm set in an allocation changes what is asked for."""
    return {name: value for name, value in environ.items() if not _OPTIONS.match(name)}


def nodes(*, names: str | None = None, partition: str | None = None) -> list[Node]:
    """Return nodes in Slurm's order, those of a node list or of a partition (None: all); raises SlurmError for none."""
    # Slurm 22.05 takes only one of the two; a partition that is named is shown though it be hidden.
    which = "--all" if partition is None else f"--partition={partition}"
    argv = ["sinfo", which, "--noheader", "--Node", f"--format={_NODE_FORMAT}"]
    if names is not None:
        argv.append(f"--nodes={names}")
    if names in _UNSAID:
        # sinfo would take it for all nodes.
        raise SlurmError("the job has no nodes")
    # A node stands there once for every partition it is in.
    found = {node.name: node for node in map(parsed_node, _rows(ask(argv)))}
    if not found:
        where = f"of {names}" if names is not None else f"in partition {partition!r}" if partition else "at all"
        raise SlurmError(f"sinfo shows no node {where}")
    return list(found.values())


def jobs() -> list[Job]:
    """Return this user's jobs, those that ended a short while ago included."""
    return [parsed_job(line) for line in _rows(ask([*_SQUEUE, "--me", "--states=all"]))]


def job(job_id: str) -> Job:
    """Return one job; raises SlurmError where Slurm does not know it."""
    found = [parsed_job(line) for line in _rows(ask([*_SQUEUE, f"--jobs={job_id}"]))]
    if not found:
        raise SlurmError(f"squeue shows no job {job_id}: it has ended, or is another user's")
    return found[0]


def default_partition() -> str | None:
    """Return the partition that a job goes to which names none."""
    for name in ask(["sinfo", "--all", "--noheader", "--format=%P"]).split():
        if name.endswith("*"):
            return name.removesuffix("*")
    return None


def parsed_node(line: str) -> Node:
    """Take a line of sinfo apart; raises SlurmError where it is none."""
    fields = [field.strip() for field in line.split("|")]
    if len(fields) != len(_NODE_FORMAT.split("|")) or not fields[0]:
        raise SlurmError(f"sinfo said {line!r}, where {_NODE_FORMAT} was asked for")
    name, address, state, cpus, gres, sockets, cores_per_socket = fields
    count = _cpus(cpus, line)
    # A cluster that hands out cores has no more CPUs than these. Where nothing is said of cores, a CPU is one.
    told = sockets.isdecimal() and cores_per_socket.isdecimal()
    cores = min(count, int(sockets) * int(cores_per_socket)) if told else count
    return Node(name, name if address in _UNSAID else address, state, count, gpu_count(gres), cores)


def parsed_job(line: str) -> Job:
    """Take a line of squeue apart; raises SlurmError where it is none."""
    fields = [field.strip() for field in line.split("|")]
    if len(fields) < len(Job._fields) or not (fields[0] and fields[1]):
        raise SlurmError(f"squeue said {line!r}, where {_JOB_FORMAT} was asked for")
    # The reason is a sentence of Slurm's, and may hold anything.
    number, state, *reason, nodes, partition, shared, elapsed = fields
    told = ("" if field in _UNSAID else field for field in (nodes, partition, shared, elapsed))
    return Job(number, state, "|".join(reason), *told)


def job_number(said: str) -> str:
    """Return the number of a job from what `sbatch --parsable` prints; raises SlurmError where there is none."""
    # With several clusters the cluster's name stands behind it; a submit plug-in may print before it.
    numbers = re.findall(r"^(\d+)(?:;\S*)?$", said, re.MULTILINE)
    if not numbers:
        raise SlurmError(f"sbatch said {said!r}, where a job's number was expected")
    return str(numbers[-1])


def numbers_by_task(said: str, tasks: int) -> list[list[int]]:
    """Return the numbers that each task printed under `srun --label`; raises SlurmError where one printed none."""
    lines = re.findall(r"^ *(\d+): ([\d ]*\d) *$", said, re.MULTILINE)
    by_task = {int(task): [int(number) for number in numbers.split()] for task, numbers in lines}
    missing = [task for task in range(tasks) if task not in by_task]
    if missing:
        raise SlurmError(f"srun said {said[:_QUOTED]!r}, and no numbers of task {missing[0]}")
    return [by_task[task] for task in range(tasks)]


def fewest_cpus(environ: Mapping[str, str]) -> int:
    """Return the fewest CPUs that a job has on any of its nodes; raises SlurmError where they are not told."""
    text = environ.get("SLURM_JOB_CPUS_PER_NODE", "")
    try:
        return min(tasks_per_node(text))
    except ValueError:
        raise SlurmError(f"SLURM_JOB_CPUS_PER_NODE={text!r} is no list of counts such as 8(x3),4") from None


def gpu_count(gres: str) -> int:
    """Return the GPUs in Slurm's list of generic resources, such as `gpu:a100:4(S:0-1),nvme:1` or `(null)`."""
    # The names and counts alone: what stands in parentheses holds commas too.
    parts = re.sub(r"\([^)]*\)", "", gres).split(",")
    counts = [part.split(":") for part in parts if part.split(":")[0] == "gpu"]
    return sum(int(words[-1]) if words[-1].isdigit() else 1 for words in counts)


def given_gpus(job_id: str) -> int:
    """Return the fewest GPUs that a job has on any of its nodes, whether it asked for them by number or not."""
    return parsed_gpus(ask(["scontrol", "show", "--details", "job", job_id]))


def parsed_gpus(shown: str) -> int:
    """Take apart what scontrol tells of a job, a line for every group of nodes that give it the same."""
    given = re.findall(r"^ +Nodes=.* GRES=(\S*)", shown, re.MULTILINE)
    return min(map(gpu_count, given), default=0)


def _rows(said: str) -> list[str]:
    """Return the lines that have fields: warnings and a site's greetings have none."""
    return [line for line in said.splitlines() if "|" in line]


def _cpus(text: str, line: str) -> int:
    # `4+`: at least so many; `6/2/0/8`: allocated, idle, other, all; `1K`: 1024.
    match = re.fullmatch(r"(?:\d+/\d+/\d+/)?(\d+)(K?)\+?", text)
    if match is None:
        raise SlurmError(f"sinfo said {line!r}, and {text!r} is no number of CPUs")
    return int(match[1]) * (1024 if match[2] else 1)


def _shown(job_id: str) -> str:
    argv = ["scontrol", "show", "job", job_id]
    said = ask(argv)
    if "JobState=" not in said:
        raise SlurmError(f"{' '.join(argv)} said {said[:_QUOTED]!r}, and no JobState")
    return said


_NODE_FORMAT = "%N|%o|%T|%c|%G|%X|%Y"
_JOB_FORMAT = "%i|%T|%r|%N|%P|%h|%M"
# --all: of hidden partitions too, where a job of ours may be.
_SQUEUE = ["squeue", "--all", "--noheader", f"--format={_JOB_FORMAT}"]
