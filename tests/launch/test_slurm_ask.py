"""What Slurm's commands may answer: programs of that name print it, and ours take it apart or quote it."""

import os
import shlex
from collections.abc import Callable
from pathlib import Path

import pytest

from scalestudy.launch import slurm_ask, slurm_jobs
from scalestudy.launch.slurm_ask import Job, Node, SlurmError

Says = Callable[..., Path]


@pytest.fixture
def says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Says:
    """Return a maker of commands that print an answer; what each is asked stands in the file that it returns."""
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)

    def make(command: str, answer: str) -> Path:
        asked = tmp_path / f"{command}.asked"
        script = f"#!/bin/sh\nprintf '%s\\n' \"$*\" >> {shlex.quote(str(asked))}\nprintf %s {shlex.quote(answer)}\n"
        (tmp_path / command).write_text(script)
        (tmp_path / command).chmod(0o755)
        return asked

    return make


def test_a_job_is_asked_for_in_hidden_partitions_too(says: Says) -> None:
    asked = says("squeue", "12|RUNNING|None|node[1-2]|debug|NO|1:02\n")
    assert slurm_ask.job("12") == Job("12", "RUNNING", "None", "node[1-2]", "debug", "NO", "1:02")
    assert slurm_ask.jobs()[0].id == "12"
    assert [line.split()[0] for line in asked.read_text().splitlines()] == ["--all", "--all"]


@pytest.mark.parametrize("answer", ["", "\n", "slurm_load_jobs warning: cache is old\n"])
def test_a_job_that_squeue_does_not_show_is_said(says: Says, answer: str) -> None:
    says("squeue", answer)
    with pytest.raises(SlurmError, match="squeue shows no job 12: it has ended, or is another user's"):
        slurm_ask.job("12")


def test_no_job_is_no_error(says: Says) -> None:
    says("squeue", "")
    assert slurm_ask.jobs() == []


def test_a_reason_may_hold_what_parts_the_fields(says: Says) -> None:
    says("squeue", "warning: old\n12_3|PENDING|(Nodes|down)||debug|OK|0:00\n13|PENDING|(null)|(null)|debug|n/a|n/a\n")
    first, second = slurm_ask.jobs()
    assert (first.id, first.state, first.reason, first.nodes) == ("12_3", "PENDING", "(Nodes|down)", "")
    assert (second.nodes, second.elapsed) == ("", "")


@pytest.mark.parametrize("line", ["12|RUNNING", "12|RUNNING|None|a|b|c", "|||||||"])
def test_a_line_of_squeue_that_is_none_is_quoted(says: Says, line: str) -> None:
    says("squeue", f"{line}\n")
    with pytest.raises(SlurmError) as caught:
        slurm_ask.jobs()
    assert str(caught.value) == f"squeue said {line!r}, where %i|%T|%r|%N|%P|%h|%M was asked for"


@pytest.mark.parametrize(
    ("fields", "node"),
    [
        ("a|10.0.0.1|idle|8|gpu:2|2|2", Node("a", "10.0.0.1", "idle", 8, 2, cores=4)),
        ("a|a|idle|4+|(null)|1+|2+", Node("a", "a", "idle", 4, 0, cores=4)),
        # Allocated, idle, other and all.
        ("a|a|mixed|6/2/0/8|n/a|2|8", Node("a", "a", "mixed", 8, 0, cores=8)),
        ("a|(null)|idle|8|N/A||", Node("a", "a", "idle", 8, 0, cores=8)),
        ("a||down*|8||n/a|n/a", Node("a", "a", "down*", 8, 0, cores=8)),
        ("a|n/a|idle|1K|gpu:a100:4(S:0-1)|2|256", Node("a", "a", "idle", 1024, 4, cores=512)),
        (" a | a | idle | 8 | gpu | 1 | 8 ", Node("a", "a", "idle", 8, 1, cores=8)),
    ],
)
def test_a_node_is_read_in_every_way_that_sinfo_writes_it(says: Says, fields: str, node: Node) -> None:
    asked = says("sinfo", f"sinfo: warning: something\n\n{fields}\n")
    assert slurm_ask.nodes() == slurm_ask.nodes(partition="hidden") == [node]
    # Slurm 22.05 refuses both together.
    assert [line.split()[0] for line in asked.read_text().splitlines()] == ["--all", "--partition=hidden"]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("a|a|idle|8|gpu:1|gpu:2|1|8", "where %N|%o|%T|%c|%G|%X|%Y was asked for"),
        ("a|a|idle", "where %N|%o|%T|%c|%G|%X|%Y was asked for"),
        ("|a|idle|8|gpu|1|8", "where %N|%o|%T|%c|%G|%X|%Y was asked for"),
        ("a|a|idle|n/a|gpu:1|1|8", "and 'n/a' is no number of CPUs"),
        ("a|a|idle|(null)|gpu:1|1|8", "and '(null)' is no number of CPUs"),
        ("a|a|idle||gpu:1|1|8", "and '' is no number of CPUs"),
        ("a|a|idle|-4|gpu:1|1|8", "and '-4' is no number of CPUs"),
    ],
)
def test_a_line_of_sinfo_that_is_none_is_quoted(says: Says, line: str, why: str) -> None:
    says("sinfo", f"{line}\n")
    with pytest.raises(SlurmError) as caught:
        slurm_ask.nodes()
    assert str(caught.value) == f"sinfo said {line!r}, {why}"


