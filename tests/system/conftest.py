"""What tests of whole studies share: a study that is measured as shortly as can be, and a look at what it left."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from scalestudy.trainers.files import read_record, record_paths
from scalestudy.trainers.record import Record

QUICK = {"window_s": 0.05, "windows": 2, "warm_up_max_s": 0.2, "deadline_s": 120}


@pytest.fixture
def write_study(tmp_path: Path) -> Callable[..., Path]:
    """Return a writer of study files; `measurement` changes single fields, `folder` is where it is to lie."""

    def write(*, folder: Path = tmp_path, measurement: dict[str, Any] | None = None, **fields: Any) -> Path:
        path = folder / "s.yaml"
        study = {"schema": 1, "name": "s", "device": "cpu", "batch": 8, "repeats": 1, **fields}
        path.write_text(yaml.safe_dump(study | {"measurement": QUICK | (measurement or {})}))
        return path

    return write


@pytest.fixture
def records() -> Callable[[Path], list[Record]]:
    """Return a reader of all records in a study's folder."""
    return lambda out: [read_record(path.parent) for path in record_paths(out / "trials")]


@pytest.fixture
def no_rank_runs() -> Callable[[Path], bool]:
    """Return a look whether every worker of a study is gone, within the seconds that a killed one may need."""

    def look(out: Path) -> bool:
        for _ in range(100):
            lines = []
            for process in psutil.process_iter(["cmdline", "status"]):
                if process.info["status"] != psutil.STATUS_ZOMBIE:
                    lines.append(" ".join(process.info["cmdline"] or []))
            if not any("scalestudy.trainers.worker" in line and str(out) in line for line in lines):
                return True
            time.sleep(0.05)
        return False

    return look
