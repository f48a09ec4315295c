"""Whole studies, run for real by the command line: both frameworks, two ranks, kills, and data that is broken."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from scalestudy.trainers.record import Record
from scalestudy.trainers.trainer import TRAINERS

pytestmark = pytest.mark.slow

SCALESTUDY = str(Path(sys.executable).with_name("scalestudy"))
WriteStudy = Callable[..., Path]
Records = Callable[[Path], list[Record]]
NoRankRuns = Callable[[Path], bool]


def run(study: Path, out: Path, expected: int = 0) -> str:
    told = subprocess.run([SCALESTUDY, "run", study, "--out", out], capture_output=True, text=True, timeout=600)
    assert told.returncode == expected, told.stdout + told.stderr
    return told.stdout


def test_a_study_of_every_trainer_leaves_whole_records_and_a_report(
    write_study: WriteStudy, tmp_path: Path, records: Records
) -> None:
    study = write_study(
        trainers=list(TRAINERS),
        models=[{"name": "cnn", "data": "digits"}],
        world_sizes=[1, 2],
        batch=32,
        measurement={"cause_windows": 2},
    )
    told = run(study, tmp_path / "out")
    assert told.count(": ok, ") == 2 * len(TRAINERS)
    found = records(tmp_path / "out")
    assert len(found) == 2 * len(TRAINERS)
    pinned: dict[tuple[str, int], int] = {}
    for record in found:
        trial = record.trial
        assert record.outcome == "ok", record.reason
        assert sum(report.replicas for report in record.reports) == trial.world_size
        assert len({digest for report in record.reports for digest in report.parameter_checksums}) == 1
        assert record.environment.study == study.read_text()
        assert record.environment.host.cpu_model
        # One host, not one for the controller and one for its ranks.
        assert record.reports[0].host == record.environment.host
        for report in record.reports:
            assert list(report.phases) == [
                "import",
                "rendezvous",
                "build",
                "first_step",
                "warm_up",
                "test",
                "causes",
                "close",
            ]
            assert report.missing == {}
            assert report.warm_up_memory is not None
            starts_s = [*report.phase_starts_s.values()]
            assert starts_s == sorted(starts_s)
            assert report.phase_starts_s["warm_up"] < report.windows[0].start_s
            assert report.windows[-1].end_s < report.phase_starts_s["test"] < report.phase_starts_s["causes"]
            assert all(seconds >= 0 for seconds in report.phases.values())
            assert len(report.windows) == 2
            alone = trial.world_size == 1
            assert len(report.exchange_windows) == (0 if alone else len(report.local_windows))
            assert len(report.local_windows) == len(report.resident_windows) >= 2
            assert report.exchanged_bytes == (None if alone else 4 * 61_706)
            assert len(report.local_step_times_s) >= 10
            assert report.parameter_count == 61_706
            assert report.memory is not None
            assert report.memory.peak_resident_bytes > 2**26
            assert report.software is not None
            assert set(TRAINERS[trial.trainer].distributions) <= report.software.versions.keys()
            assert report.software.variables["OMP_NUM_THREADS"]
            pinned[trial.trainer, trial.world_size] = len(report.software.cpus) // report.replicas
        # Ranks step together: their windows hold the same steps, and begin within the time one takes.
        assert len({tuple(window.steps for window in report.windows) for report in record.reports}) == 1
        for begun in zip(*(report.windows for report in record.reports), strict=True):
            starts = [window.start_s for window in begun]
            assert max(starts) - min(starts) < begun[0].end_s - begun[0].start_s
    # One rank and two ranks had as many CPUs each.
    assert set(pinned.values()) == {1} or os.cpu_count() != 2
    results = pd.read_csv(tmp_path / "out" / "results.csv")
    assert (results.throughput_images_per_s > 0).all()
    # Telemetry of the host is joined to the windows: while they were timed the ranks' CPUs were at work.
    for record in found:
        [telemetry] = [report.telemetry for report in record.reports if report.telemetry]
        assert telemetry.error is None
    devices = pd.read_parquet(tmp_path / "out" / "devices.parquet")
    timed = devices[devices["rank"].notna() & devices.window.notna()]
    assert len(timed) == 2 * sum(len(record.reports) for record in found)
    assert timed.busy.notna().mean() > 0.9
    assert timed.busy.median() > 0.5
    assert results.device_busy.between(0.2, 1).all()
    # Every trainer knows where its time goes.
    product = results[["compute_scaling", "load_balance", "waiting", "communication", "input", "unexplained"]].prod(
        axis=1
    )
    assert product.to_numpy() == pytest.approx(results.efficiency.to_numpy())
    for figure in ("waterfall", "overlap", "stragglers"):
        assert (tmp_path / "out" / "figures" / f"{figure}.svg").exists()
    assert (tmp_path / "out" / "report.html").stat().st_size > 100_000


@pytest.mark.parametrize("trainer", ["torch-ddp", "tf-multiworker"])
def test_cnn_learns_the_digits_on_two_ranks(
    write_study: WriteStudy, tmp_path: Path, trainer: str, records: Records
) -> None:
    study = write_study(
        trainers=trainer,
        models=[{"name": "cnn", "data": "digits"}],
        world_sizes=[2],
        batch=16,
        optimizer={"name": "adam", "learning_rate": 0.001},
        measurement={"window_s": 0.5, "windows": 40, "warm_up_max_s": 2},
    )
    run(study, tmp_path / "out")
    [record] = records(tmp_path / "out")
    for report in record.reports:
        assert report.test_accuracy is not None
        assert report.test_accuracy >= 0.97


def test_kills_at_any_moment_lose_no_record_and_repeat_none(
    write_study: WriteStudy, tmp_path: Path, records: Records, no_rank_runs: NoRankRuns
) -> None:
    study = write_study(trainers="torch-ddp", models="cnn", world_sizes=[1, 2], repeats=2)
    run(study, tmp_path / "undisturbed")
    expected = sorted(record.trial.id for record in records(tmp_path / "undisturbed"))
    assert len(expected) == 4

    rng, out = random.Random(0), tmp_path / "out"
    kept: dict[Path, str] = {}
    for attempt in range(100):
        # The delays span the whole of a trial, and grow so that in the end some are done between two kills.
        process = subprocess.Popen([SCALESTUDY, "run", study, "--out", out], stdout=subprocess.DEVNULL)
        try:
            process.wait(timeout=rng.uniform(0.2, 3 + attempt / 2))
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        else:
            assert process.returncode == 0
            break
        written = {path: path.read_text() for path in out.glob("trials/*/record.json")}
        assert kept.items() <= written.items(), "a record was lost or changed"
        kept = written
        assert no_rank_runs(out)
    else:
        pytest.fail("the study never ended")
    assert attempt > 2, "too few kills to show anything"
    assert sorted(record.trial.id for record in records(out)) == expected
    assert {record.outcome for record in records(out)} == {"ok"}


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_stops_the_ranks_and_says_how_to_go_on(
    write_study: WriteStudy, tmp_path: Path, stop: signal.Signals, no_rank_runs: NoRankRuns
) -> None:
    study = write_study(trainers="torch-ddp", models="cnn", world_sizes=[2], repeats=50)
    out = tmp_path / "out"
    process = subprocess.Popen([SCALESTUDY, "run", study, "--out", out], stdout=subprocess.PIPE, text=True)
    while not list(out.glob("trials/*/rank-1.log")):
        time.sleep(0.05)
    process.send_signal(stop)
    told, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert f"scalestudy run {study} --launcher local --out {out}" in told
    assert no_rank_runs(out)


def test_a_corrupt_image_fails_its_trial_alone_and_is_named(
    write_study: WriteStudy, tmp_path: Path, records: Records
) -> None:
    for name in ("cats", "dogs"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(16):
            Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "images" / name / f"{index}.png")
    broken = tmp_path / "images" / "cats" / "5.png"
    broken.write_bytes(broken.read_bytes()[:60])
    study = write_study(
        trainers=["torch-ddp", "tf-multiworker"],
        models=[{"name": "cnn", "data": "images:images", "image_size": 32}, {"name": "cnn", "data": "synthetic"}],
        world_sizes=[2],
    )
    run(study, tmp_path / "out", expected=1)
    for record in records(tmp_path / "out"):
        if record.trial.data.source == "synthetic":
            assert record.outcome == "ok"
        else:
            assert record.outcome == "failed"
            assert f"{broken}: not a readable image" in (record.reason or "")


def test_a_batch_larger_than_the_data_fails_its_trial_with_the_numbers(
    write_study: WriteStudy, tmp_path: Path, records: Records
) -> None:
    study = write_study(
        trainers=["torch-ddp", "tf-multiworker"],
        models=[{"name": "cnn", "data": "digits", "batch": 2000}],
        world_sizes=[1],
    )
    run(study, tmp_path / "out", expected=1)
    for record in records(tmp_path / "out"):
        assert record.outcome == "failed"
        assert "the global batch of 2000 needs as many training images, there are 1433" in (record.reason or "")


def test_a_trial_over_its_deadline_is_a_timeout(
    write_study: WriteStudy, tmp_path: Path, records: Records, no_rank_runs: NoRankRuns
) -> None:
    study = write_study(trainers="torch-ddp", models="cnn", world_sizes=[2], measurement={"deadline_s": 1})
    run(study, tmp_path / "out", expected=1)
    [record] = records(tmp_path / "out")
    assert record.outcome == "timeout"
    assert no_rank_runs(tmp_path / "out")


def test_a_damaged_record_is_set_aside_and_measured_anew(write_study: WriteStudy, tmp_path: Path) -> None:
    study = write_study(trainers="torch-ddp", models="cnn", world_sizes=[1])
    run(study, tmp_path / "out")
    [path] = tmp_path.glob("out/trials/*/record.json")
    path.write_text(path.read_text()[:50])
    assert f"{path}: is torn: 50 bytes" in run(study, tmp_path / "out")
    assert json.loads(path.read_text())["outcome"] == "ok"
    [aside] = tmp_path.glob("out/trials/*.unfinished-1/record.json")
    assert len(aside.read_text()) == 50
