"""The images, in no framework's terms: where they come from, and which of them a rank sees in which step."""

import gzip
import math
import os
import re
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from scalestudy.trainers.trial import Data, Trial

Images = NDArray[np.float32]
Labels = NDArray[np.int64]
# The folders that a file is in, by device and inode.
Above = tuple[tuple[int, int], ...]

# What every framework decodes. Pillow alone reads .ppm, .pgm, .tif and .tiff, and TensorFlow .webp only of late.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".gif")
# What TensorFlow decodes, whatever a file is called, in Pillow's words; MPO is a JPEG of several pictures.
_DECODED_FORMATS = ("JPEG", "MPO", "PNG", "GIF", "BMP", "WEBP")
_UNDECODABLE = re.compile(r"decode_?(?:image|jpeg|png|gif|bmp|webp)|unknown image file format", re.IGNORECASE)
# TensorFlow takes the indices of a palette for colours: of a BMP's bits a pixel, an integer of two bytes at this place,
# these have none.
_BMP_BITS_AT, _BMP_BITS = 28, (24, 32)
# Folders that systems make beside a user's; hidden ones are left out, too.
_NO_CLASSES = ("__MACOSX", "lost+found", "@eaDir", "$RECYCLE.BIN", "System Volume Information")
_SPLITS = ("train", "training", "val", "valid", "validation", "test", "testing")
# ImageNet's channel means and deviations, of pixels in 0..1: what torchvision and Keras normalize with. Numpy would
# turn a tuple into float64, and the pixels with it.
CHANNEL_MEAN = np.array((0.485, 0.456, 0.406), np.float32)
CHANNEL_DEVIATION = np.array((0.229, 0.224, 0.225), np.float32)
# Random resized crop (Szegedy et al. 2015): share of the area, and the range of width / height.
CROP_AREA = (0.08, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)

# `synthetic-host` makes so many batches on the host and copies one in turn to the device each step.
HOST_BATCHES = 8

# So many batches every loader worker may be ahead (torch's prefetch_factor, unless asked otherwise), and so many a
# pipeline by its own buffers and the copy to the device.
AHEAD_A_WORKER, _AHEAD_OF_A_PIPELINE = 2, 4

_MOST_NAMED = 8

_MNIST_FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)
_GZIP = b"\x1f\x8b"
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
    """A data set on disk, decoded as it is read; `left_out` says of what is not in it, None where all is."""

    paths: tuple[str, ...]
    labels: Labels
    left_out: str | None = None


def load_arrays(data: Data) -> Arrays | None:
    """Return digits or MNIST, None for other sources; raises ValueError naming a file that is missing or damaged."""
    if data.source == "mnist":
        return _mnist(Path(data.folder or ""), data.image_size, data.classes)
    return _digits(data.image_size) if data.source == "digits" else None


def training_images(data: Data) -> int | None:
    """Return the images of an epoch, or None where there is no end to them."""
    return epoch_of(data)[0]


def epoch_of(data: Data) -> tuple[int | None, str | None]:
    """Return the images of an epoch, None where there is no end to them, and what of the data is left out."""
    if data.source == "images":
        files = list_images(Path(data.folder or ""))
        return len(files.paths), files.left_out
    arrays = load_arrays(data)
    return (None if arrays is None else len(arrays.train_labels)), None


def list_images(folder: Path) -> ImageFiles:
    """Return the images of a folder a class, classes in the order of their names; raises ValueError where none are.

    As torchvision's and Keras' folders: images may lie in folders of their class' own, and behind symbolic links.
    """
    names = class_names(folder)
    refused: Counter[str] = Counter()
    found = [(path, label) for label, name in enumerate(names) for path in image_paths(folder / name, refused)]
    if not found:
        raise ValueError(f"{folder}: no {'/'.join(IMAGE_SUFFIXES)} file in its class folders {', '.join(names)}")
    others = sorted(entry.name for entry in _entries(folder) if entry.is_dir() and entry.name not in names)
    return ImageFiles(
        paths=tuple(path for path, _ in found),
        labels=np.array([label for _, label in found]),
        left_out=_left_out(folder, refused, others),
    )


def class_names(folder: Path) -> tuple[str, ...]:
    """Return the sub-folders of an image folder that hold images, one a class; raises ValueError where there are none.

    Hidden folders and those that systems make are no classes.
    """
    folders = [entry for entry in _entries(folder) if entry.is_dir()] if folder.is_dir() else []
    offered = [entry for entry in folders if not _hidden(entry.name)]
    if not offered:
        raise ValueError(f"{folder}: no folder with one sub-folder a class of {'/'.join(IMAGE_SUFFIXES)} files")
    names = tuple(entry.name for entry in offered if _holds_image(Path(entry.path)))
    if not names:
        listed = ", ".join(entry.name for entry in offered)
        raise ValueError(f"{folder}: no {'/'.join(IMAGE_SUFFIXES)} file in its class folders {listed}")
    if all(name.lower() in _SPLITS and not _holds_image(folder / name, deep=False) for name in names):
        raise ValueError(
            f"{folder}: {', '.join(names)} are parts of a data set and no classes; name one of them: images:{names[0]}"
        )
    return names


