"""Sweeps of a planted network come out as planted, and are drawn."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from scalestudy.analysis import collectives
from scalestudy.trainers.files import COLLECTIVES, RECORD_NAME
from scalestudy.trainers.record import Collective, Record, Window
from scalestudy.trainers.trial import Sweep, Trial

LATENCY_S, BYTES_PER_S = 50e-6, 2e9


@pytest.fixture
def swept(make_trial: Callable[..., Trial], make_record: Callable[..., Record], tmp_path: Path) -> Path:
    """Return a folder with sweeps of two trainers on 2 and 4 devices: rank 1 as planted, rank 0 a little faster."""
    rng = np.random.default_rng(0)
    for trainer, factor in (("torch-ddp", 1.0), ("tf-multiworker", 3.0)):
        for world_size in (2, 4):
            for repeat in range(3):
                trial = make_trial(trainer=trainer, model="all-reduce", world_size=world_size, repeat=repeat)
                trial = trial.model_copy(update={"sweep": Sweep(largest_bytes=2**26)})
                reports = []
                for report in make_record(trial.model_copy(update={"sweep": None})).reports:
                    found = []
                    for size in 2 ** np.arange(10, 27):
                        seconds = factor * (LATENCY_S + int(size) / BYTES_PER_S) * np.exp(rng.normal(0, 0.01))
                        seconds *= 1.0 if report.rank.rank == 1 else 0.9
                        windows = tuple(Window(float(i), i + 10 * seconds, 10) for i in range(5))
                        found.append(Collective(int(size), windows))
                    reports.append(report.model_copy(update={"windows": (), "collectives": tuple(found)}))
                folder = tmp_path / COLLECTIVES / trial.folder_name
                folder.mkdir(parents=True)
                record = make_record(trial, reports=tuple(reports))
                (folder / RECORD_NAME).write_text(record.model_dump_json(by_alias=True))
    return tmp_path


def test_a_planted_latency_and_bandwidth_are_found(swept: Path) -> None:
    found = collectives.fits(collectives.read(swept)).set_index(["series", "world_size"])
    assert len(found) == 4
    for (series, _), row in found.iterrows():
        factor = 1.0 if series == "torch-ddp" else 3.0
        assert row.latency_s == pytest.approx(factor * LATENCY_S, rel=0.03)
        assert row.bandwidth_bytes_per_s == pytest.approx(BYTES_PER_S / factor, rel=0.03)
        assert row.latency_s_low <= row.latency_s <= row.latency_s_high
        assert row.bandwidth_bytes_per_s_low <= row.bandwidth_bytes_per_s <= row.bandwidth_bytes_per_s_high
        assert row.rms_residual < 0.03


def test_bandwidths_are_those_of_nccl_tests(swept: Path) -> None:
    table = collectives.read(swept)
    assert len(table) == 12 * 17
    assert (table.algorithm_bytes_per_s == table.size_bytes / table.time_s).all()
    for world_size, factor in ((2, 1.0), (4, 1.5)):
        rows = table[table.world_size == world_size]
        assert (rows.bus_bytes_per_s / rows.algorithm_bytes_per_s).to_numpy() == pytest.approx(factor)


def test_sweeps_are_written_as_tables_and_a_plot(swept: Path) -> None:
    written = collectives.write(swept)
    assert written.figure is not None
    assert written.figure.stat().st_size > 20_000
    assert (swept / "collectives.csv").read_text().count("\n") == 1 + 12 * 17


def test_a_folder_without_sweeps_is_empty(tmp_path: Path) -> None:
    assert collectives.read(tmp_path).empty
    assert collectives.fits(collectives.read(tmp_path)).empty
