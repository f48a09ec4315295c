"""`scalestudy collectives` for real: every framework's own all-reduce on two ranks, every sum checked."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from scalestudy.trainers.files import COLLECTIVES, read_record, record_paths
from scalestudy.trainers.trainer import TRAINERS

pytestmark = pytest.mark.slow

SCALESTUDY = str(Path(sys.executable).with_name("scalestudy"))


@pytest.mark.horovod
def test_every_trainers_own_all_reduce_is_swept_and_right(write_study: Callable[..., Path], tmp_path: Path) -> None:
    study = write_study(trainers=list(TRAINERS), models="cnn", world_sizes=[1, 2])
    out = tmp_path / "out"
    command: list[str | Path] = [
        SCALESTUDY,
        "collectives",
        study,
        "--out",
        out,
        "--smallest",
        "4KB",
        "--largest",
        "64KB",
    ]
    told = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stdout + told.stderr
    found = [read_record(path.parent) for path in record_paths(out / COLLECTIVES)]
    assert sorted(record.trial.trainer for record in found) == sorted(TRAINERS)
    for record in found:
        assert record.outcome == "ok", record.reason
        for report in record.reports:
            assert [one.size_bytes for one in report.collectives] == [2**12, 2**13, 2**14, 2**15, 2**16]
    table = pd.read_csv(out / "collectives.csv")
    assert len(table) == 5 * len(TRAINERS)
    assert (table.time_s > 0).all()
    assert (out / "figures" / "collectives.svg").exists()
    # A second time there is nothing left to do.
    again = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert "0 to run" in again.stdout
