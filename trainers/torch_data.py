"""Feed a torch rank: an endless iterator of (images, labels) on the device."""

import itertools
import math
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from scalestudy.trainers.data import (
    CHANNEL_DEVIATION,
    CHANNEL_MEAN,
    CROP_AREA,
    CROP_RATIO,
    HOST_BATCHES,
    Arrays,
    ImageFiles,
    epoch_batches,
    list_images,
    synthetic_batches,
)
from scalestudy.trainers.trial import Trial

Batch = tuple[Tensor, Tensor]


def batches(
    trial: Trial,
    rank: int,
    device: torch.device,
    arrays: Arrays | None,
    memory_format: torch.memory_format = torch.contiguous_format,
) -> Iterator[Batch]:
    """Return this rank's batches, images n × c × h × w; `arrays` are the data sets that fit into memory.

    Only what lies on the device already is in the memory format: no step needs to change it.
    """
    match trial.data.source:
        case "synthetic":
            return _resident(trial, rank, device, memory_format)
        case "synthetic-host":
            on_host = _from_host(trial, rank, device)
        case "digits" | "mnist":
            assert arrays is not None
            on_host = _gathered(trial, rank, device, arrays)
        case "images":
            on_host = _decoded(trial, rank, device)
    return _ahead(on_host, device) if device.type == "cuda" else on_host


class RankBatches(Sampler[list[int]]):
    """The distributed sampler: this rank's batches of indices, epoch after epoch, without end."""

    def __init__(self, trial: Trial, rank: int, count: int) -> None:
        self._trial = trial
        self._rank = rank
        self._count = count

    def __iter__(self) -> Iterator[list[int]]:
        for epoch in itertools.count():
            rows = epoch_batches(
                self._count,
                epoch,
                per_device_batch=self._trial.per_device_batch,
                world_size=self._trial.world_size,
                ranks=range(self._rank, self._rank + 1),
                seed=self._trial.seed,
            )
            yield from rows.tolist()


class _ImageFolder(Dataset[tuple[Tensor, int]]):
    """Decode, random resized crop, random flip, normalize; torch seeds every loader worker differently."""

    def __init__(self, files: ImageFiles, size: int) -> None:
        self._files = files
        self._size = size

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        path = self._files.paths[index]
        try:
            with Image.open(path) as file:
                image = in_colour(file)
        except MemoryError:
            raise
        # Pillow's plug-ins raise what they come upon.
        except Exception as error:
            raise ValueError(f"{path}: not a readable image: {error}") from None
        image = image.resize((self._size, self._size), Image.Resampling.BILINEAR, box=_random_crop(*image.size))
        if torch.rand(()) < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        pixels = (np.asarray(image, dtype=np.float32) / 255 - CHANNEL_MEAN) / CHANNEL_DEVIATION
        return torch.from_numpy(pixels.transpose(2, 0, 1).copy()), int(self._files.labels[index])


def in_colour(image: Image.Image) -> Image.Image:
    """Return an image in RGB, as TensorFlow decodes it."""
    if image.mode.startswith("I"):
        # 16 bits of grey: Pillow would cut off what is above 255, and show it white.
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.format == "GIF" and "transparency" in image.info:
        # TensorFlow's decoder leaves black what is transparent; of PNG both show the colour beneath.
        shown = image.convert("RGBA")
        image = Image.new("RGB", image.size)
        image.paste(shown, mask=shown.getchannel("A"))
    return image.convert("RGB")


def _random_crop(width: int, height: int) -> tuple[float, float, float, float]:
    """Return a box of random area and shape inside the image."""
    area = width * height * torch.empty(()).uniform_(*CROP_AREA).item()
    ratio = math.exp(torch.empty(()).uniform_(math.log(CROP_RATIO[0]), math.log(CROP_RATIO[1])).item())
    crop_width, crop_height = min(math.sqrt(area * ratio), width), min(math.sqrt(area / ratio), height)
    left, top = torch.rand(2).tolist()
    left, top = left * (width - crop_width), top * (height - crop_height)
    return left, top, left + crop_width, top + crop_height


def _ahead(on_host: Iterator[Batch], device: torch.device) -> Iterator[Batch]:
    """Copy each batch from pinned memory to the GPU while the step before it computes, on a stream of its own."""
    aside = torch.cuda.Stream(device)

    def copied(batch: Batch) -> Batch:
        with torch.cuda.stream(aside):
            images, labels = (part.to(device, non_blocking=True) for part in batch)
        return images, labels

    ahead = copied(next(on_host))
    for batch in on_host:
        ready, current = ahead, torch.cuda.current_stream(device)
        current.wait_stream(aside)
        for part in ready:
            # Its memory was another stream's: not to be used again before this one is done with it.
            part.record_stream(current)
        ahead = copied(batch)
        yield ready


def _resident(trial: Trial, rank: int, device: torch.device, memory_format: torch.memory_format) -> Iterator[Batch]:
    images, labels = synthetic_batches(trial.data, trial.per_device_batch, 1, trial.seed, rank)
    there = torch.from_numpy(images[0]).to(device).contiguous(memory_format=memory_format)
    return itertools.repeat((there, torch.from_numpy(labels[0]).to(device)))


def _from_host(trial: Trial, rank: int, device: torch.device) -> Iterator[Batch]:
    images, labels = map(
        torch.from_numpy,
        synthetic_batches(trial.data, trial.per_device_batch, HOST_BATCHES, trial.seed, rank),
    )
    if device.type == "cuda":
        images, labels = images.pin_memory(), labels.pin_memory()
    for index in itertools.cycle(range(HOST_BATCHES)):
        if device.type == "cuda":
            yield images[index], labels[index]
        else:
            # On CPU too the batch is copied, as it is on the way to a GPU.
            yield images[index].clone(), labels[index].clone()


def _gathered(trial: Trial, rank: int, device: torch.device, arrays: Arrays) -> Iterator[Batch]:
    images, labels = torch.from_numpy(arrays.train_images), torch.from_numpy(arrays.train_labels)
    for indices in RankBatches(trial, rank, len(labels)):
        chosen = images[indices], labels[indices]
        yield (chosen[0].pin_memory(), chosen[1].pin_memory()) if device.type == "cuda" else chosen


def _decoded(trial: Trial, rank: int, device: torch.device) -> Iterator[Batch]:
    files = list_images(Path(trial.data.folder or ""))
    loader = DataLoader(
        _ImageFolder(files, trial.data.image_size),
        batch_sampler=RankBatches(trial, rank, len(files.paths)),
        num_workers=trial.loader_workers,
        pin_memory=device.type == "cuda",
    )
    yield from loader
