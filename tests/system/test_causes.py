"""Causes planted for real: a rank that sleeps, an input that does, a network of known bandwidth; each is named."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

pytestmark = pytest.mark.slow

SCALESTUDY = str(Path(sys.executable).with_name("scalestudy"))
WriteStudy = Callable[..., Path]
CAUSES = ["compute_scaling", "load_balance", "waiting", "communication", "input"]
# Three repeats show a cause as large as these.
PLAN = {"window_s": 0.2, "windows": 2, "warm_up_max_s": 1, "cause_windows": 2}
REPEATS = 3
ADVICE = {
    "compute_scaling": "Look for what devices share",
    "load_balance": "Look at the slower ones",
    "waiting": "Look for what interrupts ranks",
    "communication": "or a faster network",
    "input": "Try more loader_workers",
}

# What Python runs first, from PYTHONPATH. A step passes through DDP's forward once.
SLOW_RANK = """
import os, sys, time
if os.environ.get("RANK") == "1" and "scalestudy.trainers.worker" in sys.orig_argv:
    import torch
    from torch.nn.parallel import DistributedDataParallel

    def sleep(module, _):
        if isinstance(module, DistributedDataParallel):
            time.sleep(0.030)

    torch.nn.modules.module.register_module_forward_pre_hook(sleep)
"""
# A file system that two readers share.
SLOW_INPUT = """
import os, sys, time
if os.environ.get("WORLD_SIZE") == "2" and "scalestudy.trainers.worker" in sys.orig_argv:
    from PIL import Image

    opened = Image.open

    def slowly(*args, **kwargs):
        time.sleep(0.010)
        return opened(*args, **kwargs)

    Image.open = slowly