def image_paths(folder: Path, refused: Counter[str], above: Above = ()) -> Iterator[str]:
    """Yield the images of a class' folder and of those in it, by name; `refused` counts what else is there, by kind."""
    if (inside := _inside(folder, above)) is None:
        return
    for entry in _entries(folder):
        if entry.is_dir():
            if _hidden(entry.name):
                refused[f"folder {entry.name}"] += 1
            else:
                yield from image_paths(Path(entry.path), refused, inside)
        elif why := _refused(entry):
            refused[why] += 1
        else:
            yield entry.path


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
        for path in image_paths(folder / name, Counter()):
            if time.monotonic() > ends_s:
                return f"{folder}: an image is not readable, none of the {seen} looked at in {limit_s:g} s"
            if not _readable(path):
                return f"{path}: not a readable image"
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


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name in _NO_CLASSES


def _inside(folder: Path, above: Above) -> Above | None:
    """Return the folders that what lies in a folder is in, None behind a link to one of them."""
    status = folder.stat()
    here = (status.st_dev, status.st_ino)
    return None if here in above else (*above, here)


def _holds_image(folder: Path, above: Above = (), *, deep: bool = True) -> bool:
    """Return whether there is any image in a folder, without reading all of it."""
    if (inside := _inside(folder, above)) is None:
        return False
    below = []
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir():
                below.append(entry)
            elif _refused(entry) is None:
                return True
    return deep and any(_holds_image(Path(entry.path), inside) for entry in below if not _hidden(entry.name))


def _refused(entry: os.DirEntry[str]) -> str | None:
    """Return of what kind a file is that is no image for us, None for an image."""
    stem, dot, ending = entry.name.rpartition(".")
    suffix = (dot + ending).lower() if stem else ""
    if entry.name.startswith("."):
        return "hidden"
    if suffix not in IMAGE_SUFFIXES:
        return suffix or "without a suffix"
    if not entry.is_file():
        return "links to nothing"
    if suffix == ".bmp" and not _has_colours(Path(entry.path)):
        return ".bmp with a palette"
    return None


def _has_colours(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(_BMP_BITS_AT + 2)
    # What is no BMP at all is an error when it is read.
    return head[:2] != b"BM" or int.from_bytes(head[_BMP_BITS_AT:], "little") in _BMP_BITS


def _left_out(folder: Path, refused: Counter[str], others: list[str]) -> str | None:
    said = [f"{count} {kind}" for kind, count in refused.most_common()]
    if others:
        shown = ", ".join(others[:_MOST_NAMED]) + (", …" if len(others) > _MOST_NAMED else "")
        said.append(f"{len(others)} folder{'s' if len(others) > 1 else ''} without a class ({shown})")
    # A name that is not UTF-8 could not be written into a report.
    return f"{folder}: left out: {', '.join(said)}".encode(errors="backslashreplace").decode() if said else None


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


def _mnist(folder: Path, size: int, classes: int) -> Arrays:
    train, train_labels, test, test_labels = map(_read_idx, mnist_files(folder))
    for images, labels, name in ((train, train_labels, "train"), (test, test_labels, "t10k")):
        if images.ndim != 3 or labels.shape != images.shape[:1]:
            raise ValueError(f"{folder}: {name} has {labels.shape} labels for {images.shape} images")
        if labels.size and labels.max() >= classes:
            raise ValueError(f"{folder}: {name} has the label {labels.max()}, and the classes are 0 to {classes - 1}")
        if max(images.shape[1:]) > size:
            raise ValueError(f"{folder}: {name} has images of {images.shape[1:]}, which fit into no {size}×{size}")
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
        # By its content: a browser unpacks what it fetches, and keeps the name.
        raw = gzip.decompress(raw) if raw[:2] == _GZIP else raw
    except (OSError, EOFError, zlib.error) as error:
        raise ValueError(f"{path}: damaged gzip file: {error}") from None
    if len(raw) < 4 or raw[:2] != b"\0\0" or raw[2] not in _IDX_DTYPES or len(raw) < 4 + 4 * raw[3]:
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


def most_batches_ahead(trial: Trial) -> int:
    """Return how many batches a process' input holds ready at the most, in every framework: those take the same data.

    A process that drives several devices has as many for each.
    """
    if trial.data.source == "synthetic":
        return 0
    return AHEAD_A_WORKER * max(1, trial.loader_workers) + _AHEAD_OF_A_PIPELINE
