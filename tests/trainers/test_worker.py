"""The worker as a process, where it goes wrong."""

import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from scalestudy.cluster.ports import free_ports
from scalestudy.launch.local import environment, local_ranks
from scalestudy.trainers.record import RankReport
from scalestudy.trainers.trial import Measurement, Trial

pytestmark = pytest.mark.slow

# What torch maps when it is imported, and some; the batch below wants ten times that.
_ADDRESSES_BYTES = 6 * 2**30


def run_rank(trial: Trial, folder: Path, **variables: str) -> RankReport:
    """Run the only rank of a trial in an address space of six GiB."""
    (folder / "trial.json").write_text(trial.model_dump_json(by_alias=True))
    [rank], [port] = local_ranks(1), free_ports(1)
    subprocess.run(
        [sys.executable, "-m", "scalestudy.trainers.worker", folder],
        env=environment(os.environ, trial, rank, [f"127.0.0.1:{port}"]) | {"SCALESTUDY_LIFELINE": ""} | variables,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (_ADDRESSES_BYTES, _ADDRESSES_BYTES)),
        stderr=subprocess.DEVNULL,
        check=False,
        timeout=300,
    )
    return RankReport.model_validate_json((folder / "rank-0.json").read_bytes())


@pytest.mark.parametrize("data", ["synthetic", "synthetic-host"])
def test_out_of_memory_is_told_apart(make_trial: Callable[..., Trial], tmp_path: Path, data: str) -> None:
    trial = make_trial(per_device_batch=2**18, measurement=Measurement(windows=1, telemetry_hz=0))
    trial = trial.model_copy(update={"data": trial.data.model_copy(update={"source": data})})
    report = run_rank(trial, tmp_path)
    assert report.error is not None
    assert report.error.kind == "oom", report.error.message
    assert "allocate" in report.error.message
    # The host's allocator keeps no books.
    assert report.error.allocator is None
    assert report.telemetry is None


def test_a_sampler_that_crashes_costs_no_trial(
    make_trial: Callable[..., Trial], tmp_path: Path, nvml_standin: Path
) -> None:
    (tmp_path / "telemetry-0-here.parts").mkdir()
    report = run_rank(make_trial(), tmp_path, SCALESTUDY_HOST="here", LD_LIBRARY_PATH=str(nvml_standin))
    assert report.error is None
    assert len(report.windows) == 2
    assert report.telemetry is not None
    assert report.telemetry.error == "the sampler ended with exit code 1, see the rank's log"
