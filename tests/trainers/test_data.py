import gzip
import io
import os
import re
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits

from scalestudy.trainers.data import (
    broken_image,
    class_names,
    epoch_batches,
    epoch_of,
    list_images,
    load_arrays,
    mnist_files,
    synthetic_batches,
)
from scalestudy.trainers.trial import Data

DIGITS = Data(source="digits", channels=1, image_size=32, classes=10)


def shards(count: int, epoch: int, per_device_batch: int, world_size: int) -> list[np.ndarray]:
    return [
        epoch_batches(
            count,
            epoch,
            per_device_batch=per_device_batch,
            world_size=world_size,
            ranks=range(rank, rank + 1),
            seed=1,
        )
        for rank in range(world_size)
    ]


def test_ranks_see_disjoint_shards_that_cover_the_epoch() -> None:
    seen = np.concatenate([shard.ravel() for shard in shards(103, 0, 5, 4)])
    assert len(seen) == len(set(seen)) == 100


def test_every_epoch_is_shuffled_anew_and_every_run_alike() -> None:
    assert not np.array_equal(shards(100, 0, 5, 2)[0], shards(100, 1, 5, 2)[0])
    assert np.array_equal(shards(100, 1, 5, 2)[0], shards(100, 1, 5, 2)[0])


def test_a_step_holds_the_same_images_however_many_ranks_share_it() -> None:
    [one] = shards(100, 0, 20, 1)
    four = shards(100, 0, 5, 4)
    for step, images in enumerate(one):
        assert set(images) == {index for shard in four for index in shard[step]}


def test_a_process_of_several_devices_gets_their_batches_in_turn() -> None:
    together = epoch_batches(100, 0, per_device_batch=5, world_size=4, ranks=range(4), seed=1)
    apart = shards(100, 0, 5, 4)
    assert np.array_equal(together[:4], [shard[0] for shard in apart])


def test_fewer_images_than_a_global_batch_are_an_error() -> None:
    with pytest.raises(ValueError, match="global batch of 40 needs as many training images, there are 30"):
        shards(30, 0, 10, 4)


def test_digits_are_scaled_normalized_and_split_without_overlap() -> None:
    arrays = load_arrays(DIGITS)
    assert arrays is not None
    assert arrays.train_images.shape == (1433, 1, 32, 32)
    assert arrays.test_images.shape == (364, 1, 32, 32)
    assert arrays.train_images.dtype == np.float32
    assert arrays.train_images.mean() == pytest.approx(0, abs=1e-3)
    assert arrays.train_images.std() == pytest.approx(1, abs=1e-3)
    assert set(arrays.train_labels) == set(arrays.test_labels) == set(range(10))
    labels = np.concatenate([arrays.train_labels, arrays.test_labels])
    assert np.array_equal(np.bincount(labels), np.bincount(load_digits().target))
    train = {image.tobytes() for image in arrays.train_images}
    assert not train & {image.tobytes() for image in arrays.test_images}


def test_synthetic_images_differ_between_ranks_and_not_between_runs() -> None:
    first, _ = synthetic_batches(DIGITS, 4, 2, seed=1, rank=0)
    assert first.shape == (2, 4, 1, 32, 32)
    assert np.array_equal(first, synthetic_batches(DIGITS, 4, 2, seed=1, rank=0)[0])
    assert not np.array_equal(first, synthetic_batches(DIGITS, 4, 2, seed=1, rank=1)[0])


def idx(values: np.ndarray) -> bytes:
    return struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape) + values.tobytes()


@pytest.fixture
def mnist(tmp_path: Path) -> Path:
    """A folder of IDX files as MNIST's, two of them gzipped."""
    rng = np.random.default_rng(0)
    for prefix, count in (("train", 20), ("t10k", 6)):
        images = rng.integers(256, size=(count, 28, 28), dtype=np.uint8)
        (tmp_path / f"{prefix}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images)))
        (tmp_path / f"{prefix}-labels-idx1-ubyte").write_bytes(idx(np.arange(count, dtype=np.uint8) % 10))
    return tmp_path


def of_mnist(folder: Path) -> Data:
    return Data(source="mnist", folder=str(folder), channels=1, image_size=32, classes=10)


def test_mnist_is_read_gzipped_or_not_and_centred(mnist: Path) -> None:
    arrays = load_arrays(of_mnist(mnist))
    assert arrays is not None
    assert arrays.train_images.shape == (20, 1, 32, 32)
    assert arrays.test_labels.tolist() == [0, 1, 2, 3, 4, 5]
    border = arrays.train_images[:, :, [0, 1, -2, -1]]
    assert border.min() == border.max() == arrays.train_images.min()


def test_mnist_names_the_file_that_is_missing(mnist: Path) -> None:
    (mnist / "t10k-labels-idx1-ubyte").unlink()
    with pytest.raises(ValueError, match="no file t10k-labels-idx1-ubyte"):
        mnist_files(mnist)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda raw: raw[:-3], "damaged gzip file"),
        # Inside, where zlib and not gzip notices.
        (lambda raw: raw[:400] + bytes(200) + raw[600:], "damaged gzip file"),
        (lambda raw: raw[:100], "damaged gzip file"),
        (lambda raw: raw[:10] + b"\xff" * 20 + raw[30:], "damaged gzip file"),
        (lambda raw: b"", "not an IDX file"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:7]), "not an IDX file"),
        (lambda raw: b"<html>no such page</html>", "not an IDX file"),
        (lambda raw: gzip.compress(gzip.decompress(raw)[:-1]), "15679 bytes of values where its header"),
        (lambda raw: gzip.compress(b"nothing of the kind"), "not an IDX file"),
    ],
)
def test_a_damaged_mnist_file_is_named(mnist: Path, damage: Callable[[bytes], bytes], message: str) -> None:
    path = mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"train-images-idx3-ubyte.gz.*{message}"):
        load_arrays(of_mnist(mnist))


