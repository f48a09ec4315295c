"""What benchmarks/gpu.py measures: its cases, in the order of what is worth most."""

from typing import Any, Literal

from ranks import trial_of

from scalestudy.cluster.frozen import Frozen
from scalestudy.cluster.host import usable_cpus
from scalestudy.trainers.trial import Data, Execution, Precision, Trial

Kind = Literal["roofline", "train", "worker", "telemetry", "batch_auto", "checks"]
MODELS = ("resnet50", "resnet18", "resnet152", "cnn")
# Compiled last: of resnet152 that takes minutes.
EXECUTIONS: tuple[Execution, ...] = ("eager", "graph", "compiled")
PRECISIONS: tuple[Precision, ...] = ("bf16", "fp32", "tf32", "fp16")
# Image size and batch per device, as each model is trained.
_SIZES = {"cnn": (32, 1024), "resnet18": (224, 256), "resnet50": (224, 128), "resnet152": (224, 64)}
# In a dry run an image is as small as the model takes.
_DRY_SIZE = (32, 2)
# The seconds below which a case is not begun, and those after which it is ended.
_LEAST_S = {"roofline": 15, "train": 25, "worker": 30, "telemetry": 30, "batch_auto": 60, "checks": 30}
_LIMIT_S = {"roofline": 60, "train": 90, "worker": 120, "telemetry": 75, "batch_auto": 240, "checks": 120}
_LEAST_COMPILED_S, _LIMIT_COMPILED_S = 75, 300


class NoTimeError(Exception):
    """The time was over before there was an answer: what is known until then counts."""


class Case(Frozen):
    """One thing to measure, in a process of its own; a `dry_run` walks it on a CPU, and its figures say nothing."""

    kind: Kind
    model: str = "resnet50"
    precision: Precision = "bf16"
    execution: Execution = "eager"
    ranks: int = 1
    dry_run: bool = False

    @property
    def name(self) -> str:
        match self.kind:
            case "train":
                return f"train {self.model} {self.execution} {self.precision}"
            case "worker":
                return "two ranks on one GPU, gloo" if self.ranks > 1 else "one rank, NCCL"
            case "batch_auto":
                return "batch: auto"
            case _:
                return self.kind

    @property
    def device(self) -> Literal["cpu", "gpu"]:
        return "cpu" if self.dry_run else "gpu"

    @property
    def least_s(self) -> float:
        if self.dry_run:
            return 5
        return _LEAST_COMPILED_S if self.execution == "compiled" else _LEAST_S[self.kind]

    @property
    def limit_s(self) -> float:
        return _LIMIT_COMPILED_S if self.execution == "compiled" else _LIMIT_S[self.kind]

    def data(self) -> Data:
        channels, classes = (1, 10) if self.model == "cnn" else (3, 1000)
        size, _ = _DRY_SIZE if self.dry_run else _SIZES[self.model]
        return Data(source="synthetic", channels=channels, image_size=size, classes=classes)

    def trial(self, **changes: Any) -> Trial:
        """Return the trial of the case's ranks, all on one device."""
        _, batch = _DRY_SIZE if self.dry_run else _SIZES[self.model]
        fields: dict[str, Any] = {
            "device": self.device,
            "precision": self.precision,
            "execution": self.execution,
            # As many at both world sizes.
            "threads_per_device": max(1, len(usable_cpus()) // 2),
        }
        return trial_of("torch-ddp", self.model, self.data(), batch, self.ranks, **(fields | changes))


def plan(dry_run: bool) -> list[Case]:
    """Return every case: first what a short budget must still give, then the rest of models, ways and formats."""
    model = "cnn" if dry_run else "resnet50"
    first: list[dict[str, Any]] = [
        {"kind": "roofline"},
        {"kind": "train"},
        {"kind": "worker", "model": model},
        {"kind": "worker", "model": model, "ranks": 2},
        {"kind": "telemetry", "model": model},
        {"kind": "train", "execution": "compiled"},
        {"kind": "train", "execution": "graph"},
        {"kind": "checks"},
        {"kind": "batch_auto", "model": model},
    ]
    rest: list[dict[str, Any]] = [
        {"kind": "train", "model": model, "precision": precision, "execution": execution}
        for execution in EXECUTIONS
        for precision in PRECISIONS
        for model in MODELS
    ]
    cases = [Case.model_validate({**fields, "dry_run": dry_run}) for fields in first + rest]
    return list(dict.fromkeys(cases))
