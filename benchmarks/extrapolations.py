"""How often the band of a law holds the truth past what was measured, over truths that no law has exactly.

Every series is invented, none is published or measured: device-seconds an image on n devices after a family below, 1 on
one device, times a size's own lasting quirk and every repeat's noise.

Usage: python benchmarks/extrapolations.py [SERIES OF EVERY FAMILY]
"""

import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scalestudy.analysis import laws
from scalestudy.analysis.metrics import POINT

Values = NDArray[np.float64]
IMAGES_PER_S = 1000.0
SIZES = (
    (1, 2, 4, 8),
    (1, 2, 4, 8, 16),
    (1, 2, 4, 8, 16, 32),
    (1, 2, 4, 8, 16, 32, 64),
    (8, 16, 32, 64),
    (1, 2, 3, 4, 6, 8),
)


# What laws have, what they only come near to; and the knee, which nobody can see before it is reached.
_EXACT = ("Amdahl", "USL", "node step")
_INEXACT = ("log n", "n^0.3", "ring", "ring of rings", "log nodes")


def truths(rng: np.random.Generator) -> dict[str, Callable[[Values, float], Values]]:
    """Return a truth of every family, of n and the devices of a node: device-seconds an image over one device's."""
    # At 64 devices an efficiency of 50 to 95 %, whatever the family.
    lost = 1 / rng.uniform(0.5, 0.95) - 1
    part, knee = rng.uniform(0.2, 0.8), 2 ** rng.uniform(2, 9)
    return {
        "Amdahl": lambda n, _: 1 + lost * (n - 1) / 63,
        "USL": lambda n, _: 1 + part * lost * (n - 1) / 63 + (1 - part) * lost * n * (n - 1) / 4032,
        "log n": lambda n, _: 1 + lost * np.log2(n) / 6,
        "n^0.3": lambda n, _: 1 + lost * (n**0.3 - 1) / (64**0.3 - 1),
        "ring": lambda n, _: 1 + lost * (n - 1) / n,
        "node step": lambda n, per_node: 1 + lost * (n > per_node),
        "ring of rings": lambda n, per_node: (
            1 + part * lost * (n - 1) / n + (1 - part) * lost * (1 - 1 / np.ceil(n / per_node))
        ),
        "log nodes": lambda n, per_node: 1 + part * lost * (n - 1) / n + lost * np.log2(np.ceil(n / per_node)) / 6,
        # Past this many devices an exchange is no longer hidden.
        "knee": lambda n, _: 1 + lost * np.maximum(n - knee, 0) / 63,
    }


def trials(
    seconds: Values, sizes: tuple[int, ...], *, per_node: int, repeats: int, noise: float, rng: np.random.Generator
) -> pd.DataFrame:
    """Return trials of one series in weak scaling as `laws.fits` reads them, with so much relative noise a repeat."""
    n = np.repeat(sizes, repeats)
    throughput = IMAGES_PER_S * n / np.repeat(seconds, repeats) * np.exp(rng.normal(0, noise, len(n)))
    return pd.DataFrame(
        {
            **dict.fromkeys(POINT, "x"),
            "world_size": n,
            "repeat": np.tile(np.arange(repeats), len(sizes)),
            "devices_per_node": per_node,
            "throughput_images_per_s": throughput,
        }
    )


def judged(count: int, seed: int = 0) -> pd.DataFrame:
    """Return a row a series, of every family so many: how it was made, the law named, and how right its prediction is.

    reach: over the largest size, 1 where nothing is predicted; held: whether the band holds the truth at the furthest
    size predicted, NaN where none is; off: the prediction's relative error there.
    """
    rng = np.random.default_rng(seed)
    made: list[dict[str, Any]] = []
    frames = []
    for _ in range(count):
        sizes = SIZES[rng.integers(len(SIZES))]
        study: dict[str, Any] = {
            "per_node": int(rng.choice([4, 8, 1024])),
            "repeats": int(rng.choice([3, 6, 10])),
            "noise": float(rng.choice([0.002, 0.005, 0.01, 0.02])),
        }
        # What a size has of its own, in every repeat: no law is exact.
        quirk = rng.choice([0, 0.005])
        for family, truth in truths(rng).items():
            seconds = truth(np.array(sizes, dtype=float), study["per_node"]) * np.exp(rng.normal(0, quirk, len(sizes)))
            frames.append(trials(seconds, sizes, **study, rng=rng).assign(series=f"{len(made):09}"))
            made.append(study | {"family": family, "sizes": len(sizes), "largest": sizes[-1], "truth": truth})
    # In the order of their names.
    return pd.DataFrame(map(_judged, made, laws.fits(pd.concat(frames)).to_dict("records")))


def _judged(made: dict[str, Any], found: dict[Any, Any]) -> dict[str, Any]:
    truth, largest = made.pop("truth"), made.pop("largest")
    row = made | {"law": found["law"], "why": found["why_no_further"], "reach": 1.0, "held": np.nan, "off": np.nan}
    if not found["law"] or found["reach"] <= largest:
        return row
    end = found["predictions"].iloc[-1]
    right = IMAGES_PER_S * end.world_size / truth(np.array([end.world_size]), made["per_node"])[0]
    return row | {
        "reach": found["reach"] / largest,
        "held": float(end.low <= right <= end.high),
        "off": abs(end.throughput / right - 1),
    }


def main() -> None:
    """Print how many series are predicted, and of those how many bands hold the truth, by what they are like."""
    table = judged(int(sys.argv[1]) if len(sys.argv) > 1 else 100)
    drawn = table[table.held.notna()]
    print(
        f"{len(table)} series, a law named for {(table.law != '').mean():.0%}, {len(drawn) / len(table):.0%} predicted"
    )
    print(f"bands that hold the truth: {drawn.held.mean():.1%}")
    for words, families in (("that a law has but for quirks", _EXACT), ("that no law has", _INEXACT)):
        own = drawn[drawn.family.isin(families)]
        print(f"of truths {words}: {own.held.mean():.1%} of {len(own)}")
    for by in ("family", "law", "sizes", "repeats", "noise", "per_node", "reach"):
        shown = drawn.groupby(by).agg(
            drawn=("held", "size"), held=("held", "mean"), typically_off=("off", "median"), worst=("off", "max")
        )
        print(f"\n{shown.to_string(float_format='{:.3f}'.format)}")
    print(f"\nnot further because\n{table.why[table.why != ''].value_counts().to_string()}")


if __name__ == "__main__":
    main()