def test_an_mnist_file_that_a_browser_has_unpacked_keeps_its_name(mnist: Path) -> None:
    path = mnist / "train-images-idx3-ubyte.gz"
    path.write_bytes(gzip.decompress(path.read_bytes()))
    arrays = load_arrays(of_mnist(mnist))
    assert arrays is not None
    assert arrays.train_images.shape == (20, 1, 32, 32)


def test_labels_and_sizes_that_are_not_mnists_are_named(mnist: Path) -> None:
    path = mnist / "train-labels-idx1-ubyte"
    labels = path.read_bytes()
    path.write_bytes(labels[:-1] + bytes([46]))
    with pytest.raises(ValueError, match="train has the label 46, and the classes are 0 to 9"):
        load_arrays(of_mnist(mnist))
    path.write_bytes(labels)
    with pytest.raises(ValueError, match=r"train has images of \(28, 28\), which fit into no 24×24"):
        load_arrays(of_mnist(mnist).model_copy(update={"image_size": 24}))


def picture(path: Path, **how: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (9, 9)).save(path, **how)


def relative(folder: Path) -> list[str]:
    return [str(Path(path).relative_to(folder)) for path in list_images(folder).paths]


def test_what_systems_and_editors_leave_is_no_class_and_no_image(tmp_path: Path) -> None:
    for name in ("a/1.png", "b/2.JPG", ".ipynb_checkpoints/1-checkpoint.png", "__MACOSX/a/1.png", "lost+found/3.png"):
        picture(tmp_path / name)
    for name in ("a/._1.png", "b/.DS_Store", "b/Thumbs.db", "__MACOSX/a/._1.png", "docs/index.html", "labels.csv"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    (tmp_path / "empty").mkdir()
    picture(tmp_path / "a/.thumbnails/1.png")
    (tmp_path / "a/gone.png").symlink_to(tmp_path / "nowhere.png")
    assert class_names(tmp_path) == ("a", "b")
    assert relative(tmp_path) == ["a/1.png", "b/2.JPG"]
    assert list_images(tmp_path).labels.tolist() == [0, 1]
    assert list_images(tmp_path).left_out == (
        f"{tmp_path}: left out: 2 hidden, 1 folder .thumbnails, 1 links to nothing, 1 .db, "
        "5 folders without a class (.ipynb_checkpoints, __MACOSX, docs, empty, lost+found)"
    )


def test_a_tidy_folder_leaves_nothing_out(tmp_path: Path) -> None:
    picture(tmp_path / "a/1.png")
    assert list_images(tmp_path).left_out is None
    data = Data(source="images", folder=str(tmp_path), channels=3, image_size=32, classes=1)
    assert epoch_of(data) == (1, None)
    assert epoch_of(DIGITS) == (1433, None)


def test_images_lie_in_folders_of_their_class_as_tiny_imagenets_do_and_behind_links(tmp_path: Path) -> None:
    for name in ("train/n01/images/n01_0.JPEG", "train/n01/images/n01_1.JPEG", "train/n02/x/y/z.jpeg", "store/1.gif"):
        picture(tmp_path / name)
    (tmp_path / "train/n01/n01_boxes.txt").write_text("1 2 3 4")
    (tmp_path / "train/n03").symlink_to(tmp_path / "store")
    (tmp_path / "train/n02/link.bmp").symlink_to(tmp_path / "train/n01/images/n01_0.JPEG")
    # A link to a folder that it is in ends nowhere.
    (tmp_path / "train/n01/images/again").symlink_to(tmp_path / "train/n01")
    train = tmp_path / "train"
    assert relative(train) == [
        "n01/images/n01_0.JPEG",
        "n01/images/n01_1.JPEG",
        "n02/link.bmp",
        "n02/x/y/z.jpeg",
        "n03/1.gif",
    ]
    assert list_images(train).left_out == f"{train}: left out: 1 .txt"


def test_a_data_set_of_several_parts_is_not_taken_for_one_of_their_names(tmp_path: Path) -> None:
    for name in ("train/cat/1.png", "train/dog/1.png", "val/cat/2.png"):
        picture(tmp_path / name)
    with pytest.raises(ValueError, match="train, val are parts of a data set and no classes; name one of them"):
        class_names(tmp_path)
    # Classes may be called so.
    picture(tmp_path / "train/3.png")
    assert class_names(tmp_path) == ("train", "val")


@pytest.mark.parametrize(
    ("name", "how", "kind"),
    [
        ("1.tif", {}, ".tif"),
        ("1.TIFF", {}, ".tiff"),
        ("1.webp", {}, ".webp"),
        ("1.ppm", {}, ".ppm"),
        ("1.pgm", {"format": "PPM"}, ".pgm"),
    ],
)
def test_what_not_every_framework_decodes_is_left_out_and_counted(
    tmp_path: Path, name: str, how: dict[str, str], kind: str
) -> None:
    picture(tmp_path / "a/0.bmp")
    picture(tmp_path / "a" / name, **how)
    assert relative(tmp_path) == ["a/0.bmp"]
    assert list_images(tmp_path).left_out == f"{tmp_path}: left out: 1 {kind}"


@pytest.mark.parametrize(("mode", "listed"), [("RGB", True), ("RGBA", True), ("P", False), ("L", False), ("1", False)])
def test_a_bmp_with_a_palette_is_left_out(tmp_path: Path, mode: str, listed: bool) -> None:
    picture(tmp_path / "a/0.png")
    Image.new("RGB", (9, 9), "red").convert(mode).save(tmp_path / "a/1.bmp")
    files = list_images(tmp_path)
    assert len(files.paths) == 1 + listed
    assert files.left_out == (None if listed else f"{tmp_path}: left out: 1 .bmp with a palette")


def test_an_image_folder_has_a_class_a_folder_and_finds_its_broken_image(tmp_path: Path) -> None:
    for name in ("b", "a"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (9, 9)).save(tmp_path / name / "one.png")
    (tmp_path / "a" / "two.jpg").write_bytes(b"no image")
    (tmp_path / "a" / "notes.txt").write_text("ignored")
    files = list_images(tmp_path)
    assert class_names(tmp_path) == ("a", "b")
    assert [Path(path).name for path in files.paths] == ["one.png", "two.jpg", "one.png"]
    assert files.labels.tolist() == [0, 0, 1]
    assert broken_image(tmp_path, 60) == f"{tmp_path / 'a' / 'two.jpg'}: not a readable image"


def test_a_large_folder_is_looked_through_as_far_as_the_time_goes(tmp_path: Path) -> None:
    """4,000 images whose decoding takes some 20 seconds, the broken one last."""
    Image.effect_noise((1200, 1200), 50).save(tmp_path / "one.jpg")
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for index in range(2000):
            (tmp_path / name / f"{index}.jpg").hardlink_to(tmp_path / "one.jpg")
    (tmp_path / "b" / "broken.jpg").write_bytes(b"no image")
    began_s = time.monotonic()
    told = broken_image(tmp_path, 0.3)
    assert time.monotonic() - began_s < 3
    assert re.fullmatch(f"{tmp_path}: an image is not readable, none of the [0-9]+ looked at in 0.3 s", told), told


@pytest.mark.parametrize("content", ["empty", "cut short", "TIFF", "bomb"])
def test_whatever_tensorflow_cannot_decode_is_found(tmp_path: Path, content: str) -> None:
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "one.jpg"
    encoded = io.BytesIO()
    Image.effect_noise((40, 40), 50).save(encoded, "TIFF" if content == "TIFF" else "PNG")
    match content:
        case "empty":
            file.touch()
        case "cut short":
            file.write_bytes(encoded.getvalue()[:500])
        case "TIFF":
            file.write_bytes(encoded.getvalue())
        case "bomb":
            # Pillow refuses a picture that says of itself to be so large, by an error of no class that we know.
            large = struct.pack(">II", 2**16, 2**16)
            file.write_bytes(encoded.getvalue()[:16] + large + encoded.getvalue()[24:])
    assert broken_image(tmp_path, 60) == f"{file}: not a readable image"


def test_images_that_all_can_be_read_are_not_accused(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "a" / "one.png")
    assert broken_image(tmp_path, 60) == f"{tmp_path}: TensorFlow cannot decode an image, though Pillow reads all 1"


def test_an_empty_image_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="one sub-folder a class"):
        list_images(tmp_path)
    (tmp_path / "a").mkdir()
    with pytest.raises(ValueError, match=r"no \.jpg/\.jpeg/\.png/\.bmp/\.gif file in its class folders a"):
        list_images(tmp_path)


def test_what_is_left_out_may_have_a_name_that_is_no_text(tmp_path: Path) -> None:
    """From an archive of another encoding: the report that holds the sentence could not be written."""
    folder = tmp_path / "cats"
    folder.mkdir()
    Image.new("RGB", (4, 4)).save(folder / "1.png")
    (tmp_path / os.fsdecode(b"gr\xf6sse")).mkdir()
    (folder / os.fsdecode(b"notiz.\xf6")).touch()
    said = list_images(tmp_path).left_out
    assert said is not None
    assert "gr\\udcf6sse" in said
    said.encode()
