"""The images, in no framework's terms: where they come from, and which of them a rank sees in which step."""

import gzip
import math
import os
import re
import time
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scalestudy.trainers.trial import Data

Images = NDArray[np.float32]
Labels = NDArray[np.int64]

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png")
# What TensorFlow decodes, whatever a file is called, in Pillow's words; MPO is a JPEG of several pictures.
_DECODED_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP")
_UNDECODABLE = re.compile(r"decode_?(?:image|jpeg|png|gif|bmp|webp)|unknown image file format", re.IGNORECASE)
# ImageNet's channel means and deviations, of pixels in 0..1: what torchvision and Keras normalize with. Numpy would
# turn a tuple into float64, and the pixels with it.
CHANNEL_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
CHANNEL_DEVIATION = np.array((0.229, 0.224, 0.225), np.float32)
# Random resized crop (Szegedy et al. 2015): share of the area, and the range of width / height.
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

# `synthetic-host` makes so many batches on the host and copies one in turn to the device each step.
HOST_BATCHES = 8

_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_IDX_DTYPES = {0x08: np.dtype(np.uint8)}


@dataclass(frozen=True, kw_only=True)
class Arrays:
    """A data set in memory: images n × channels × height × width, normalized, and labels n."""

    train_images: Images
    train_labels: Labels
    test_images: Images
    test_labels: Labels


@dataclass(frozen=True, kw_only=True)
class ImageFiles:
    """A data set on disk, decoded as it is read."""

    paths: tuple[str, ...]
    labels: Labels


def load_arrays(data: Data) -> Arrays | None:
    """Return digits or MNIST, None for other sources; raises ValueError naming a file that is missing or damaged."""
    if data.source == "mnist":
        return _mnist(Path(data.folder or ""), data.image_size)
    return _digits(data.image_size) if data.source == "digits" else None


def training_images(data: Data) -> int | None:
    """Return the images of an epoch, or None where there is no end to them."""
    if data.source == "images":
        return len(list_images(Path(data.folder or "")).paths)
    arrays = load_arrays(data)
    return None if arrays is None else len(arrays.train_labels)


def list_images(folder: Path) -> ImageFiles:
    """Return the images of a folder a class, classes in the order of their names; raises ValueError where none are."""
    names = class_names(folder)
    found = [
        (str(path), label)
        for label, name in enumerate(names)
        for path in sorted((folder / name).iterdir())
        if path.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not found:
        raise ValueError(f"{folder}: no {'/'.join(IMAGE_SUFFIXES)} file in its class folders {', '.join(names)}")
    return ImageFiles(paths=tuple(path for path, _ in found), labels=np.array([label for _, label in found]))


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the sub-folders of an image folder, one a class; raises ValueError where there are none."""
    names = tuple(sorted(entry.name for entry in folder.iterdir() if entry.is_dir())) if folder.is_dir() else ()
    if not names:
        raise ValueError(f"{folder}: no folder with one sub-folder a class of {'/'.join(IMAGE_SUFFIXES)} files")
    return names


def mnist_files(folder: Path) -> tuple[Path, ...]:
    """Return training images and labels, test images and labels; raises ValueError naming one that is missing."""
    return tuple(_mnist_file(folder, name) for name in _MNIST_FILES)


def undecodable(error: Exception) -> bool:
    """Return whether this is TensorFlow's error of an image that it cannot decode, which does not name the file."""
    return type(error).__name__ == "InvalidArgumentError" and _UNDECODABLE.search(str(error)) is not None


def broken_image(folder: Path, limit_s: float) -> str:
    """Say which image of a folder cannot be decoded; a large one is looked through as far as the time goes."""
    ends_s = time.monotonic() + limit_s
    seen = 0
    for name in class_names(folder):
        with os.scandir(folder / name) as entries:
            for entry in entries:
                if time.monotonic() > ends_s:
                    return f"{folder}: an image is not readable, none of the {seen} looked at in {limit_s:g} s"
                if entry.name.lower().endswith(IMAGE_SUFFIXES):
                    if not _readable(entry.path):
                        return f"{entry.path}: not a readable image"
                    seen += 1
    return f"{folder}: TensorFlow cannot decode an image, though Pillow reads all {seen}"


def synthetic_batches(data: Data, batch: int, count: int, seed: int, rank: int) -> tuple[Images, Labels]:
    """Return `count` batches of normal noise, different on every rank: count × batch × channels × height × width."""
    rng = np.random.default_rng([seed, rank])
    shape = (count, batch, data.channels, data.image_size, data.image_size)
    return rng.standard_normal(shape, dtype=np.float32), rng.integers(data.classes, size=shape[:2])


def epoch_batches(
    count: int, epoch: int, *, per_device_batch: int, world_size: int, ranks: range, seed: int
) -> NDArray[np.int64]:
    """Return which of `count` images the given ranks see in one epoch, a row of indices a batch.

    Rows run step by step, and within a step rank by rank. Ranks' shards are disjoint; the images of a step depend on
    the global batch alone, however many ranks share it. The rest that fills no global batch is left out of the epoch.
    Raises ValueError where there are fewer images than one global batch.
    """
    global_batch = per_device_batch * world_size
    steps = count // global_batch
    if steps == 0:
        raise ValueError(f"the global batch of {global_batch} needs as many training images, there are {count}")
    order = np.random.default_rng([seed, epoch]).permutation(count)[: steps * global_batch]
    by_rank = order.reshape(steps, world_size, per_device_batch)[:, ranks.start : ranks.stop]
    return by_rank.reshape(-1, per_device_batch)


def _digits(size: int) -> Arrays:
    from PIL import Image

    # Read from scikit-learn's files without its import, which takes a rank longer than to build its model.
    [path] = [file for file in files("scikit-learn") or () if file.name == "digits.csv.gz"]
    table = np.loadtxt(path.locate(), delimiter=",", dtype=np.float32)
    images, labels = table[:, :-1].reshape(-1, 8, 8), table[:, -1].astype(np.int64)
    scaled = np.stack(
        [np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR)) for image in images]
    )[:, None]
    # Every fifth image of a class is for the test.
    test = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        test[np.flatnonzero(labels == label)[::5]] = True
    return _normalized(scaled[~test], labels[~test], scaled[test], labels[test])


