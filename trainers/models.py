"""What every model is, in no framework's terms: a short list of layers, their parameters and first values.

`torch_models.py` and `keras_models.py` build the same network from it. Parameters are named and laid out as
torchvision does (convolutions out×in×h×w, dense out×in), so that replicas and frameworks compare.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from scalestudy.trainers.trial import Data

BATCH_NORM_EPSILON = 1e-5
BATCH_NORM_MOMENTUM = 0.1  # the weight of the new batch; Keras names the other one, 0.9

Parameters = dict[str, NDArray[np.float32]]


@dataclass(frozen=True, kw_only=True)
class Conv:
    """Square convolution, padded by `padding` zeros on every side."""

    name: str
    out: int
    kernel: int
    stride: int = 1
    padding: int = 0
    bias: bool = False


@dataclass(frozen=True, kw_only=True)
class Norm:
    """Batch normalization over the channel."""

    name: str


@dataclass(frozen=True, kw_only=True)
class Relu:
    """max(x, 0)."""


@dataclass(frozen=True, kw_only=True)
class MaxPool:
    """Maximum over a square, padded on every side by what never wins."""

    kernel: int
    stride: int
    padding: int = 0


@dataclass(frozen=True, kw_only=True)
class GlobalAveragePool:
    """Mean over height and width."""


@dataclass(frozen=True, kw_only=True)
class Flatten:
    """All features of an image in one row, channel by channel."""


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Fully connected layer with a bias."""

    name: str
    out: int


@dataclass(frozen=True, kw_only=True)
class Residual:
    """ReLU of body plus shortcut; an empty shortcut is the identity."""

    name: str
    body: "tuple[Layer, ...]"
    shortcut: "tuple[Layer, ...]" = ()


Layer = Conv | Norm | Relu | MaxPool | GlobalAveragePool | Flatten | Dense | Residual
Shape = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model for inputs of `channels` × `image_size` × `image_size`, ending in one logit a class."""

    name: str
    channels: int
    image_size: int
    classes: int
    layers: tuple[Layer, ...]

    @property
    def input_shape(self) -> Shape:
        """One image: channels, height, width."""
        return (self.channels, self.image_size, self.image_size)


def model_spec(name: str, data: Data) -> ModelSpec:
    """Return the named model's spec for such data; raises ValueError where the images are too small for it."""
    layers = _cnn(data.classes) if name == "cnn" else _resnet(*_RESNETS[name], data.classes)
    spec = ModelSpec(name=name, channels=data.channels, image_size=data.image_size, classes=data.classes, layers=layers)
    parameter_shapes(spec)
    return spec


def parameter_shapes(spec: ModelSpec) -> dict[str, Shape]:
    """Return every trainable parameter's shape by its name, in the order of the layers."""
    return dict(_shapes(spec.layers, spec.input_shape))


def parameter_count(spec: ModelSpec) -> int:
    """Return the number of trainable values."""
    return sum(math.prod(shape) for shape in parameter_shapes(spec).values())


def initial_parameters(spec: ModelSpec, seed: int) -> Parameters:
    """Return first values, the same for every framework and rank.

    Convolutions: He et al. 2015, normal with variance 2 / fan-out (as torchvision's ResNets); dense: uniform
    within 1 / sqrt(fan-in) (as torch.nn.Linear); biases zero; norms one and zero.
    """
    rng = np.random.default_rng(seed)
    values: Parameters = {}
    for name, shape in parameter_shapes(spec).items():
        if len(shape) == 4:
            deviation = math.sqrt(2 / (shape[0] * shape[2] * shape[3]))
            values[name] = deviation * rng.standard_normal(shape, dtype=np.float32)
        elif len(shape) == 2:
            bound = 1 / math.sqrt(shape[1])
            values[name] = ((2 * rng.random(shape, dtype=np.float32) - 1) * bound).astype(np.float32)
        else:
            norm_weight = name.endswith(".weight")
            values[name] = np.full(shape, 1.0 if norm_weight else 0.0, dtype=np.float32)
    return values


def output_shape(layer: Layer, shape: Shape) -> Shape:
    """Return the shape (channels, height, width) or (features,) that leaves a layer."""
    match layer:
        case Conv():
            return (layer.out, *_slid(shape, layer))
        case MaxPool():
            return (shape[0], *_slid(shape, layer))
        case GlobalAveragePool():
            return shape[:1]
        case Flatten():
            return (math.prod(shape),)
        case Dense():
            return (layer.out,)
        case Residual():
            for inner in layer.body:
                shape = output_shape(inner, shape)
            return shape
        case Norm() | Relu():
            return shape