@pytest.mark.parametrize(
    ("asked", "where"), [({"partition": "p"}, "in partition 'p'"), ({"names": "n[1-2]"}, "of n[1-2]"), ({}, "at all")]
)
def test_no_node_is_an_error_that_says_where(says: Says, asked: dict[str, str], where: str) -> None:
    says("sinfo", "")
    with pytest.raises(SlurmError) as caught:
        slurm_ask.nodes(**asked)
    assert str(caught.value) == f"sinfo shows no node {where}"


@pytest.mark.parametrize("names", ["", "(null)", "n/a"])
def test_a_job_without_nodes_has_none(says: Says, names: str) -> None:
    # sinfo would take an empty list for all nodes.
    says("sinfo", "a|a|idle|8|gpu:1\n")
    with pytest.raises(SlurmError, match="the job has no nodes"):
        slurm_ask.nodes(names=names)


@pytest.mark.parametrize(("shown", "runs"), [("JobState=RUNNING x", True), ("  JobState=COMPLETING", False)])
def test_whether_a_job_runs(says: Says, shown: str, runs: bool) -> None:
    says("scontrol", shown)
    assert slurm_ask.running("12") is runs


@pytest.mark.parametrize("shown", ["", "Welcome to the cluster\n"])
def test_a_state_that_is_not_told_is_an_error(says: Says, shown: str) -> None:
    says("scontrol", shown)
    with pytest.raises(SlurmError, match="scontrol show job 12 said '.*', and no JobState"):
        slurm_ask.running("12")


@pytest.mark.parametrize(
    ("said", "number"),
    [("17\n", "17"), ("17;cluster2\n", "17"), ("sbatch: lua: your project was charged\n17\n", "17")],
)
def test_a_submitted_job_has_its_number(said: str, number: str) -> None:
    assert slurm_ask.job_number(said) == number


@pytest.mark.parametrize("said", ["", "Submitted batch job\n", "17 18\n"])
def test_a_submitted_job_without_a_number_is_an_error(said: str) -> None:
    with pytest.raises(SlurmError, match="sbatch said '.*', where a job's number was expected"):
        slurm_ask.job_number(said)


@pytest.mark.parametrize(
    ("said", "labels"),
    [
        ("0: 5 6\n1: 7 8\n", [[5, 6], [7, 8]]),
        ("01: 7 8\n00: 5 6\n", [[5, 6], [7, 8]]),
        # A prolog that prints, and a warning that has no label.
        ("srun: warning: can't honor\n 0: hello from the prolog\n 0: 5 6\n 1: 7 8\n", [[5, 6], [7, 8]]),
    ],
)
def test_what_every_task_printed_is_told_apart(said: str, labels: list[list[int]]) -> None:
    assert slurm_ask.numbers_by_task(said, 2) == labels


@pytest.mark.parametrize("said", ["", "0: 5 6\n", "0: 5 6\n1: no ports\n"])
def test_a_task_that_printed_no_numbers_is_an_error(said: str) -> None:
    with pytest.raises(SlurmError, match="srun said '.*', and no numbers of task"):
        slurm_ask.numbers_by_task(said, 2)


@pytest.mark.parametrize(("text", "cpus"), [("8", 8), ("8(x2),4", 4)])
def test_the_fewest_cpus_of_a_jobs_nodes(text: str, cpus: int) -> None:
    assert slurm_ask.fewest_cpus({"SLURM_JOB_CPUS_PER_NODE": text}) == cpus


@pytest.mark.parametrize("text", ["", "n/a", "(null)", "8(x"])
def test_a_jobs_cpus_that_are_no_counts_are_quoted(text: str) -> None:
    with pytest.raises(SlurmError, match="SLURM_JOB_CPUS_PER_NODE='.*' is no list of counts"):
        slurm_ask.fewest_cpus({"SLURM_JOB_CPUS_PER_NODE": text})


def test_status_shows_a_job_that_squeue_no_longer_does_as_ended(says: Says) -> None:
    says("squeue", "")
    assert slurm_jobs.living() == {}
