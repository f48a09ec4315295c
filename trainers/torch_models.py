"""Build a model spec in torch, NCHW."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from scalestudy.trainers.models import (
    BATCH_NORM_EPSILON,
    BATCH_NORM_MOMENTUM,
    Conv,
    Dense,
    Flatten,
    GlobalAveragePool,
    Layer,
    MaxPool,
    ModelSpec,
    Norm,
    Parameters,
    Relu,
    Residual,
    Shape,
    output_shape,
)


class Network(nn.Sequential):
    """The layers one after the other; torch.compile passes over a Sequential that DDP calls, for it is torch's own."""

    def forward(self, x: Tensor) -> Tensor:
        for layer in self:
            x = layer(x)
        return x


class _ResidualBlock(nn.Module):
    def __init__(self, body: nn.Module, shortcut: nn.Module) -> None:
        super().__init__()
        self.body = body
        self.shortcut = shortcut

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


def build(spec: ModelSpec) -> Network:
    """Return the network: images n × channels × size × size to logits n × classes."""
    return Network(_modules(spec.layers, spec.input_shape))


def load(network: nn.Module, values: Parameters) -> None:
    """Copy the spec's parameters into the network, every one of them."""
    parameters = named_parameters(network)
    if parameters.keys() != values.keys():
        raise ValueError(f"parameters differ: {sorted(parameters.keys() ^ values.keys())}")
    with torch.no_grad():
        for name, value in values.items():
            parameters[name].copy_(torch.from_numpy(value))


def named_parameters(network: nn.Module) -> dict[str, nn.Parameter]:
    """Return the network's parameters by the spec's names: a layer's own, not the path it is nested under."""
    return {
        ".".join(path.split(".")[-2:]).replace("/", "."): parameter for path, parameter in network.named_parameters()
    }


def _modules(layers: tuple[Layer, ...], shape: Shape) -> OrderedDict[str, nn.Module]:
    modules: OrderedDict[str, nn.Module] = OrderedDict()
    for index, layer in enumerate(layers):
        # torch allows no '.' in a module's name, the spec's names have them.
        modules[getattr(layer, "name", str(index)).replace(".", "/")] = _module(layer, shape)
        shape = output_shape(layer, shape)
    return modules


def _module(layer: Layer, shape: Shape) -> nn.Module:
    match layer:
        case Conv():
            return nn.Conv2d(shape[0], layer.out, layer.kernel, layer.stride, layer.padding, bias=layer.bias)
        case Norm():
            return nn.BatchNorm2d(shape[0], eps=BATCH_NORM_EPSILON, momentum=BATCH_NORM_MOMENTUM)
        case Relu():
            return nn.ReLU(inplace=True)
        case MaxPool():
            return nn.MaxPool2d(layer.kernel, layer.stride, layer.padding)
        case GlobalAveragePool():
            return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        case Flatten():
            return nn.Flatten()
        case Dense():
            return nn.Linear(shape[0], layer.out)
        case Residual():
            body, shortcut = (nn.Sequential(_modules(part, shape)) for part in (layer.body, layer.shortcut))
            return _ResidualBlock(body, shortcut)
