"""What the harness costs: steps through our trainer and loop against a loop written by hand, interleaved in one run.

Usage: python benchmarks/harness_tax.py [ROUNDS [TRAINER…]]

Ratio = throughput through the harness / throughput of the bare loop; 1 means that the harness costs nothing. They train
the same model on the same resident batch in the same processes, in windows of half a second that take turns. A second
bare loop beside the first shows what the machine's noise alone makes of two equal things. Medians over rounds,
with their 95 % bootstrap intervals.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ranks import run_ranks, trial_of
from scipy.stats import bootstrap

from scalestudy.cluster.rank import Rank
from scalestudy.trainers.measure import steps_for, timed_window
from scalestudy.trainers.models import initial_parameters, model_spec
from scalestudy.trainers.pinning import take_place
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Trial

WINDOW_S = 0.5
CASES = (
    ("cnn", Data(source="synthetic", channels=1, image_size=32, classes=10), 256),
    ("resnet18", Data(source="synthetic", channels=3, image_size=64, classes=10), 16),
)


def bare_torch(trial: Trial, images: Any, labels: Any) -> Callable[[int], None]:
    """Return a loop as a torch user writes it."""
    import torch
    from torch.nn.parallel import DistributedDataParallel

    from scalestudy.trainers import torch_models

    network = torch_models.build(spec := model_spec(trial.model, trial.data))
    torch_models.load(network, initial_parameters(spec, trial.seed))
    criterion = torch.nn.CrossEntropyLoss()
    optimizer: Any = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    model: torch.nn.Module = network
    if trial.trainer == "torch-ddp":
        model = DistributedDataParallel(network)
    else:
        import horovod.torch as hvd

        optimizer = hvd.DistributedOptimizer(optimizer, named_parameters=network.named_parameters())

    def loop(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            loss = criterion(model(images), labels)
            loss.backward()
            optimizer.step()

    return loop


def bare_horovod_tensorflow(trial: Trial, images: Any, labels: Any) -> Callable[[int], None]:
    """Return a loop as Horovod's documentation has it for TensorFlow, but for what Keras 3 does not take."""
    import horovod.tensorflow as hvd
    import keras
    import tensorflow as tf

    from scalestudy.trainers import keras_models

    model = keras_models.build(spec := model_spec(trial.model, trial.data))
    keras_models.load(model, initial_parameters(spec, trial.seed))
    optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
    optimizer.build(model.trainable_variables)
    criterion = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    variables = [variable.value for variable in model.trainable_variables]

    @tf.function
    def step() -> Any:
        with tf.GradientTape() as tape:
            loss = criterion(labels, model(images, training=True))
        tape = hvd.DistributedGradientTape(tape)
        optimizer.apply_gradients(zip(tape.gradient(loss, variables), model.trainable_variables, strict=True))
        return loss

    def loop(steps: int) -> None:
        for _ in range(steps):
            step()

    return loop


def bare_tensorflow(trial: Trial, strategy: Any, images: Any, labels: Any) -> Callable[[int], None]:
    """Return a loop as a user of tf.distribute writes it."""
    import keras
    import tensorflow as tf

    from scalestudy.trainers import keras_models

    with strategy.scope():
        model = keras_models.build(spec := model_spec(trial.model, trial.data))
        keras_models.load(model, initial_parameters(spec, trial.seed))
        optimizer = keras.optimizers.SGD(0.01, momentum=0.9)
        optimizer.build(model.trainable_variables)
        criterion = keras.losses.SparseCategoricalCrossentropy(from_logits=True, reduction="sum")

    def train(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = criterion(labels, model(images, training=True)) / trial.global_batch
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True))
        return loss

    @tf.function
    def step() -> Any:
        return strategy.run(train, args=(images, labels))

    def loop(steps: int) -> None:
        for _ in range(steps):
            step()

    return loop


def rank_main(folder: Path, count: int) -> None:
    """Take the windows of one rank in turn, and write every round's seconds."""
    trial = Trial.model_validate_json((folder / "trial.json").read_bytes())
    rank = Rank.from_environ(os.environ)
    take_place(trial, rank, os.environ, folder)
    trainer: Any = TRAINERS[trial.trainer].load()(trial, rank)
    trainer.build()
    if trial.trainer in ("torch-ddp", "horovod-torch"):
        first, second = (bare_torch(trial, *next(trainer._batches)) for _ in range(2))
    elif trial.trainer == "horovod-tf":
        from scalestudy.trainers.tf_data import resident_batch

        first, second = (bare_horovod_tensorflow(trial, *resident_batch(trial, rank.rank)) for _ in range(2))
    else:
        first, second = (bare_tensorflow(trial, trainer._strategy, *trainer._resident_batch()) for _ in range(2))

    def harness(steps: int) -> float:
        window = timed_window(trainer, steps)
        return float(trainer.max_over_ranks(window.end_s - window.start_s))

    def bare(loop: Callable[[int], None]) -> Callable[[int], float]:
        def timed(steps: int) -> float:
            begun_s = time.perf_counter()
            loop(steps)
            return float(trainer.max_over_ranks(time.perf_counter() - begun_s))

        return timed

    contestants = [harness, bare(first), bare(second)]
    for contestant in contestants:
        contestant(3)
    steps = steps_for(WINDOW_S, max(contestant(5) for contestant in contestants) / 5)
    rounds: list[list[float]] = []
    for index in range(count + 3):
        took_s = [0.0, 0.0, 0.0]
        for place in range(3):
            # Everyone goes first as often as last.
            who = (index + place) % 3
            took_s[who] = contestants[who](steps)
        rounds.append(took_s)
    if rank.rank == 0:
        (folder / "rounds.json").write_text(json.dumps(rounds[3:]))
    trainer.close()
    sys.stdout.flush()
    os._exit(0)


def main() -> None:
    """Print a row a case."""
    if sys.argv[1:2] == ["--rank"]:
        rank_main(Path(sys.argv[2]), int(sys.argv[3]))
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 30
    print("| trainer | model, batch | ranks | harness / bare | bare / bare again |")
    print("| --- | --- | --- | --- | --- |")
    for model, data, batch in CASES:
        for trainer in sys.argv[2:] or ("torch-ddp", "tf-multiworker", "horovod-torch", "horovod-tf"):
            for world_size in (1, 2):
                rounds = run_ranks(__file__, trial_of(trainer, model, data, batch, world_size), count)
                tax = with_interval([(bare + again) / 2 / harness for harness, bare, again in rounds])
                noise = with_interval([bare / again for _, bare, again in rounds])
                print(f"| {trainer} | {model}, {batch} | {world_size} | {tax} | {noise} |", flush=True)


def with_interval(ratios: list[float], digits: int = 3) -> str:
    """Return the median with its bootstrap 95 % interval."""
    interval = bootstrap((ratios,), np.median, method="percentile", rng=1).confidence_interval
    return f"{np.median(ratios):.{digits}f} ({interval.low:.{digits}f}–{interval.high:.{digits}f})"


if __name__ == "__main__":
    main()
