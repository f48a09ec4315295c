"""What TensorFlow's usual execution leaves unused: XLA, and a fused batch normalization.

Usage: python benchmarks/keras_ways.py [ROUNDS]

Ratio = images/s of the way / images/s of `graph`, as scalestudy runs TensorFlow unless a study says otherwise. All ways
train the same network from the same parameters on the same batch, on one CPU of one process, in windows of half a
second that take turns. `graph again` is a second, equal graph: what the machine makes of two equal things. Medians over
rounds with their 95 % bootstrap intervals. Raises SystemExit where a way has another first loss than `graph`.
"""

import os
import sys
import time
from collections.abc import Callable
from typing import Any, cast

import keras
import numpy as np
import tensorflow as tf
from harness_tax import WINDOW_S, with_interval
from ranks import trial_of

from scalestudy.cluster.host import usable_cpus
from scalestudy.trainers import keras_models
from scalestudy.trainers.measure import steps_for
from scalestudy.trainers.models import initial_parameters, model_spec
from scalestudy.trainers.tf_data import resident_batch
from scalestudy.trainers.trial import Data, Trial

CASES = (
    ("resnet18", Data(source="synthetic", channels=3, image_size=32, classes=10), 4),
    ("resnet18", Data(source="synthetic", channels=3, image_size=64, classes=10), 16),
)


class FusedBatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """The layer on TensorFlow's one kernel for a batch's moments and its normalization; for training alone."""

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        outputs, mean, variance, *_ = tf.compat.v1.nn.fused_batch_norm(
            inputs, self.gamma.value, self.beta.value, epsilon=self.epsilon, is_training=True
        )
        for moving, now in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving.value * self.momentum + now * (1 - self.momentum))
        return outputs


def step_of(
    trial: Trial, images: Any, labels: Any, *, compiled: bool = False, fused: bool = False
) -> Callable[[], Any]:
    """Return a step of a network of its own, traced at the first call; it returns the loss."""
    usual = keras.layers.BatchNormalization
    keras.layers.BatchNormalization = FusedBatchNormalization if fused else usual
    try:
        model = keras_models.build(spec := model_spec(trial.model, trial.data))
    finally:
        keras.layers.BatchNormalization = usual
    keras_models.load(model, initial_parameters(spec, trial.seed))
    optimizer = keras.optimizers.SGD(trial.optimizer.learning_rate, momentum=trial.optimizer.momentum)
    optimizer.build(model.trainable_variables)

    def backpropagate(images: Any, labels: Any) -> tuple[Any, list[Any]]:
        with tf.GradientTape() as tape:
            logits = model(images, training=True)
            loss = tf.reduce_mean(tf.nn.sparse_softmax_cross_entropy_with_logits(labels, logits))
        return loss, tape.gradient(loss, [variable.value for variable in model.trainable_variables])

    passes = tf.function(backpropagate, jit_compile=True) if compiled else backpropagate

    @tf.function
    def step() -> Any:
        loss, gradients = passes(images, labels)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    return cast(Callable[[], Any], step)


def seconds(step: Callable[[], Any], steps: int) -> float:
    """Time so many steps, the last one's loss included."""
    begun_s = time.perf_counter()
    for _ in range(steps):
        loss = step()
    float(loss)
    return time.perf_counter() - begun_s


def main() -> None:
    """Print a row a case."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    os.sched_setaffinity(0, sorted(usable_cpus())[:1])
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    print("| model, image, batch | compiled / graph | fused / graph | graph again / graph |")
    print("| --- | --- | --- | --- |")
    for model, data, batch in CASES:
        trial = trial_of("tf-multiworker", model, data, batch, 1)
        images, labels = resident_batch(trial, 0)
        ways = {
            "graph": step_of(trial, images, labels),
            "compiled": step_of(trial, images, labels, compiled=True),
            "fused": step_of(trial, images, labels, fused=True),
            "again": step_of(trial, images, labels),
        }
        first = {name: float(step()) for name, step in ways.items()}
        if not np.allclose(list(first.values()), first["graph"], rtol=1e-4):
            raise SystemExit(f"not the same network: first losses {first}")
        steps = steps_for(WINDOW_S, seconds(ways["graph"], 5) / 5)
        rounds: list[dict[str, float]] = []
        for index in range(count + 1):
            names = list(ways)[index % len(ways) :] + list(ways)[: index % len(ways)]
            rounds.append({name: seconds(ways[name], steps) for name in names})
        cells = [with_interval([took["graph"] / took[name] for took in rounds[1:]]) for name in list(ways)[1:]]
        print(f"| {model}, {data.image_size}, {batch} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
