"""benchmarks/error_rates.py: its own arithmetic by hand, and a page of every section through the report's code."""

from dataclasses import replace

import claims
import numpy as np
import pytest
from error_rates import CAUSES, Cell, causes, cells, difference, gate, markdown, missed, planted, rate, simulated
from light_records import Point, noise, study

# Of every section the first, which has the fewest repeats.
SECTIONS = {cell.section: cell for cell in reversed([*cells(quick=True)])}


@pytest.mark.parametrize("cell", SECTIONS.values(), ids=SECTIONS.keys())
def test_a_page_of_every_section_comes_out(cell: Cell) -> None:
    (outcome,) = simulated(cell, 0, 1, seed=0)
    assert outcome
    assert all(value is None or type(value) is bool for value in outcome.values())


def test_pages_depend_on_the_seed_and_their_number_alone() -> None:
    cell = Cell("section", "row", "column", 4, lambda rng, above: {"above": bool(rng.random() > above)}, {"above": 0.5})
    pages = simulated(cell, 0, 100, seed=1)
    assert pages == [*simulated(cell, 0, 40, seed=1), *simulated(cell, 40, 100, seed=1)]
    assert pages != simulated(cell, 0, 100, seed=2)


def test_a_rate_has_its_exact_interval_and_counts_only_pages_on_which_it_can_be_told() -> None:
    never = rate([{"it": False}] * 10 + [{"it": None}] * 5, "it")
    # Of none in ten: 1 - 0.025^(1/10).
    assert never == {"pages": 10, "rate": 0.0, "low": 0.0, "high": pytest.approx(1 - 0.025**0.1)}
    always = rate([{"it": True}] * 10, "it")
    assert (always["rate"], always["low"], always["high"]) == (1.0, pytest.approx(0.025**0.1), 1.0)
    assert rate([{"it": None}], "it")["rate"] is None


@pytest.mark.parametrize("kind", ["lognormal", "t", "Pareto"])
def test_the_middle_half_of_every_noise_is_as_wide(kind: str) -> None:
    drawn = noise(kind, 0.02, (200_000, 1), np.random.default_rng(0))
    low, high = np.quantile(drawn, [0.25, 0.75])
    assert high - low == pytest.approx(2 * 0.6745 * 0.02, rel=0.02)


def test_points_of_a_repeat_share_the_noise_of_blocks() -> None:
    drawn = np.log(noise("blocks", 0.02, (200_000, 2), np.random.default_rng(0)))
    # Variances 4 of the block and 1 of each point.
    assert np.corrcoef(drawn.T)[0, 1] == pytest.approx(0.8, abs=0.01)


def test_an_unknown_noise_is_an_error() -> None:
    with pytest.raises(ValueError, match="no such noise: loud"):
        noise("loud", 0.02, (1, 1), np.random.default_rng(0))


@pytest.mark.parametrize("cause", CAUSES)
@pytest.mark.parametrize("ranks", [2, 64])
def test_a_planted_cause_takes_its_tenth_and_no_other_takes_any(cause: str, ranks: int) -> None:
    _, truth = planted((cause,), ranks)
    assert getattr(truth, cause) == pytest.approx(0.9, abs=0.005)
    assert all(getattr(truth, other) > 0.99 for other in CAUSES if other != cause)


def test_two_planted_causes_take_a_tenth_each() -> None:
    _, truth = planted(("load_balance", "waiting"), 8)
    assert (truth.load_balance, truth.waiting) == pytest.approx((0.9, 0.9), abs=0.005)


def test_a_planted_cause_is_found_by_the_pages_reader() -> None:
    found = causes(np.random.default_rng(0), ("compute_scaling",), ranks=2, repeats=6)
    assert found["all that is planted is named"]
    assert not found["something else is accused"]


def test_half_the_speed_is_claimed_and_fails() -> None:
    found = difference(np.random.default_rng(0), "lognormal", repeats=6, ratio=0.5, spread=0.005)
    assert found["the faster one is claimed"]
    assert not found["the slower one is claimed"]
    assert gate(np.random.default_rng(0), "lognormal", repeats=6, ratio=0.5, spread=0.005) == {
        "it passes falsely": False,
        "it could not tell": False,
    }


def test_trainers_that_are_alike_to_the_last_are_claimed_nothing_of() -> None:
    rng = np.random.default_rng(0)
    page = claims.Page(study([Point("torch-ddp"), Point("horovod-torch")], np.ones((6, 2)), rng))
    assert claims.faster(page) == set()
    assert not claims.unlike_repeats(page)
    assert not claims.unsteady(page)


def test_what_surely_misses_its_goal_is_marked() -> None:
    cell = Cell("s", "r", "6 repeats", 100, difference, {"repeats": 6})
    often, seldom = (
        {"it": None} | rate([{"it": True}] * hits + [{"it": False}] * (100 - hits), "it") for hits in (20, 5)
    )
    assert missed(cell, "a faster one is claimed", often)
    assert not missed(cell, "a faster one is claimed", seldom)
    assert missed(cell, "the ratio's interval holds it", often)
    assert not missed(cell, "it could not tell", often)
    assert not missed(replace(cell, planted={"repeats": 3}), "a faster one is claimed", often)


def test_a_table_has_a_row_a_plant_and_a_column_a_size() -> None:
    rows = [
        {"section": "s", "outcome": "o", "row": row, "column": column, "pages": 4, "rate": share, "missed": share == 1}
        for row, column, share in (("a", "2", 0.25), ("a", "8", None), ("b", "8", 1.0))
    ]
    assert markdown(rows).partition("\n\n")[2] == (
        "### s: o\n\n| | 2 | 8 |\n|---|---|---|\n| a | 25.0 % | – |\n| b |  | **100.0 %** |\n"
    )
