"""benchmarks/gpu.py, walked on a CPU: no GPU may be at hand for months, and it must run on the day when one is."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# What a machine that was made for torch need not have. Hidden as if it were not installed, in every process.
HIDDEN = """
import functools
from importlib.machinery import PathFinder

def find_spec(find, name, *more):
    absent = {"pandas", "scipy", "pyarrow", "sklearn", "matplotlib", "seaborn", "ray", "tensorflow", "jinja2", "typer"}
    return None if name.partition(".")[0] in absent else find(name, *more)

PathFinder.find_spec = functools.partial(find_spec, PathFinder.find_spec)
"""


@pytest.fixture
def bare_machine(tmp_path: Path) -> dict[str, str]:
    """Return an environment in which Python finds torch and little else."""
    folder = tmp_path / "hidden"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(HIDDEN)
    return os.environ | {"PYTHONPATH": os.pathsep.join([str(folder), os.environ.get("PYTHONPATH", "")])}


def dry_run(out: Path, *more: str, environ: dict[str, str] | None = None) -> tuple[int, dict[str, Any]]:
    """Run the script on a CPU; return its exit code and the last run of its file."""
    argv = [sys.executable, str(BENCHMARKS / "gpu.py"), str(out), "--dry-run", *more]
    told = subprocess.run(argv, env=environ, stdout=subprocess.DEVNULL)
    run: dict[str, Any] = json.loads(out.read_text())["runs"][-1]
    return told.returncode, run


def test_every_model_way_and_format_has_its_case(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    from gpu_plan import plan

    for dry in (False, True):
        names = [case.name for case in plan(dry)]
        assert len(names) == len(set(names))
        for model in ("cnn", "resnet18", "resnet50", "resnet152"):
            for execution in ("eager", "graph", "compiled"):
                for precision in ("fp32", "tf32", "bf16", "fp16"):
                    assert f"train {model} {execution} {precision}" in names
        # What a short budget must still give.
        assert names[:4] == [
            "roofline",
            "train resnet50 eager bf16",
            "one rank, NCCL",
            "two ranks on one GPU, gloo",
        ]


@pytest.mark.slow
def test_every_kind_of_case_runs_on_a_bare_machine(bare_machine: dict[str, str], tmp_path: Path) -> None:
    ways = "resnet18 eager bf16|cnn (compiled fp16|graph fp32)"
    code, run = dry_run(tmp_path / "out.json", "--only", f"rank|batch|telemetry|{ways}", environ=bare_machine)
    assert code == 0, run
    found = run["cases"]
    assert set(found) == {
        "roofline",
        "one rank, NCCL",
        "two ranks on one GPU, gloo",
        "batch: auto",
        "train resnet18 eager bf16",
        "train cnn compiled fp16",
    }
    assert {case["outcome"] for case in found.values()} == {"ok"}
    assert set(run["left_out"]) == {"train cnn graph fp32", "telemetry"}
    assert "CUDA graphs" in run["left_out"]["train cnn graph fp32"]
    assert "No module named 'pyarrow'" in run["left_out"]["telemetry"]
    for trained in (case for name, case in found.items() if name.startswith("train")):
        assert trained["rounds"] == 2
        assert trained["images_per_s"].keys() >= {"ours", "bare"}
        assert trained["share_of_matrix_product"] > 0
    assert found["train cnn compiled fp16"]["stand_in"] == "the compiler is off in a dry run"
    both = found["two ranks on one GPU, gloo"]["ranks"]
    assert [rank["software"]["settings"]["communication"] for rank in both] == ["gloo", "gloo"]
    assert all(rank["step_s"]["exchange"] > 0 for rank in both)
    assert [tried["batch"] for tried in found["batch: auto"]["tries"]] == [2]


@pytest.mark.slow
def test_what_is_missing_is_measured_by_the_next_run(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    code, run = dry_run(out, "--only", "telemetry|checks")
    assert code == 0, run
    assert run["left_out"] == {}
    assert run["cases"]["telemetry"]["samples"] > 0
    assert "skipped" in run["cases"]["checks"]["said"][-1]
    code, again = dry_run(out, "--only", "telemetry")
    assert code == 0
    assert again["left_out"] == {"telemetry": f"measured on this card by the run of {run['began_at']}"}


def test_what_there_is_no_time_for_is_listed_with_the_reason(tmp_path: Path) -> None:
    code, run = dry_run(tmp_path / "out.json", "--budget-s", "3")
    assert code == 0
    assert run["cases"] == {}
    assert len(run["left_out"]) > 48
    assert "3 s of 3 s were left" in run["left_out"]["roofline"]


@pytest.mark.slow
def test_a_kill_costs_the_case_that_ran_and_leaves_nobody_behind(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    argv = [sys.executable, str(BENCHMARKS / "gpu.py"), str(out), "--dry-run"]
    with subprocess.Popen(argv, stdout=subprocess.PIPE, env=os.environ | {"SCALESTUDY_TEST": str(tmp_path)}) as started:
        assert started.stdout is not None
        assert b"roofline" in started.stdout.readline()
        # The next case's processes are there by now.
        time.sleep(1.5)
        assert len(of_this_test(tmp_path)) > 1
        started.kill()
    run = json.loads(out.read_text())["runs"][-1]
    assert set(run["cases"]) == {"roofline"}
    assert run["left_out"]["train cnn eager bf16"] == "the run was ended before it came to this case"
    ends_s = time.monotonic() + 10
    while of_this_test(tmp_path) and time.monotonic() < ends_s:
        time.sleep(0.1)
    assert not of_this_test(tmp_path)


def of_this_test(folder: Path) -> list[Path]:
    """Return the processes that have the folder's name in their environment, in /proc."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        try:
            if f"SCALESTUDY_TEST={folder}".encode() in path.read_bytes():
                found.append(path)
        except OSError:
            continue
    return found


def test_a_case_stops_its_rounds_at_its_deadline_and_says_how_many_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu_case
    from gpu_plan import Case

    ends_s = time.monotonic() + 0.35
    turns = []
    for names in gpu_case._turns(Case(kind="train"), ["ours", "bare"], ends_s, round_s=0.1):
        turns.append(names)
        time.sleep(0.1)
    # Not the six that a case has time for otherwise; each goes first in turn.
    assert turns[:2] == [["ours", "bare"], ["bare", "ours"]]
    assert 2 <= len(turns) <= 3
    assert time.monotonic() < ends_s + 0.1


@pytest.mark.parametrize(
    ("script", "outcome", "why"),
    [
        ("print('{}'); print('{\"rounds\": 1}'); raise SystemExit('out of luck')", "failed", "out of luck"),
        ("import time; print('{\"rounds\": 1}', flush=True); time.sleep(60)", "stopped", "did not end within 2 s"),
        ("print('{\"rounds\": 1}'); print('{\"rou', end='')", "ok", None),
    ],
)
def test_what_a_case_told_before_it_failed_is_kept(
    script: str, outcome: str, why: str | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    import gpu
    from gpu_plan import Case

    (tmp_path / "gpu_case.py").write_text(script)
    monkeypatch.setattr(gpu, "HERE", tmp_path)
    found = gpu.in_a_process(Case(kind="train", dry_run=True), 2.0)
    assert (found["outcome"], found.get("why"), found["rounds"]) == (outcome, why, 1)
