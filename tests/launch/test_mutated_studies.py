"""Whatever a study file holds, a run ends at once: well, or with a line for every mistake."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

MUTATE = Path(__file__).with_name("mutate_studies.py")


@pytest.mark.slow
def test_no_mutation_of_a_study_does_more_than_say_what_is_wrong(tmp_path: Path) -> None:
    told = subprocess.run(
        [sys.executable, "-B", MUTATE, "2000"], cwd=tmp_path, capture_output=True, encoding="utf-8", timeout=300
    )
    assert told.returncode == 0, told.stderr
    found = json.loads(told.stdout)
    assert found["findings"] == []
    # Neither does every mutation fail, nor none.
    assert min(found["codes"].values()) > 200
