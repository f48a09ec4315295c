"""A trial: one point of a study and a repeat number, and the id that names it everywhere.

Schema history: 1 = first.
"""

import hashlib
import math
from typing import Any, Literal

from pydantic import Field

from scalestudy.cluster.frozen import Frozen, Given
from scalestudy.trainers.options import Options

Scaling = Literal["weak", "strong"]
Device = Literal["cpu", "gpu"]
# tf32: fp32 whose matrix products and convolutions round their inputs to 10 bits of mantissa. bf16, fp16: mixed, with
# parameters in fp32; fp16 scales its loss.
Precision = Literal["fp32", "tf32", "bf16", "fp16"]
# torch: eagerly, as a CUDA graph, by torch.compile. TensorFlow: eagerly, as tf.function, as tf.function with XLA.
Execution = Literal["eager", "graph", "compiled"]
Source = Literal["synthetic", "synthetic-host", "digits", "images", "mnist"]

# Seconds after the first step in which a step may still become faster or slower (benchmarks/README.md, the warm-up).
_WARM_UP_MIN_S: dict[Device, float] = {"cpu": 2.0, "gpu": 10.0}

# Adam's constants (Kingma & Ba 2015), the same in every framework; Keras' own epsilon would be 1e-7.
ADAM_BETAS = (0.9, 0.999)
ADAM_EPSILON = 1e-8


class Data(Frozen):
    """What the images are: a source, the folder of `images` and `mnist`, and the shape the model sees."""

    source: Source
    folder: str | None = None
    channels: int
    image_size: int
    classes: int

    @property
    def name(self) -> str:
        """The source as a study file writes it."""
        return self.source if self.folder is None else f"{self.source}:{self.folder}"

    @property
    def real(self) -> bool:
        """Whether there is something to learn, so that the loss must fall."""
        return self.source in ("digits", "images", "mnist")

    @property
    def has_test(self) -> bool:
        """Whether a part of the images is held out for a test."""
        return self.source in ("digits", "mnist")


class Optimizer(Given):
    """SGD with momentum or Adam, with the same arithmetic in every framework."""

    name: Literal["sgd", "adam"] = "sgd"
    learning_rate: float = Field(default=0.01, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)


class Measurement(Given):
    """How long to measure: windows of at least `window_s` after a warm-up that was seen to end."""

    window_s: float = Field(default=0.5, gt=0)
    windows: int = Field(default=10, ge=1, le=1_000_000)
    # None: as long as the device's kind takes, see `Trial.warm_up_min_s`.
    warm_up_min_s: float | None = Field(default=None, ge=0)
    warm_up_max_s: float = Field(default=30.0, ge=0)
    measure_max_s: float = Field(default=300.0, gt=0)
    deadline_s: float = Field(default=1800.0, gt=0)
    # The time for each part that tells where the time goes, in windows: whole, resident, local, exchange; 0 for none.
    cause_windows: int = Field(default=4, ge=0, le=10_000)
    # Samples of every node's devices in a second; 0 for none. Past 100 the sampler would be felt.
    telemetry_hz: float = Field(default=10.0, ge=0, le=100)


class Sweep(Frozen):
    """All-reduces of float32 messages instead of training, in the manner of nccl-tests: which sizes, how long each."""

    smallest_bytes: int = Field(default=2**10, ge=4, multiple_of=4)
    largest_bytes: int = Field(default=2**30, ge=4)
    factor: int = Field(default=2, ge=2)
    window_s: float = Field(default=0.05, gt=0)
    windows: int = Field(default=5, ge=1)


class Trial(Frozen):
    """One value of each thing a study varies; batches count images."""

    schema_version: Literal[1] = Field(default=1, alias="schema")
    trainer: str
    model: str
    data: Data
    scaling: Scaling
    world_size: int = Field(ge=1)
    devices_per_node: int = Field(ge=1)
    device: Device
    per_device_batch: int = Field(ge=1)
    precision: Precision = "fp32"
    execution: Execution
    options: Options
    optimizer: Optimizer
    measurement: Measurement
    threads_per_device: int = Field(ge=1)
    # Whether a rank takes both hardware threads of its cores: the cores are too few for a thread on each.
    hyper_threads: bool = False
    loader_workers: int = Field(default=0, ge=0)
    seed: int
    repeat: int = Field(ge=0)
    # Whether a trial that uses fewer devices of a node than there are takes others in every repeat.
    rotate_devices: bool = True
    sweep: Sweep | None = None

    @property
    def global_batch(self) -> int:
        """Images in one step over all devices."""
        return self.per_device_batch * self.world_size

    @property
    def nodes(self) -> int:
        """Nodes it takes: each holds `devices_per_node` of its devices, the last one what is left."""
        return math.ceil(self.world_size / self.devices_per_node)

    @property
    def warm_up_min_s(self) -> float:
        """How long the warm-up lasts however steady it seems."""
        given = self.measurement.warm_up_min_s
        return _WARM_UP_MIN_S[self.device] if given is None else given

    @property
    def id(self) -> str:
        """Twelve hex digits of the SHA-256 of all fields: the same trial has the same id in every run."""
        # Later fields are left out at their defaults: a trial keeps the name it had before there were such fields.
        fields = type(self).model_fields
        later = ("sweep", "hyper_threads", "rotate_devices")
        unsaid: dict[str, Any] = {name: True for name in later if getattr(self, name) == fields[name].default}
        if self.measurement.warm_up_min_s is None:
            unsaid["measurement"] = {"warm_up_min_s"}
        return hashlib.sha256(self.model_dump_json(by_alias=True, exclude=unsaid).encode()).hexdigest()[:12]

    @property
    def folder_name(self) -> str:
        """The trial's folder, readable by people and unique by its id."""
        return f"{self.model}-{self.trainer}-w{self.world_size}-r{self.repeat}-{self.id}"
