"""What pyproject.toml allows at the least is what `make lowest` installs, and runs."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
# Of the extra `test` what runs tests; `tensorflow` is `tensorflow-cpu` with CUDA.
RUN = [*PROJECT["dependencies"], *EXTRAS["torch"], *EXTRAS["tensorflow-cpu"], *EXTRAS["ray"]] + [
    line for line in EXTRAS["test"] if line.startswith(("pytest", "hypothesis"))
]


def lower_bound(line: str) -> Version:
    [bound] = [part.version for part in Requirement(line).specifier if part.operator == ">="]
    return Version(bound)


def pins(name: str) -> dict[str, Version]:
    """Return the versions that a file of constraints names, by a distribution's name as its users write it."""
    lines = (ROOT / name).read_text(encoding="utf-8").splitlines()
    named = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): Version(version) for name, version in named}


@pytest.mark.parametrize("line", RUN)
def test_every_lower_bound_is_what_is_run(line: str) -> None:
    name = Requirement(line).name
    if name == "torch":
        # PyPI has its lowest for CUDA alone.
        assert pins("constraints-lowest.txt")[name] == pins("constraints.txt")[name]
    else:
        assert pins("constraints-lowest.txt")[name] == lower_bound(line)


def test_both_builds_of_tensorflow_have_one_lower_bound() -> None:
    assert [*map(lower_bound, EXTRAS["tensorflow"])] == [*map(lower_bound, EXTRAS["tensorflow-cpu"])]