"""


def planted(folder: Path, code: str) -> str:
    """Return a Python that runs the code first."""
    (folder / "site").mkdir()
    (folder / "site" / "sitecustomize.py").write_text(code)
    return program(folder, f'export PYTHONPATH={folder / "site"}\nexec {sys.executable} "$@"')


def program(folder: Path, commands: str) -> str:
    path = folder / "python"
    path.write_text(f"#!/bin/bash\n{commands}\n")
    path.chmod(0o755)
    return str(path)


def causes(study: Path, out: Path) -> tuple[pd.Series, str]:
    """Run the study and return the factors at two devices, medians over repeats, and the report."""
    told = subprocess.run([SCALESTUDY, "run", study, "--out", out], capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stdout + told.stderr
    results = pd.read_csv(out / "results.csv")
    return results[results.world_size == 2][CAUSES].median(), (out / "report.html").read_text()


def assert_blamed(cause: str, report: str) -> None:
    """Nothing but the cause is blamed, and it is, unless the page says that this machine was too busy to tell."""
    blamed = {name for name, words in ADVICE.items() if words in report}
    assert blamed <= {cause}
    assert blamed or "do not add up" in report or "not shown to have any one cause" in report


def test_a_rank_that_sleeps_is_named_as_the_cause(write_study: WriteStudy, tmp_path: Path) -> None:
    study = write_study(
        trainers="torch-ddp",
        models="cnn",
        world_sizes=[1, 2],
        batch=64,
        repeats=REPEATS,
        environments={"torch-ddp": planted(tmp_path, SLOW_RANK)},
        measurement=PLAN,
    )
    factors, report = causes(study, tmp_path / "out")
    assert factors.idxmin() == "load_balance"
    # 30 ms more than the 5 to 12 that the step takes here.
    assert factors.load_balance < 0.5
    assert_blamed("load_balance", report)
    # Three repeats name no rank of two: chance has one of them in all three in a quarter of studies.
    assert "is the slowest in all 3 repeats, too few to rule out chance" in report


def test_an_input_that_sleeps_is_named_as_the_cause(write_study: WriteStudy, tmp_path: Path) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(32):
            pixels = np.full((32, 32, 3), index, np.uint8)
            Image.fromarray(pixels).save(tmp_path / "images" / name / f"{index}.png")
    study = write_study(
        trainers="torch-ddp",
        models=[{"name": "cnn", "data": "images:images", "image_size": 32}],
        world_sizes=[1, 2],
        batch=16,
        repeats=REPEATS,
        environments={"torch-ddp": planted(tmp_path, SLOW_INPUT)},
        measurement=PLAN,
    )
    factors, report = causes(study, tmp_path / "out")
    assert factors.idxmin() == "input"
    # 160 ms a batch of one loader, for a step of some 5.
    assert factors.input < 0.5
    assert_blamed("input", report)


RATE_BYTES_PER_S = 100e6 / 8


@pytest.fixture
def shaped_python(tmp_path: Path) -> Iterator[str]:
    """Return a Python whose rank 0 and rank 1 live in network namespaces, 100 Mbit/s each way between them."""
    names = [f"ss{os.getpid()}-{rank}" for rank in (0, 1)]

    def run(*command: str) -> None:
        subprocess.run(command, check=True)

    for name in names:
        run("ip", "netns", "add", name)
    try:
        run("ip", "link", "add", "ss0", "netns", names[0], "type", "veth", "peer", "name", "ss0", "netns", names[1])
        for rank, name in enumerate(names):
            within = ("ip", "netns", "exec", name)
            run(*within, "ip", "address", "add", f"10.213.0.{rank + 1}/24", "dev", "ss0")
            run(*within, "ip", "link", "set", "lo", "up")
            run(*within, "ip", "link", "set", "ss0", "up")
            shape = "root tbf rate 100mbit burst 32kbit latency 400ms"
            run(*within, "tc", "qdisc", "add", "dev", "ss0", *shape.split())
        yield program(
            tmp_path,
            "export MASTER_ADDR=10.213.0.1 GLOO_SOCKET_IFNAME=ss0\n"
            # Other processes than ranks, such as a look at versions, have no rank.
            f'exec ip netns exec "ss{os.getpid()}-${{RANK:-0}}" {sys.executable} "$@"',
        )
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False)


def test_a_shaped_network_is_named_as_the_cause_and_measured(
    write_study: WriteStudy, tmp_path: Path, shaped_python: str
) -> None:
    study = write_study(
        trainers="torch-ddp",
        models="cnn",
        world_sizes=[1, 2],
        batch=16,
        repeats=REPEATS,
        environments={"torch-ddp": shaped_python},
        measurement=PLAN,
    )
    factors, report = causes(study, tmp_path / "out")
    assert factors.idxmin() == "communication"
    # 0.25 MB take some 20 ms, a step some 5.
    assert factors.communication < 0.5
    assert_blamed("communication", report)

    # Two ranks in a ring each send what they reduce: bus bandwidth is the wire's, less its headers.
    command: list[str | Path] = [
        SCALESTUDY,
        "collectives",
        study,
        "--out",
        tmp_path / "out",
        "--smallest",
        "256KB",
        "--largest",
        "2MB",
    ]
    told = subprocess.run(command, capture_output=True, text=True, timeout=600)
    assert told.returncode == 0, told.stdout + told.stderr
    table = pd.read_csv(tmp_path / "out" / "collectives.csv")
    assert table.groupby("repeat").size().tolist() == [4] * REPEATS
    largest = table[table.size_bytes == 2**21].bus_bytes_per_s.median()
    assert 0.75 * RATE_BYTES_PER_S < largest < 1.02 * RATE_BYTES_PER_S
    assert "What the network gives" in (tmp_path / "out" / "report.html").read_text()
    # The exchange alone, in the trials, and the sweep agree on what 0.25 MB take.
    trials = [json.loads(path.read_text()) for path in tmp_path.glob("out/trials/*-w2-*/record.json")]
    alone_s = [
        (end_s - start_s) / steps
        for trial in trials
        for start_s, end_s, steps, _ in trial["reports"][0]["exchange_windows"]
    ]
    swept_s = table[table.size_bytes == 2**18].time_s.median()
    assert np.median(alone_s) == pytest.approx(swept_s * 246_824 / 2**18, rel=0.3)
