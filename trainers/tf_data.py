"""Feed a tf.distribute process: a tf.data pipeline over the shards of the ranks that it drives."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import tensorflow as tf

from scalestudy.trainers.data import (
    CHANNEL_DEVIATION,
    CHANNEL_MEAN,
    CROP_AREA,
    CROP_RATIO,
    HOST_BATCHES,
    Arrays,
    Images,
    epoch_batches,
    list_images,
    synthetic_batches,
)
from scalestudy.trainers.trial import Trial


def to_nhwc(images: Images) -> Images:
    """Turn … × c × h × w into … × h × w × c."""
    return np.ascontiguousarray(np.moveaxis(images, -3, -1))


def resident_batch(trial: Trial, rank: int) -> tuple[Any, Any]:
    """Return the one batch of `synthetic`, images n × h × w × c, on the current device."""
    images, labels = synthetic_batches(trial.data, trial.per_device_batch, 1, trial.seed, rank)
    return tf.constant(to_nhwc(images[0])), tf.constant(labels[0])


def dataset(trial: Trial, ranks: range, arrays: Arrays | None) -> Any:
    """Return an endless tf.data.Dataset of (images, labels), one batch a rank in turn."""
    match trial.data.source:
        case "synthetic-host":
            pipeline = _from_host(trial, ranks)
        case "digits" | "mnist":
            assert arrays is not None
            pipeline = _gathered(trial, ranks, arrays)
        case "images":
            pipeline = _decoded(trial, ranks)
        case "synthetic":
            raise AssertionError("synthetic data lie on the device: see resident_batch")
    options = tf.data.Options()
    # Every worker is given its own shards already, and no more threads than torch's loader gets processes.
    options.experimental_distribute.auto_shard_policy = tf.data.experimental.AutoShardPolicy.OFF
    options.threading.private_threadpool_size = max(1, trial.loader_workers) * len(ranks)
    # Endless, as TensorFlow cannot see itself: of data that might end tf.distribute has the workers agree before every
    # batch whether there is one more, which is a collective a step.
    endless = pipeline.apply(tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
    return endless.prefetch(2 * len(ranks)).with_options(options)


def _from_host(trial: Trial, ranks: range) -> Any:
    made = [synthetic_batches(trial.data, trial.per_device_batch, HOST_BATCHES, trial.seed, rank) for rank in ranks]
    # Batch by batch, and within one batch rank by rank.
    images = np.stack([to_nhwc(images) for images, _ in made], axis=1)
    labels = np.stack([labels for _, labels in made], axis=1)
    flat = (images.reshape(-1, *images.shape[2:]), labels.reshape(-1, labels.shape[2]))
    return tf.data.Dataset.from_tensor_slices(flat).repeat()


def _gathered(trial: Trial, ranks: range, arrays: Arrays) -> Any:
    images, labels = tf.constant(to_nhwc(arrays.train_images)), tf.constant(arrays.train_labels)
    return _index_batches(trial, ranks, len(arrays.train_labels)).map(
        lambda indices: (tf.gather(images, indices), tf.gather(labels, indices))
    )


def _decoded(trial: Trial, ranks: range) -> Any:
    files = list_images(Path(trial.data.folder or ""))
    # As the file system has them: a name need not be UTF-8.
    paths, labels = tf.constant([os.fsencode(path) for path in files.paths]), tf.constant(files.labels)

    def decode(index: Any) -> tuple[Any, Any]:
        return _augmented(tf.io.read_file(paths[index]), trial.data.image_size), labels[index]

    return (
        _index_batches(trial, ranks, len(files.paths))
        .unbatch()
        .map(decode, num_parallel_calls=max(1, trial.loader_workers) * len(ranks), deterministic=True)
        .batch(trial.per_device_batch, drop_remainder=True)
    )


def decoded(encoded: Any) -> Any:
    """Return an image in RGB."""
    return tf.io.decode_image(encoded, channels=3, expand_animations=False)


def _augmented(encoded: Any, size: int) -> Any:
    """Decode, random resized crop, random flip, normalize, as `torch_data` does with Pillow."""
    image = decoded(encoded)
    begin, extent, _ = tf.image.sample_distorted_bounding_box(
        tf.shape(image),
        tf.zeros([0, 0, 4]),
        area_range=CROP_AREA,
        aspect_ratio_range=CROP_RATIO,
        min_object_covered=0.0,
        use_image_if_no_bounding_boxes=True,
    )
    image = tf.image.resize(tf.slice(image, begin, extent), [size, size])
    image = tf.image.random_flip_left_right(tf.reshape(image, [size, size, 3]))
    return (image / 255.0 - tf.constant(CHANNEL_MEAN)) / tf.constant(CHANNEL_DEVIATION)


def _index_batches(trial: Trial, ranks: range, count: int) -> Any:
    def epoch_rows(epoch: Any) -> Any:
        return epoch_batches(
            count,
            int(epoch),
            per_device_batch=trial.per_device_batch,
            world_size=trial.world_size,
            ranks=ranks,
            seed=trial.seed,
        )

    # One call into Python an epoch, not one a batch.
    epoch_rows(0)
    return tf.data.Dataset.counter().flat_map(
        lambda epoch: tf.data.Dataset.from_tensor_slices(
            tf.ensure_shape(tf.numpy_function(epoch_rows, [epoch], tf.int64), [None, trial.per_device_batch])
        )
    )