def _mnist(folder: Path, size: int) -> Arrays:
    train, train_labels, test, test_labels = map(_read_idx, mnist_files(folder))
    for images, labels, name in ((train, train_labels, "train"), (test, test_labels, "t10k")):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(f"{folder}: {name} has {labels.shape} labels for {images.shape} images")
    return _normalized(
        _padded(train, size), train_labels.astype(np.int64), _padded(test, size), test_labels.astype(np.int64)
    )


def _mnist_file(folder: Path, name: str) -> Path:
    for candidate in (name, f"{name}.gz", name.replace("-idx", ".idx"), name.replace("-idx", ".idx") + ".gz"):
        if (folder / candidate).is_file():
            return folder / candidate
    raise ValueError(f"{folder}: no file {name} or {name}.gz")


def _read_idx(path: Path) -> NDArray[np.uint8]:
    """Read an IDX file (LeCun, Cortes, Burges): two zero bytes, type, rank, big-endian sizes, values."""
    raw = path.read_bytes()
    try:
        raw = gzip.decompress(raw) if path.suffix == ".gz" else raw
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from None
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_DTYPES:
        raise ValueError(f"{path}: not an IDX file of unsigned bytes: it begins with {raw[:4].hex(' ')}")
    offset = 4 + 4 * raw[3]
    shape = tuple(int(size) for size in np.frombuffer(raw, dtype=">u4", count=raw[3], offset=4))
    if len(raw) - offset != math.prod(shape):
        raise ValueError(
            f"{path}: {len(raw) - offset} bytes of values where its header {shape} says {math.prod(shape)}"
        )
    return np.frombuffer(raw, dtype=np.uint8, offset=offset).reshape(shape)


def _padded(images: NDArray[np.uint8], size: int) -> Images:
    """Centre n × h × w images on size × size with a border of zeros, as LeNet-5 was trained."""
    border = [(size - side) // 2 for side in images.shape[1:]]
    padding = [
        (0, 0),
        *((before, size - side - before) for before, side in zip(border, images.shape[1:], strict=True)),
    ]
    return np.pad(images, padding)[:, None].astype(np.float32)


def _normalized(train: Images, train_labels: Labels, test: Images, test_labels: Labels) -> Arrays:
    mean, deviation = train.mean(), train.std()
    return Arrays(
        train_images=(train - mean) / deviation,
        train_labels=train_labels,
        test_images=(test - mean) / deviation,
        test_labels=test_labels,
    )


def _readable(path: str) -> bool:
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
            return image.format in _DECODED_FORMATS
    except MemoryError:
        # Which says nothing of the image.
        return True
    except Exception:
        # Pillow's plug-ins raise what they like.
        return False