def _shapes(layers: tuple[Layer, ...], shape: Shape) -> Iterator[tuple[str, Shape]]:
    for layer in layers:
        match layer:
            case Conv():
                yield f"{layer.name}.weight", (layer.out, shape[0], layer.kernel, layer.kernel)
                if layer.bias:
                    yield f"{layer.name}.bias", (layer.out,)
            case Norm():
                yield f"{layer.name}.weight", (shape[0],)
                yield f"{layer.name}.bias", (shape[0],)
            case Dense():
                yield f"{layer.name}.weight", (layer.out, shape[0])
                yield f"{layer.name}.bias", (layer.out,)
            case Residual():
                yield from _shapes(layer.body, shape)
                yield from _shapes(layer.shortcut, shape)
        shape = output_shape(layer, shape)


def _slid(shape: Shape, layer: Conv | MaxPool) -> Shape:
    """Return height and width after a kernel slid over the padded image."""
    sides = tuple((side + 2 * layer.padding - layer.kernel) // layer.stride + 1 for side in shape[1:])
    if min(sides) < 1:
        raise ValueError(
            f"the image is too small: a {layer.kernel}×{layer.kernel} kernel meets {shape[1]}×{shape[2]} values"
        )
    return sides


def _cnn(classes: int) -> tuple[Layer, ...]:
    """LeNet-5-like (LeCun et al. 1998), with ReLU and maximum pooling."""
    return (
        Conv(name="conv1", out=6, kernel=5, bias=True),
        Relu(),
        MaxPool(kernel=2, stride=2),
        Conv(name="conv2", out=16, kernel=5, bias=True),
        Relu(),
        MaxPool(kernel=2, stride=2),
        Flatten(),
        Dense(name="fc1", out=120),
        Relu(),
        Dense(name="fc2", out=84),
        Relu(),
        Dense(name="fc3", out=classes),
    )


def _resnet(block: Literal["basic", "bottleneck"], depths: tuple[int, ...], classes: int) -> tuple[Layer, ...]:
    """He et al. 2016, v1.5: a stage's stride sits in its first 3×3 convolution."""
    layers: list[Layer] = [
        Conv(name="conv1", out=64, kernel=7, stride=2, padding=3),
        Norm(name="bn1"),
        Relu(),
        MaxPool(kernel=3, stride=2, padding=1),
    ]
    entering = 64
    for stage, depth in enumerate(depths):
        width = 64 * 2**stage
        leaving = width if block == "basic" else 4 * width
        for index in range(depth):
            name = f"layer{stage + 1}.{index}"
            stride = 2 if index == 0 and stage > 0 else 1
            body = _basic(name, width, stride) if block == "basic" else _bottleneck(name, width, stride)
            shortcut: tuple[Layer, ...] = ()
            if stride != 1 or entering != leaving:
                shortcut = (
                    Conv(name=f"{name}.downsample.0", out=leaving, kernel=1, stride=stride),
                    Norm(name=f"{name}.downsample.1"),
                )
            layers.append(Residual(name=name, body=body, shortcut=shortcut))
            entering = leaving
    return (*layers, GlobalAveragePool(), Dense(name="fc", out=classes))


def _basic(name: str, width: int, stride: int) -> tuple[Layer, ...]:
    return (
        Conv(name=f"{name}.conv1", out=width, kernel=3, stride=stride, padding=1),
        Norm(name=f"{name}.bn1"),
        Relu(),
        Conv(name=f"{name}.conv2", out=width, kernel=3, padding=1),
        Norm(name=f"{name}.bn2"),
    )


def _bottleneck(name: str, width: int, stride: int) -> tuple[Layer, ...]:
    return (
        Conv(name=f"{name}.conv1", out=width, kernel=1),
        Norm(name=f"{name}.bn1"),
        Relu(),
        Conv(name=f"{name}.conv2", out=width, kernel=3, stride=stride, padding=1),
        Norm(name=f"{name}.bn2"),
        Relu(),
        Conv(name=f"{name}.conv3", out=4 * width, kernel=1),
        Norm(name=f"{name}.bn3"),
    )


_RESNETS: dict[str, tuple[Literal["basic", "bottleneck"], tuple[int, ...]]] = {
    "resnet18": ("basic", (2, 2, 2, 2)),
    "resnet34": ("basic", (3, 4, 6, 3)),
    "resnet50": ("bottleneck", (3, 4, 6, 3)),
    "resnet101": ("bottleneck", (3, 4, 23, 3)),
    "resnet152": ("bottleneck", (3, 8, 36, 3)),
}

MODELS = ("cnn", *_RESNETS)
