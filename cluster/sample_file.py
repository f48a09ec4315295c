"""Samples as Parquet: a row a device and time, written part by part, one file at the end.

While it is written, PATH.parts/ holds complete Parquet files; who dies in mid-run loses the last part alone, and memory
stays bounded however long it runs.
"""

import shutil
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

if TYPE_CHECKING:
    # Only reading needs it: the sampler, which writes, also runs where it is not installed.
    import pandas as pd

_SHARES = (
    "busy",
    "memory_busy",
    "sm_active",
    "sm_occupancy",
    "tensor_active",
    "dram_active",
)
_COUNTS = (
    "memory_used_bytes",
    "throttle_reasons",
    "xid",
    "ecc_corrected",
    "ecc_uncorrected",
    "pcie_tx_bytes",
    "pcie_rx_bytes",
    "pcie_tx_bytes_per_s",
    "pcie_rx_bytes_per_s",
    "nvlink_tx_bytes",
    "nvlink_rx_bytes",
    "disk_read_bytes",
    "disk_write_bytes",
)
# `device` is `host`, or a GPU's name; what the other kind of row does not have is null in it.
SCHEMA = pa.schema(
    [
        ("time_s", pa.float64()),
        ("device", pa.dictionary(pa.int32(), pa.string())),
        *((name, pa.float32()) for name in (*_SHARES, "power_w", "temperature_c")),
        *((name, pa.int32()) for name in ("sm_clock_mhz", "memory_clock_mhz")),
        ("energy_j", pa.float64()),
        *((name, pa.int64()) for name in _COUNTS),
        ("processes", pa.list_(pa.struct([("pid", pa.int64()), ("memory_bytes", pa.int64())]))),
        *((name, pa.list_(pa.float64())) for name in ("cpu_busy_s", "cpu_steal_s")),
        *((name, pa.list_(pa.int64())) for name in ("net_rx_bytes", "net_tx_bytes")),
    ]
)
# A part is as long as a tenth of what came before, within these bounds: a month is some thousands of them.
_PART_S = (30.0, 600.0)
_PART_SHARE = 0.1
_PART_ROWS = 20_000


def warm_up() -> None:
    """Do what the first conversion does once: where pandas is installed, pyarrow imports it then."""
    pa.Table.from_pylist([], SCHEMA)


class SampleWriter:
    """Writes samples to PATH; `close` makes one file of the parts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._parts = parts_path(path)
        self._parts.mkdir()
        self._rows: list[dict[str, Any]] = []
        self._count = 0
        self._began_s = self._flushed_s = time.monotonic()

    def add(self, rows: Iterable[dict[str, Any]]) -> None:
        """Take rows of one time, and write a part when it is due."""
        self._rows += rows
        now_s = time.monotonic()
        due_s = min(max(_PART_S[0], _PART_SHARE * (now_s - self._began_s)), _PART_S[1])
        if now_s - self._flushed_s >= due_s or len(self._rows) >= _PART_ROWS:
            self._flush()
            self._flushed_s = now_s

    def close(self) -> None:
        """Write what is left, and one file instead of the parts."""
        self._flush()
        unfinished = self._path.with_name(f".{self._path.name}")
        with pq.ParquetWriter(unfinished, SCHEMA, compression="zstd") as writer:
            for part in sorted(self._parts.iterdir()):
                writer.write_table(pq.ParquetFile(part).read())
        unfinished.rename(self._path)
        shutil.rmtree(self._parts)

    def _flush(self) -> None:
        if not self._rows:
            return
        part = self._parts / f"{self._count:06}.parquet"
        # Renamed when it is whole: a torn one has no footer, and could not be read.
        unfinished = part.with_suffix(".unfinished")
        pq.write_table(_table(self._rows), unfinished, compression="zstd")
        unfinished.rename(part)
        self._rows = []
        self._count += 1


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    try:
        return pa.Table.from_pylist(rows, SCHEMA)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        # A counter that is set to all ones, say: null is what is known of it, and the other samples stay.
        return pa.Table.from_pylist([{name: _held(name, row[name]) for name in row} for row in rows], SCHEMA)


def _held(name: str, value: Any) -> Any:
    """Return a value, or None where its column cannot hold it."""
    kind = SCHEMA.field(name).type
    try:
        pa.scalar(value, kind.value_type if pa.types.is_dictionary(kind) else kind)
    except (pa.ArrowException, OverflowError, TypeError, ValueError):
        return None
    return value


def parts_path(path: Path) -> Path:
    """Return where the parts of a file lie until it is whole."""
    return path.with_suffix(".parts")


def read_samples(path: Path, columns: Sequence[str] | None = None) -> "pd.DataFrame":
    """Return the samples of a file, or of what a writer that died has left of it; all columns unless some are named.

    Raises FileNotFoundError where there are none, and ValueError or another OSError where a file is damaged.
    """
    files = [path] if path.is_file() else sorted(parts_path(path).glob("*.parquet"))
    if not files:
        raise FileNotFoundError(f"{path}: no samples there")
    # Of so small files threads take twice the time of none.
    tables = [pq.ParquetFile(file).read(columns, use_threads=False) for file in files]
    return pa.concat_tables(tables).unify_dictionaries().to_pandas(use_threads=False)
