"""The same study by every launcher: records that differ in who started the ranks, where and how fast, no more."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from scalestudy.cluster.sample_file import read_samples
from scalestudy.trainers.record import Record

pytestmark = pytest.mark.slow

SCALESTUDY = str(Path(sys.executable).with_name("scalestudy"))
SCALE = Path(__file__).resolve().parents[2] / "slurm" / "scale.sh"
# Timings, losses and how long it took; who and where. Two ranks start from the same parameters and end where their
# number of steps took them, which is a matter of time too.
MEASURED = {
    "started_at",
    "duration_s",
    "pid",
    "phases",
    "phase_starts_s",
    "warm_up_windows",
    "warm_up_steady",
    "windows",
    "cpu_before",
    "cpu_measured",
    "whole_windows",
    "resident_windows",
    "local_windows",
    "losses",
    "test_accuracy",
    "memory",
    "warm_up_memory",
    "parameter_checksums",
    "samples",
    "late",
}
PLACED = {"launcher", "scheduler", "host", "cpus", "placement", "file"}


def left(value: Any) -> Any:
    """Return what is left of a record without what was measured and where."""
    if isinstance(value, dict):
        return {name: left(entry) for name, entry in value.items() if name not in MEASURED | PLACED}
    return [left(entry) for entry in value] if isinstance(value, list) else value


@pytest.mark.horovod
def test_local_slurm_and_ray_leave_the_same_records_but_for_launcher_hosts_and_timings(
    cluster: Any,
    raylets: Any,
    write_study: Callable[..., Path],
    records: Callable[[Path], list[Record]],
    tmp_path: Path,
) -> None:
    study = write_study(
        trainers=["torch-ddp", "tf-multiworker", "horovod-torch", "horovod-tf"],
        models=[{"name": "cnn", "data": "digits"}],
        world_sizes=[1, 2],
        devices_per_node=2,
        threads_per_device=1,
    )
    subprocess.run([SCALESTUDY, "run", study, "--out", tmp_path / "local"], check=True, stdout=subprocess.DEVNULL)
    cluster.sbatch("--nodes=1", f"--output={tmp_path}/%j.log", SCALE, study, "--out", tmp_path / "slurm")
    cluster.drained()
    raylets.tell(SCALESTUDY, "run", study, "--launcher", "ray", "--out", tmp_path / "ray")
    by_launcher = {name: records(tmp_path / name) for name in ("local", "slurm", "ray")}
    for name, found in by_launcher.items():
        assert [record.outcome for record in found] == ["ok"] * 8, name
        assert {record.environment.launcher for record in found} == {name}
        # Ray's come home from wherever the rank ran.
        for record in found:
            [telemetry] = [report.telemetry for report in record.reports if report.telemetry]
            assert telemetry.error is None
            samples = read_samples(tmp_path / name / "trials" / record.trial.folder_name / telemetry.file)
            assert len(samples[samples.device == "host"]) == telemetry.samples > 5
    plain = {
        name: [left(json.loads(record.model_dump_json())) for record in found] for name, found in by_launcher.items()
    }
    for there in ("slurm", "ray"):
        for here, other in zip(plain["local"], plain[there], strict=True):
            assert without_foreign(other, there) == without_foreign(here, "local")
    # Each rank had as many CPUs, whoever started it.
    for same in zip(*by_launcher.values(), strict=True):
        shares = {tuple(len(report.software.cpus) for report in record.reports if report.software) for record in same}
        assert len(shares) == 1


def without_foreign(record: Any, launcher: str) -> Any:
    """Leave out the variables that name addresses, and those that a scheduler sets for every process."""
    for report in record["reports"]:
        variables = report["software"]["variables"]
        for name in ("TF_CONFIG", "CUDA_VISIBLE_DEVICES"):
            variables.pop(name, None)
    return record
