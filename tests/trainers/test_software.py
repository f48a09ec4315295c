import sys
from typing import cast

import pytest

from scalestudy.trainers.software import capture, version_of
from scalestudy.trainers.trainer import Trainer


class Described:
    """As much of a trainer as is asked for its software."""

    def versions(self) -> dict[str, str]:
        return {"torch": "2.13.0"}

    def settings(self) -> dict[str, str | int]:
        return {"intra_op": 1}


def test_what_governs_a_rank_is_kept_and_nothing_that_may_be_secret() -> None:
    environ = {
        "OMP_NUM_THREADS": "1",
        "NCCL_IB_DISABLE": "1",
        "TF_XLA_FLAGS": "--tf_xla_auto_jit=2",
        "TF_VAR_password": "hunter2",
        "AWS_SECRET_ACCESS_KEY": "hunter2",
        "PATH": "/bin",
        "HOROVOD_CACHE_CAPACITY": "1024",
        "HOROVOD_GLOO_RENDEZVOUS_PORT": "1234",
    }
    found = capture(cast(Trainer, Described()), environ)
    assert set(found.variables) == {"OMP_NUM_THREADS", "NCCL_IB_DISABLE", "TF_XLA_FLAGS", "HOROVOD_CACHE_CAPACITY"}
    assert found.versions["torch"] == "2.13.0"
    assert found.settings == {"intra_op": 1}


def test_what_is_unzipped_and_not_installed_costs_no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    # Where installed distributions are looked for: nowhere.
    monkeypatch.setattr("sys.path", [])
    monkeypatch.setattr("sys.meta_path", [finder for finder in sys.meta_path if "editable" not in repr(finder)])
    assert version_of("scalestudy") == "unknown"
    assert capture(cast(Trainer, Described()), {}).versions == {
        "scalestudy": "unknown",
        "numpy": "unknown",
        "torch": "2.13.0",
    }
