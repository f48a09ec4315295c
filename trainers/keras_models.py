"""Build a model spec in Keras 3, NHWC (TensorFlow's convolutions have no NCHW on CPU), whatever a keras.json says."""

import keras
import numpy as np

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
)

_NHWC = "channels_last"


def build(spec: ModelSpec) -> keras.Model:
    """Return the network: images n × size × size × channels to logits n × classes."""
    inputs = keras.Input((spec.image_size, spec.image_size, spec.channels))
    return keras.Model(inputs, _apply(spec.layers, inputs), name=spec.name)


def load(network: keras.Model, values: Parameters) -> None:
    """Assign the spec's parameters to the network, every one of them."""
    variables = named_variables(network)
    if variables.keys() != values.keys():
        raise ValueError(f"parameters differ: {sorted(variables.keys() ^ values.keys())}")
    for name, value in values.items():
        variables[name].assign(to_keras_layout(value))


def named_variables(network: keras.Model) -> dict[str, keras.Variable]:
    """Return the trainable variables by the spec's names, in the spec's order of a layer's parameters."""
    suffix = {"kernel": "weight", "gamma": "weight", "bias": "bias", "beta": "bias"}
    return {
        f"{layer.name}.{suffix[variable.name]}": variable
        for layer in network.layers
        for variable in layer.trainable_variables
    }


def to_keras_layout(value: np.ndarray) -> np.ndarray:
    """Turn out×in×h×w into h×w×in×out and out×in into in×out."""
    return value.transpose({4: (2, 3, 1, 0)}.get(value.ndim))


def to_spec_layout(value: np.ndarray) -> np.ndarray:
    """Undo `to_keras_layout`."""
    return value.transpose({4: (3, 2, 0, 1)}.get(value.ndim))


def _apply(layers: tuple[Layer, ...], x: keras.KerasTensor) -> keras.KerasTensor:
    for layer in layers:
        x = _layer(layer, x)
    return x


def _layer(layer: Layer, x: keras.KerasTensor) -> keras.KerasTensor:
    match layer:
        case Conv():
            if layer.padding:
                # Keras' padding="same" is asymmetric under a stride.
                x = keras.layers.ZeroPadding2D(layer.padding, _NHWC)(x)
            return keras.layers.Conv2D(
                layer.out, layer.kernel, layer.stride, data_format=_NHWC, use_bias=layer.bias, name=layer.name
            )(x)
        case Norm():
            return keras.layers.BatchNormalization(
                momentum=1 - BATCH_NORM_MOMENTUM, epsilon=BATCH_NORM_EPSILON, name=layer.name
            )(x)
        case Relu():
            return keras.layers.ReLU()(x)
        case MaxPool():
            if layer.padding:
                # Zeros never win here: every maximum pool with padding follows a ReLU.
                x = keras.layers.ZeroPadding2D(layer.padding, _NHWC)(x)
            return keras.layers.MaxPooling2D(layer.kernel, layer.stride, data_format=_NHWC)(x)
        case GlobalAveragePool():
            return keras.layers.GlobalAveragePooling2D(_NHWC)(x)
        case Flatten():
            # The spec flattens channel by channel; NHWC would mix them.
            return keras.layers.Flatten(_NHWC)(keras.layers.Permute((3, 1, 2))(x))
        case Dense():
            return keras.layers.Dense(layer.out, name=layer.name)(x)
        case Residual():
            return keras.layers.ReLU()(keras.layers.Add()([_apply(layer.body, x), _apply(layer.shortcut, x)]))
