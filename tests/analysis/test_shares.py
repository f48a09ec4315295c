"""What is told as a share is one, and what a fit does not tell is not told."""

import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from scalestudy.analysis import collectives, figures, laws, shares
from scalestudy.analysis.report import write_report
from scalestudy.launch.folder import StudyFolder
from scalestudy.trainers.record import Record, Window
from scalestudy.trainers.trial import Trial

from .test_laws import measured

MakeTrial = Callable[..., Trial]
MakeRecord = Callable[..., Record]


def test_what_lies_outside_0_to_100_percent_is_no_share() -> None:
    assert [shares.share(value) for value in (0, 0.5, 1, 1.77, -0.2, math.nan, None)] == ["0%", "50%", "100%", *"––––"]
    # The tick of a clock.
    assert shares.share(1.0004, 1) == "100.0%"
    assert shares.share(-1e-12, 1) == "0.0%"
    assert shares.ends(-0.3, 1.4) == "0% – 100%"
    assert shares.ends(math.nan, math.nan) is None
    assert shares.give_or_take(0.031) == "± 3.1%"
    assert shares.give_or_take(12.7) == "over ± 100%"
    assert shares.off_by(4.0) == "over 100%"


def test_a_ratio_above_1_is_a_multiple() -> None:
    assert shares.ratio(0.85, 0.82, 0.88) == ("85%", "82%–88%")
    assert shares.ratio(0.99, 0.95, 1.02) == ("99%", "95%–1.02×")
    assert shares.ratio(1.2, 1.1, 1.3) == ("1.20×", "1.10×–1.30×")
    assert shares.ratio(1.0, 0.9, 1.0004) == ("100%", "90%–100%")
    assert shares.ratio(1.2)[0] == "1.20×"


def curve(values: dict[int, float]) -> Callable[[np.ndarray], np.ndarray]:
    return np.vectorize(values.__getitem__, otypes=[float])


@pytest.mark.parametrize(
    "throughputs",
    [
        {2: 200.0, 4: 133.0, 8: 114.0},
        {1: 100.0, 2: 90.0, 4: 80.0, 8: 70.0},
        {4: 100.0, 8: 100.0, 16: 100.0},
        {2: 1000.0, 4: 10.0, 8: 1.0, 16: 0.1},
    ],
)
def test_no_law_is_named_whose_shares_have_run_into_an_edge(throughputs: dict[int, float]) -> None:
    [found] = laws.fits(measured(curve(throughputs), sizes=tuple(throughputs), noise=0.005)).to_dict("records")
    assert found["law"] == ""
    assert "serial would be 1 or more" in found["no_law"]
    assert found["predictions"] is None


@pytest.fixture
def report(tmp_path: Path, make_trial: MakeTrial, make_record: MakeRecord) -> Callable[..., str]:
    """Return a maker of reports on 1, 2 and 4 devices from step times and what the parts of a step took."""

    def make(step_s: dict[int, float], resident_s: float, local_s: float, exchange_s: float) -> str:
        folder = StudyFolder(tmp_path / "out")
        folder.create("t")
        for size, seconds in step_s.items():
            for repeat in range(3):
                trial = make_trial(world_size=size, repeat=repeat)
                record = make_record(trial, seconds * (1 + repeat / 1000))
                parts = {"resident": resident_s, "local": local_s if size > 1 else resident_s, "exchange": exchange_s}
                found = {
                    f"{part}_windows": (Window(0.0, 10 * own_s, 10),)
                    for part, own_s in parts.items()
                    if size > 1 or part != "exchange"
                } | {"exchanged_bytes": 1000 if size > 1 else None, "local_step_times_s": (local_s, local_s * 3)}
                reports = tuple(one.model_copy(update=found) for one in record.reports)
                folder.finish(folder.begin(trial), record.model_copy(update={"reports": reports}))
        html = write_report(folder.path).html.read_text(encoding="utf-8")
        return re.sub(r"<style>.*?</style>|data:image[^\"]*|<pre>.*?</pre>", "", html, flags=re.DOTALL)

    return make


def percentages(text: str) -> list[float]:
    return [float(number.replace(",", "")) for number in re.findall(r"(?<![\w.])(-?[\d,.]*\d) ?%", text)]


def test_a_report_shows_no_share_above_100_percent_and_says_why(report: Callable[..., str]) -> None:
    """A step with the exchange is faster than one without, and devices slow each other down."""
    html = report({1: 0.1, 2: 0.3, 4: 0.9}, resident_s=0.09, local_s=0.1, exchange_s=0.01)
    assert "hide behind" not in html
    assert "A dash: not shown, since a step with the exchange took no longer than one without" in html
    assert "-" not in "".join(re.findall(r'<td class="n">([^<]*ms)</td>', html))
    # What is a ratio and no share.
    assert "1.11×" in html
    assert all(0 <= value <= 100 for value in percentages(html))
    assert "throughput does not grow with devices as this law has it" in html
    assert "e+" not in html


def test_times_that_do_not_grow_with_the_size_give_no_bandwidth() -> None:
    line: dict[str, Any] = dict.fromkeys(collectives.LINE, "torch-ddp") | {
        "world_size": 2,
        "nodes": 1,
        "devices_per_node": 2,
    }
    rows = [
        line | {"trial": str(repeat), "repeat": repeat, "size_bytes": 4**power, "time_s": 1e-3 - power * 1e-5}
        for power in range(1, 10)
        for repeat in range(3)
    ]
    table = pd.DataFrame(rows).assign(algorithm_bytes_per_s=1.0, bus_bytes_per_s=1.0)
    [fit] = collectives.fits(table).to_dict("records")
    assert math.isnan(fit["bandwidth_bytes_per_s"])
    assert math.isnan(fit["bandwidth_bytes_per_s_high"])
    assert fit["latency_s"] == pytest.approx(1e-3, rel=0.1)
    # What is not known is not drawn, and does not stop what is.
    assert figures.collectives(collectives.points(table), pd.DataFrame([fit])).axes
