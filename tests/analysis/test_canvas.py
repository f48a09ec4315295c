"""Figures are the same whatever a user has set for figures of their own, and text in them is text."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from scalestudy.analysis import figures
from scalestudy.analysis.canvas import as_svg, save_png, style
from scalestudy.analysis.metrics import POINT

DRAW = """
import sys, pandas as pd
from scalestudy.analysis import figures
from scalestudy.analysis.canvas import as_svg, save_png
from scalestudy.analysis.metrics import POINT
from pathlib import Path
row = dict.fromkeys(POINT, "x") | dict.fromkeys(("trainer", "series"), "torch-ddp")
row |= {"workload": "cnn", "world_size": 1}
losses = pd.DataFrame([row | {"trial": "a", "images": n, "loss": 0.7 / n} for n in (1, 1000)])
figure = figures.loss_curves(losses)
Path(sys.argv[1], "loss.svg").write_bytes(as_svg(figure))
save_png(figure, Path(sys.argv[1], "loss.png"))
"""


def drawn(folder: Path, **environment: str) -> dict[str, bytes]:
    """Return figures that a process of its own has drawn, by name."""
    folder.mkdir()
    told = subprocess.run(
        # Old packages warn of what is new.
        [sys.executable, "-W", "error", "-W", "ignore::DeprecationWarning", "-c", DRAW, folder],
        env={**os.environ, **environment},
        cwd=folder.parent,
        capture_output=True,
        encoding="utf-8",
        timeout=120,
    )
    assert told.returncode == 0, told.stderr
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_figures_depend_on_no_setting_of_their_user(tmp_path: Path) -> None:
    usual = drawn(tmp_path / "usual")
    # In the folder where the command runs, which matplotlib reads first.
    settings = ["text.usetex: True", "backend: tkagg", "savefig.bbox: tight", "savefig.dpi: 30", "figure.dpi: 30"]
    settings += ["font.family: no-such-font", "axes.facecolor: black", "savefig.format: jpg", "lines.linewidth: 9"]
    settings += ["path.sketch: 1, 100, 2", "svg.fonttype: path", "axes.formatter.use_mathtext: True"]
    (tmp_path / "matplotlibrc").write_text("\n".join(settings))
    for backend in ("module://matplotlib_inline.backend_inline", "nonsense"):
        assert drawn(tmp_path / backend.replace("/", "-"), MPLBACKEND=backend) == usual


def test_a_file_of_settings_that_is_no_text_costs_nothing(tmp_path: Path) -> None:
    usual = drawn(tmp_path / "usual")
    settings = "# größe\nfigure.dpi: 30\n".encode("latin-1")
    (tmp_path / "of-variable").write_bytes(settings)
    assert drawn(tmp_path / "variable", MATPLOTLIBRC=str(tmp_path / "of-variable")) == usual
    (tmp_path / "config/stylelib").mkdir(parents=True)
    (tmp_path / "config/stylelib/own.mplstyle").write_bytes(settings)
    assert drawn(tmp_path / "style", MPLCONFIGDIR=str(tmp_path / "config")) == usual
    # In the folder where the command runs, which matplotlib reads first.
    (tmp_path / "matplotlibrc").write_bytes(settings)
    assert drawn(tmp_path / "here") == usual


@pytest.mark.parametrize("name", ["run$_$1", "$x^{", "\\frac{", "a_b^c", "größe – 大", "<b>&amp;</b>", "{0} %s [bold]"])
def test_text_of_users_is_text(tmp_path: Path, name: str) -> None:
    row: dict[str, Any] = dict.fromkeys(POINT, "x") | dict.fromkeys(("trainer", "series"), "torch-ddp")
    row |= {"workload": f"cnn, images:{name} 3×32×32", "world_size": 1, "trial": "a"}
    losses = pd.DataFrame([row | {"images": images, "loss": 0.7 / images} for images in (1, 1000)])
    figure = figures.loss_curves(losses)
    save_png(figure, tmp_path / "loss.png")
    svg = as_svg(figure).decode()
    assert name.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in svg
    # Nor is anything of ours a formula: with formulas off its source would be shown.
    assert "math" not in svg
    assert ">0.01<" in svg


def test_a_figure_laid_out_alone_is_the_one_that_matplotlib_draws_twice() -> None:
    row: dict[str, Any] = dict.fromkeys(POINT, "x") | dict.fromkeys(("trainer", "series"), "torch-ddp")
    row |= {"workload": "cnn", "world_size": 1, "trial": "a"}
    losses = pd.DataFrame([row | {"images": images, "loss": 0.7 / images} for images in (1, 1000)])
    twice = io.BytesIO()
    with style():
        figures.loss_curves(losses).savefig(twice, format="svg", metadata={"Date": None})
    assert as_svg(figures.loss_curves(losses)) == twice.getvalue()
