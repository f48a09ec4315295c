"""The command line as a user meets it: a process, its output and its exit code."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

SCALESTUDY = str(Path(sys.executable).with_name("scalestudy"))


def scalestudy(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environ = os.environ | variables
    return subprocess.run([SCALESTUDY, *map(str, arguments)], env=environ, capture_output=True, text=True, timeout=120)


@pytest.fixture
def study(tmp_path: Path) -> Path:
    path = tmp_path / "s.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "schema": 1,
                "name": "s",
                "trainers": ["torch-ddp"],
                "models": ["cnn"],
                "batch": 8,
                "world_sizes": [1],
                "repeats": 2,
                "device": "cpu",
            }
        )
    )
    return path


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, runpy; sys.argv = ['scalestudy', '--help']\n"
        "try: runpy.run_module('scalestudy.launch.cli', run_name='x')['main']()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'tensorflow', 'pandas', 'matplotlib', 'numpy', 'scipy', 'pydantic'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_the_commands_of_the_design_are_there() -> None:
    told = scalestudy("--help").stdout
    assert [name for name in ("run", "report", "submit", "status", "fetch", "doctor") if name not in told] == []


def test_a_dry_run_lists_the_trials_and_touches_nothing(study: Path, tmp_path: Path) -> None:
    told = scalestudy("run", study, "--dry-run", "--out", tmp_path / "out")
    assert told.returncode == 0
    assert "cnn · torch-ddp · world size 1 · repeats 1–2 · 8 images a device: 2 trials, about" in told.stdout
    assert "2 trials, 2 to run, about" in told.stdout
    assert not (tmp_path / "out").exists()


def broken(path: Path, field: str) -> None:
    path.write_text(path.read_text() + f"{field}: 1\n")


@pytest.mark.parametrize(
    ("damage", "arguments", "message"),
    [
        (lambda path: broken(path, "trainer"), [], "trainer: no field 'trainer'; did you mean 'trainers'?"),
        (lambda path: path.unlink(), [], "s.yaml: cannot be read: No such file or directory"),
        (
            lambda path: None,
            ["--launcher", "slrum"],
            "--launcher: no launcher 'slrum'; did you mean 'slurm'? known: local, slurm",
        ),
        (lambda path: broken(path, "environments: {torch-ddp: /no/python}\n#"), [], "'/no/python' is no program"),
        (
            lambda path: broken(path, "environments: {torch-ddp: ../.venvs/torch/bin/python}\n#"),
            [],
            "/.venvs/torch/bin/python; `make envs` builds it",
        ),
        (
            lambda path: broken(path, "environments: {torch-ddp: {image: x.sqsh, runtime: pyxis}}\n#"),
            [],
            "environments.torch-ddp.runtime: 'pyxis': is a plugin of Slurm's; with launcher 'local' use 'apptainer'",
        ),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    study: Path, tmp_path: Path, damage: Callable[[Path], None], arguments: list[str], message: str
) -> None:
    damage(study)
    told = scalestudy("run", study, "--out", tmp_path / "out", *arguments)
    assert told.returncode == 2
    assert message in told.stderr
    assert len(told.stderr.splitlines()) == 1


def test_a_foreign_folder_is_refused(study: Path, tmp_path: Path) -> None:
    told = scalestudy("run", study, "--out", tmp_path)
    assert (told.returncode, len(told.stderr.splitlines())) == (2, 1)
    assert "is not empty and holds no study" in told.stderr


def test_a_report_of_nothing_is_refused(tmp_path: Path) -> None:
    told = scalestudy("report", tmp_path)
    assert (told.returncode, len(told.stderr.splitlines())) == (2, 1)
    assert "no records there" in told.stderr


def test_on_a_host_without_slurm_submit_says_so(study: Path, tmp_path: Path) -> None:
    told = subprocess.run(
        [SCALESTUDY, "submit", study, "--out", tmp_path / "out"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
        timeout=120,
    )
    assert told.returncode == 2
    assert told.stderr == "scalestudy: sinfo is not on PATH: this is no host of a Slurm cluster\n"
    assert not (tmp_path / "out").exists()


def test_status_of_a_folder_without_jobs_tells_its_records(study: Path, tmp_path: Path) -> None:
    assert f"records in {tmp_path}: none" in scalestudy("status", tmp_path).stdout


def test_a_part_of_a_study_is_run_alone(study: Path, tmp_path: Path) -> None:
    told = scalestudy("run", study, "--dry-run", "--repeat", "2", "--nodes", "1")
    assert "repeat 2" in told.stdout
    assert "1 trials, 1 to run" in told.stdout
    assert "0 trials, 0 to run" in scalestudy("run", study, "--dry-run", "--nodes", "2").stdout


def test_a_broken_driver_stops_studies_that_may_want_gpus_and_no_others(study: Path, nvml_standin: Path) -> None:
    broken = {"LD_LIBRARY_PATH": str(nvml_standin), "NVML_STANDIN_INIT": "18"}
    assert scalestudy("run", study, "--dry-run", **broken).returncode == 0
    study.write_text(study.read_text().replace("device: cpu", "device: auto"))
    told = scalestudy("run", study, "--dry-run", **broken)
    assert told.returncode == 2
    assert told.stderr.startswith(f"scalestudy: {study}: device: 'auto': NVIDIA's driver does not work here: ")
    assert told.stderr.endswith("or use 'cpu'\n")
    assert told.stderr.count("\n") == 1


def test_the_doctor_names_what_does_not_work(nvml_standin: Path) -> None:
    def gpus(listed: str | None = None, **variables: str) -> dict[str, tuple[bool, str]]:
        code = (
            "import json, sys; from scalestudy.launch.doctor import gpu_findings;"
            f"found = gpu_findings({listed!r});"
            "print(json.dumps([[one.subject, one.ready, f'{one.detail} -> {one.advice}'] for one in found]))"
        )
        environ = {**os.environ, "LD_LIBRARY_PATH": str(nvml_standin), **variables}
        told = subprocess.run([sys.executable, "-c", code], env=environ, check=True, capture_output=True, text=True)
        return {subject: (ready, text) for subject, ready, text in json.loads(told.stdout)}

    found = gpus("0,1", NVML_STANDIN_FAILING="2:4,6:15")
    assert found["GPU"][0]
    assert "6 × Stand-in GPU, driver 575.00-standin; trials can use 2" in found["GPU"][1]
    assert "CUDA_VISIBLE_DEVICES='0,1' shows 2" in found["GPU"][1]
    assert found["gpu2"][1].startswith("Insufficient Permissions -> ask for it")
    assert found["gpu6"] == (False, "GPU is lost -> reset it (`nvidia-smi --gpu-reset`) or reboot")
    # Also where no GPU is asked for.
    for listed in (None, ""):
        ready, said = gpus(listed, NVML_STANDIN_INIT="18")["GPU"]
        assert not ready
        assert "mismatch; the driver was updated while it ran: reboot" in said


def test_a_failed_trial_never_stops_the_study_and_is_exit_code_1(study: Path, tmp_path: Path) -> None:
    interpreter = tmp_path / "python"
    interpreter.write_text("#!/bin/sh\necho 'no framework here'; exit 3\n")
    interpreter.chmod(0o755)
    study.write_text(study.read_text() + f"environments: {{torch-ddp: {interpreter}}}\n")
    told = scalestudy("run", study, "--out", tmp_path / "out")
    assert told.returncode == 1
    assert told.stdout.count("failed: rank 0 ended with exit code 3; rank-0.log ends: no framework here") == 2
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("trials/*/record.json")]
    assert [record["outcome"] for record in records] == ["failed", "failed"]
    again = scalestudy("run", study, "--out", tmp_path / "out")
    assert "2 trials, 2 done before, 0 to run" in again.stdout
    assert again.returncode == 1


def test_two_studies_in_turns_leave_a_folder_each_and_are_compared(study: Path, tmp_path: Path) -> None:
    study.write_text(study.read_text() + "environments: {torch-ddp: /bin/false}\n")
    told = scalestudy("compare", "--again", study, study, "--out", tmp_path / "out")
    assert told.returncode == 3
    assert told.stdout.startswith(f"# {tmp_path}/out/new against {tmp_path}/out/base")
    assert "no point in common that both measured" in told.stdout
    for side in ("base", "new"):
        assert len(list((tmp_path / "out" / side).glob("trials/*/record.json"))) == 2
    assert "[4/4] cnn · torch-ddp" in told.stderr
    # Twice shows what was measured the first time, and says so.
    again = scalestudy("compare", "--again", study, study, "--out", tmp_path / "out")
    assert again.stdout == told.stdout, again.stderr
    assert "4 trials, 0 to run" in again.stderr
    assert "all was measured before, the last of it at 2" in again.stderr
    other = tmp_path / "other.yaml"
    other.write_text(study.read_text().replace("repeats: 2", "repeats: 1"))
    refused = scalestudy("compare", "--again", study, other, "--out", tmp_path / "out")
    assert refused.returncode == 2
    assert f"{other}: repeats: 1, but {study} has 2; --again needs the same number for both" in refused.stderr
    for changed, said in (
        ("seed: 5", "holds 2 records of trials that"),
        ("environments: {torch-ddp: /bin/true}", "holds records of other environments than those of"),
    ):
        lines = study.read_text().splitlines()
        kept = [line for line in lines if line.partition(":")[0] != changed.partition(":")[0]]
        other.write_text("\n".join([*kept, changed]))
        refused = scalestudy("compare", "--again", study, other, "--out", tmp_path / "out")
        assert refused.returncode == 2
        assert f"out/new: --out: {said} {other}" in refused.stderr
    plain = scalestudy("compare", tmp_path / "out/base", tmp_path / "out/new", "--out", tmp_path / "out")
    assert (plain.returncode, "--out: is for --again alone" in plain.stderr) == (2, True)


@pytest.mark.parametrize(
    ("field", "message"),
    [
        ("launcher: slurm", "launcher: --again runs on this host alone, not by 'slurm'"),
        ("repeats: {min: 6, max: 9, until: 2%}", "repeats: --again needs a number, the same for both"),
    ],
)
def test_what_cannot_be_run_in_turns_is_refused(study: Path, tmp_path: Path, field: str, message: str) -> None:
    other = tmp_path / "other.yaml"
    other.write_text(study.read_text().replace("repeats: 2\n", "") + f"{field}\n")
    told = scalestudy("compare", "--again", study, other, "--out", tmp_path / "out")
    assert (told.returncode, told.stderr) == (2, f"scalestudy: {other}: {message}\n")
    assert not (tmp_path / "out").exists()


# Put where the interpreter looks when it starts: a shared folder whose file system flushes no folders.
_NO_FLUSH = """
import errno, os, stat
flush = os.fsync
def refusing(descriptor):
    if stat.S_ISDIR(os.fstat(descriptor).st_mode):
        raise OSError(errno.EINVAL, "Invalid argument")
    flush(descriptor)
os.fsync = refusing
"""


def test_a_shared_folder_that_does_not_flush_is_noted_once_a_run(
    study: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "sitecustomize.py").write_text(_NO_FLUSH)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    study.write_text(study.read_text() + "environments: {torch-ddp: /bin/false}\n")
    for _ in range(2):
        told = scalestudy("run", study, "--out", tmp_path / "out")
        assert told.returncode == 1
        assert told.stdout.count("does not flush to the disk (Invalid argument)") == 1
    assert len(list((tmp_path / "out").glob("trials/*/record.json"))) == 2
