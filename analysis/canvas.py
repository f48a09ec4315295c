"""Matplotlib without its user's settings: figures are drawn and saved in our style alone, and need no screen.

Everything of matplotlib's comes from here: its import looks at MPLBACKEND, and fails where that names a notebook's
backend which is not installed in this environment.
"""

import io
import os
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import chdir, contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def _without(*names: str) -> Iterator[None]:
    """Run without some variables, which are there again afterwards."""
    kept = {name: value for name in names if (value := os.environ.pop(name, None)) is not None}
    try:
        yield
    finally:
        for name in names:
            os.environ.pop(name, None)
        os.environ.update(kept)


@contextmanager
def _nobodys_settings() -> Iterator[None]:
    """Run where matplotlib finds no file of a user's: it looks into the working folder, too."""
    names = ("MPLCONFIGDIR", "MATPLOTLIBRC")
    with tempfile.TemporaryDirectory(prefix="scalestudy-matplotlib-") as empty, _without(*names), chdir(empty):
        os.environ["MPLCONFIGDIR"] = empty
        yield


with _without("MPLBACKEND"):
    try:
        import matplotlib.pyplot
    except ValueError:
        # A matplotlibrc or a user's style that is not text. Modules that were imported halfway must go.
        for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
            del sys.modules[name]
        with _nobodys_settings():
            import matplotlib.pyplot
import matplotlib as mpl  # noqa: E402

# Not asked of a matplotlibrc either; nothing here is drawn by pyplot, which seaborn imports.
mpl.use("agg")

import seaborn as sns  # noqa: E402
from matplotlib.backends.backend_svg import FigureCanvasSVG  # noqa: E402
from matplotlib.figure import Figure  # noqa: E402

__all__ = ["Figure", "as_svg", "save_png", "style"]

_STYLE: dict[Any, Any] = {
    "axes.grid": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    # A place that is given is not searched for, which took a third of the time; an offset of numbers would stand there.
    "axes.titley": 1.0,
    "axes.formatter.useoffset": False,
    "axes.labelsize": 10,
    "font.size": 10,
    "grid.color": "#e6e6e6",
    "svg.fonttype": "none",
    # The same figure twice is the same file twice.
    "svg.hashsalt": "scalestudy",
    # Text of users is text: a `$` in the name of a folder begins no formula.
    "text.parse_math": False,
}


@contextmanager
def style() -> Iterator[None]:
    """Draw, or save, as we mean it: matplotlib's defaults and our own style, whatever a matplotlibrc says."""
    with mpl.rc_context(), warnings.catch_warnings():
        mpl.rcdefaults()
        # A name in a script that the font has not: boxes in the PNG, the reader's own font in the SVG.
        warnings.filterwarnings("ignore", message="Glyph .* missing from", category=UserWarning)
        with sns.axes_style("whitegrid", rc=_STYLE), mpl.rc_context(_STYLE):
            yield


def save_png(figure: Figure, path: Path) -> None:
    """Write a figure as PNG."""
    with style():
        figure.savefig(path, format="png", dpi=110)


def as_svg(figure: Figure) -> bytes:
    """Return a figure as SVG."""
    image, layout = io.BytesIO(), figure.get_layout_engine()
    with style():
        FigureCanvasSVG(figure)
        if layout is not None:
            # Alone: `savefig` would draw the figure a second time to lay it out.
            figure.dpi = 72
            layout.execute(figure)
            figure.set_layout_engine(None)
        figure.savefig(image, format="svg", metadata={"Date": None})
        figure.set_layout_engine(layout)
    return image.getvalue()
