"""Hosts as people have them, on which ranks once waited for each other until the deadline."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from scalestudy.trainers.record import Record

pytestmark = pytest.mark.slow

WriteStudy = Callable[..., Path]
Records = Callable[[Path], list[Record]]
SCALESTUDY = str(Path(sys.executable).with_name("scalestudy"))
# Nothing listens there.
DEAD = "http://127.0.0.1:9"
PROXIES = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")


def run(study: Path, out: Path, **variables: str) -> None:
    told = subprocess.run(
        [SCALESTUDY, "run", study, "--out", out], env={**os.environ, **variables}, capture_output=True, timeout=300
    )
    assert told.returncode == 0, told.stdout.decode() + told.stderr.decode()


def test_ranks_reach_each_other_past_any_proxy(write_study: WriteStudy, records: Records, tmp_path: Path) -> None:
    names = ("http_proxy", "https_proxy", "grpc_proxy", "all_proxy")
    study = write_study(
        trainers=["torch-ddp", "tf-multiworker"], models="cnn", world_sizes=[2], measurement={"deadline_s": 60}
    )
    run(study, tmp_path / "out", **{name: DEAD for lower in names for name in (lower, lower.upper())})
    assert [(record.outcome, record.reason) for record in records(tmp_path / "out")] == 2 * [("ok", None)]


def test_loaders_pass_batches_under_a_long_temporary_folder(
    write_study: WriteStudy, records: Records, tmp_path: Path
) -> None:
    """The path of a socket has at most 107 characters, and loaders put theirs there."""
    pixels = np.random.default_rng(0).integers(0, 255, (2, 16, 32, 32, 3), dtype=np.uint8)
    for name, pictures in zip(("cats", "dogs"), pixels, strict=True):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index, picture in enumerate(pictures):
            Image.fromarray(picture).save(tmp_path / "images" / name / f"{index}.png")
    long = tmp_path / ("temporary-" + 100 * "x")
    long.mkdir()
    study = write_study(
        trainers=["torch-ddp", "tf-multiworker"],
        models=[{"name": "cnn", "data": "images:images", "image_size": 32}],
        loader_workers=2,
        world_sizes=[1],
        measurement={"deadline_s": 60},
    )
    run(study, tmp_path / "out", TMPDIR=str(long))
    assert [(record.outcome, record.reason) for record in records(tmp_path / "out")] == 2 * [("ok", None)]
