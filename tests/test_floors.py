"""The architecture, held by reading every import."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOORS = {
    "cluster": {"cluster"},
    "trainers": {"trainers", "cluster"},
    "analysis": {"analysis", "trainers", "cluster"},
    "launch": {"launch", "analysis", "trainers", "cluster"},
}
FRAMEWORKS = {"torch", "tensorflow", "keras", "horovod"}
WITH_A_FRAMEWORK = {
    *("torch_trainer", "torch_ddp", "torch_data", "torch_models"),
    *("tf_trainer", "tf_distribute", "tf_data", "keras_models"),
    *("horovod_rendezvous", "horovod_torch", "horovod_tf"),
}
MODULES = sorted(path for floor in FLOORS for path in (ROOT / floor).glob("*.py"))


def imports(path: Path) -> set[str]:
    tree = ast.walk(ast.parse(path.read_text()))
    found = set()
    for node in tree:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_imports_go_down_only(path: Path) -> None:
    ours = {name.split(".")[1] for name in imports(path) if name.startswith("scalestudy.")}
    assert ours <= FLOORS[path.parent.name]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_only_a_trainer_imports_its_framework(path: Path) -> None:
    frameworks = {name.split(".")[0] for name in imports(path)} & FRAMEWORKS
    ours = {name.split(".")[2] for name in imports(path) if name.startswith("scalestudy.trainers.")}
    if path.stem not in WITH_A_FRAMEWORK:
        assert not frameworks
        assert not ours & WITH_A_FRAMEWORK


def test_no_import_runs_in_a_circle() -> None:
    graph = {
        f"scalestudy.{path.parent.name}.{path.stem}": {
            name
            for found in imports(path)
            for name in (found, found.rpartition(".")[0])
            if name.startswith("scalestudy.") and name.count(".") == 2
        }
        for path in MODULES
    }
    while leaves := {name for name, needed in graph.items() if not needed & graph.keys()}:
        graph = {name: needed - leaves for name, needed in graph.items() if name not in leaves}
    assert not graph, f"circle among {sorted(graph)}"


def test_a_report_asks_no_device() -> None:
    """Importing all of the analysis must not load NVIDIA's library, nor the package that asks it."""
    names = [f"scalestudy.analysis.{path.stem}" for path in (ROOT / "analysis").glob("*.py") if path.stem != "__init__"]
    code = f"import sys, {', '.join(names)}; sys.exit('pynvml' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_every_module_is_named_for_what_it_holds() -> None:
    assert not {path.stem for path in MODULES} & {"utils", "helpers", "common", "base", "manager"}
