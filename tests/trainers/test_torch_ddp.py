"""What torch's trainers hand to torch, against what torch does unasked."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from scalestudy.cluster.ports import free_ports
from scalestudy.cluster.rank import Rank, rank_environ
from scalestudy.trainers import torch_models
from scalestudy.trainers.data import CHANNEL_DEVIATION, CHANNEL_MEAN, list_images
from scalestudy.trainers.models import model_spec
from scalestudy.trainers.options import DdpOptions
from scalestudy.trainers.torch_data import _ImageFolder, batches
from scalestudy.trainers.torch_ddp import TorchDdp
from scalestudy.trainers.torch_trainer import TorchTrainer
from scalestudy.trainers.trial import Data, Trial

RANK = Rank(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, host="here")
RESNET50 = {"model": "resnet50", "data": Data(source="synthetic", channels=3, image_size=32, classes=1000)}
MIB = 2**20


@pytest.fixture
def start(make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., TorchDdp]]:
    """Return a maker of a torch-ddp trainer in this process, closed after the test."""
    threads = torch.get_num_threads()
    for name, value in rank_environ(RANK, [f"127.0.0.1:{free_ports(1)[0]}"]).items():
        monkeypatch.setenv(name, value)
    started: list[TorchDdp] = []

    def start(**changes: Any) -> TorchDdp:
        started.append(TorchDdp(make_trial(per_device_batch=2, **changes), RANK))
        return started[-1]

    yield start
    started[0].close()
    torch.set_num_threads(threads)


def test_a_rank_trains_on_the_gpu_that_it_was_given(
    make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr("scalestudy.trainers.torch_trainer._check_precision", lambda *_: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", torch.backends.cudnn.benchmark)
    threads = torch.get_num_threads()
    TorchTrainer(make_trial(device="gpu"), RANK.model_copy(update={"devices": (5,)}))
    torch.set_num_threads(threads)
    assert taken == [torch.device("cuda", 5)]


@pytest.mark.slow
def test_buckets_are_those_of_a_bare_ddp(start: Callable[..., TorchDdp]) -> None:
    """Its default is 25 MB with a first bucket of 1 MB; told 25 MB, it makes the first as large."""
    trainer = start(**RESNET50)
    trainer.build()
    trial = trainer._trial
    bare: Any = DistributedDataParallel(torch_models.build(model_spec(trial.model, trial.data)))
    images, labels = next(trainer._batches)
    # Made anew in the second step, and told in the third.
    for _ in range(3):
        trainer.step()
        cross_entropy(bare(images), labels).backward()
    expected = [int(size) for size in bare._get_ddp_logging_data()["rebuilt_bucket_sizes"].split(",")]
    found = [int(size) for size in str(trainer.settings()["bucket_bytes"]).split("/")]
    assert found == expected
    assert [round(size / MIB, 1) for size in found] == [7.8, 30.0, 25.0, 25.3, 9.3]


def test_what_a_study_names_is_passed_on_even_where_it_is_the_default(
    start: Callable[..., TorchDdp], monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[str, Any] = {}

    class Told(DistributedDataParallel):
        def __init__(self, module: torch.nn.Module, **options: Any) -> None:
            told.update(options)
            super().__init__(module, **options)

    monkeypatch.setattr("scalestudy.trainers.torch_ddp.DistributedDataParallel", Told)
    start(options=DdpOptions(bucket_cap_mb=25)).build()
    assert told["bucket_cap_mb"] == 25


def test_images_are_normalized_in_float32(tmp_path: Path) -> None:
    """Of one colour, so that every crop is the same; numpy alone would compute in float64 and round once at the end."""
    (tmp_path / "a").mkdir()
    for value in range(0, 256, 5):
        Image.new("RGB", (8, 8), (value,) * 3).save(tmp_path / "a" / f"{value:03}.png")
    folder = _ImageFolder(list_images(tmp_path), 4)
    for index, value in enumerate(range(0, 256, 5)):
        image, _ = folder[index]
        expected = (np.float32(value) / np.float32(255) - CHANNEL_MEAN) / CHANNEL_DEVIATION
        assert expected.dtype == np.float32
        assert np.array_equal(image[:, 0, 0].numpy(), expected)


_MARK = """
import os, torch
os.environ |= dict(HOROVOD_CONTROLLER="gloo", HOROVOD_CPU_OPERATIONS="gloo")
import horovod.torch as hvd
from scalestudy.trainers.horovod_torch import HorovodTorch
from scalestudy.trainers.options import HorovodOptions
hvd.init()
trainer = HorovodTorch.__new__(HorovodTorch)
trainer._options = HorovodOptions()
for fused in (True, False):
    trainer._network = torch.nn.Linear(2, 2)
    trainer._optimizer = torch.optim.SGD(trainer._network.parameters(), lr=0.1, fused=fused)
    trainer._distribute()
    print(getattr(trainer._optimizer, "_step_supports_amp_scaling", False), trainer._optimizer.param_groups[0]["fused"])
os._exit(0)
"""


@pytest.mark.slow
def test_a_fused_optimizer_is_one_also_to_horovod() -> None:
    """The scaler of a scaled loss asks for the mark: without it the host waits for the device at every step."""
    told = subprocess.run([sys.executable, "-c", _MARK], capture_output=True, text=True, env=os.environ, timeout=120)
    assert told.stdout.split() == ["True", "True", "False", "False"], told.stderr


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_a_batch_that_lies_on_the_device_lies_as_the_network_wants_it(
    make_trial: Callable[..., Trial], memory_format: torch.memory_format
) -> None:
    """A step that changed its format each time would be charged for what a resident batch need not cost."""
    trial = make_trial(data=Data(source="synthetic", channels=3, image_size=32, classes=10))
    images, _ = next(batches(trial, 0, torch.device("cpu"), None, memory_format))
    assert images.is_contiguous(memory_format=memory_format)
    assert torch.equal(images, next(batches(trial, 0, torch.device("cpu"), None))[0])
