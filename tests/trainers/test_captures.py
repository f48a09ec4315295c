"""Captured steps, on a stand-in for torch.cuda that runs on the CPU and notes what it is asked for."""

import errno
import gc
import os
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from scalestudy.cluster.ports import free_ports
from scalestudy.cluster.rank import Rank, rank_environ
from scalestudy.trainers.options import DdpOptions
from scalestudy.trainers.scratch import remove_scratch
from scalestudy.trainers.torch_ddp import TorchDdp
from scalestudy.trainers.trainer import TRAINERS, refusal
from scalestudy.trainers.trial import Data, Trial

RANK = Rank(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, host="here")


class Cuda:
    """As much of torch.cuda as a capture needs; `log` is what was asked for, in order."""

    def __init__(self) -> None:
        self.log: list[str] = []
        self.streams: list[Any] = []
        self.captures: list[dict[str, Any]] = []
        self.current: Any = "default"

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        cuda = self

        class Stream:
            def __init__(self) -> None:
                cuda.streams.append(self)

            def wait_stream(self, other: Any) -> None:
                cuda.log.append("aside waits")

        class Default:
            def wait_stream(self, other: Any) -> None:
                cuda.log.append("default waits")

        class Graph:
            def replay(self) -> None:
                cuda.log.append("replay")

            def reset(self) -> None:
                cuda.log.append("reset")

        @contextmanager
        def stream(of: Any) -> Iterator[None]:
            before, cuda.current = cuda.current, of
            yield
            cuda.current = before

        @contextmanager
        def graph(of: Graph, **options: Any) -> Iterator[None]:
            cuda.captures.append(options)
            with stream(options["stream"]):
                cuda.log.append("capture")
                yield

        class Watched(torch.nn.parallel.DistributedDataParallel):
            def __init__(self, *args: Any, **options: Any) -> None:
                cuda.log.append("built on the default stream" if cuda.current == "default" else "built aside")
                super().__init__(*args, **options)

        monkeypatch.setattr("scalestudy.trainers.torch_ddp.DistributedDataParallel", Watched)
        for name, value in {
            "Stream": Stream,
            "stream": stream,
            "CUDAGraph": Graph,
            "graph": graph,
            "graph_pool_handle": lambda: object(),
            "current_stream": lambda *_: Default(),
        }.items():
            monkeypatch.setattr(torch.cuda, name, value)
        synchronize, destroy = TorchDdp.synchronize, dist.destroy_process_group

        def synchronized(trainer: TorchDdp) -> None:
            cuda.log.append("synchronize")
            synchronize(trainer)

        def destroyed() -> None:
            cuda.log.append("destroy")
            destroy()

        monkeypatch.setattr(TorchDdp, "synchronize", synchronized)
        monkeypatch.setattr(dist, "destroy_process_group", destroyed)


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[Cuda]:
    threads = torch.get_num_threads()
    for name, value in rank_environ(RANK, [f"127.0.0.1:{free_ports(1)[0]}"]).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "1")
    stand_in = Cuda()
    stand_in.patch(monkeypatch)
    yield stand_in
    torch.set_num_threads(threads)


@pytest.fixture
def trainer(cuda: Cuda, make_trial: Callable[..., Trial]) -> Iterator[TorchDdp]:
    trainer = TorchDdp(make_trial(execution="graph"), RANK)
    trainer.build()
    yield trainer
    if dist.is_initialized():
        trainer.close()


def gradients(trainer: TorchDdp) -> list[Tensor | None]:
    return [parameter.grad for parameter in trainer._network.parameters()]


def test_both_graphs_are_released_and_the_device_is_idle_before_the_process_group_goes(
    trainer: TorchDdp, cuda: Cuda
) -> None:
    trainer.step()
    trainer.local_step()
    cuda.log.clear()
    trainer.close()
    assert cuda.log == ["reset", "reset", "synchronize", "destroy"]


def test_graphs_are_built_and_captured_on_one_stream_in_one_pool_while_other_threads_may_allocate(
    trainer: TorchDdp, cuda: Cuda
) -> None:
    trainer.resident_step()
    trainer.local_step()
    assert cuda.log[0] == "built aside"
    assert len(cuda.streams) == 1
    whole, local = cuda.captures
    assert whole["stream"] is local["stream"] is cuda.streams[0]
    assert whole["pool"] is local["pool"]
    assert whole["capture_error_mode"] == local["capture_error_mode"] == "thread_local"


def test_a_step_is_warmed_up_on_the_captures_stream_and_leaves_the_statistics_as_they_were(
    cuda: Cuda, make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DDP has made its buckets after ten steps, and what they use must not be in use elsewhere."""
    data = Data(source="synthetic", channels=3, image_size=32, classes=10)
    trainer = TorchDdp(make_trial(execution="graph", model="resnet18", data=data, per_device_batch=2), RANK)
    trainer.build()
    statistics = [buffer.clone() for buffer in trainer._network.buffers()]
    passes = trainer._backpropagate

    def noted(images: Tensor, labels: Tensor) -> Tensor:
        cuda.log.append("on the default stream" if cuda.current == "default" else "aside")
        return passes(images, labels)

    monkeypatch.setattr(trainer, "_backpropagate", noted)
    trainer._gradients = trainer._as_executed()
    cuda.log.clear()
    trainer.resident_step()
    assert cuda.log == ["aside waits", *["aside"] * 11, "default waits", "capture", "aside", "replay"]
    assert all(torch.equal(now, before) for now, before in zip(trainer._network.buffers(), statistics, strict=True))
    trainer.close()


def test_the_optimizer_takes_the_gradients_of_the_graph_that_ran_last(trainer: TorchDdp) -> None:
    trainer.resident_step()
    whole = gradients(trainer)
    trainer.local_step()
    local = gradients(trainer)
    assert all(one is not other for one, other in zip(whole, local, strict=True))
    trainer.resident_step()
    assert all(one is other for one, other in zip(gradients(trainer), whole, strict=True))
    trainer.local_step()
    assert all(one is other for one, other in zip(gradients(trainer), local, strict=True))


def test_powersgd_is_refused_in_a_graph_on_a_gpu(make_trial: Callable[..., Trial]) -> None:
    trial = make_trial(device="gpu", execution="graph", options=DdpOptions(communication_hook="powersgd"))
    refused = refusal(trial)
    assert refused is not None
    assert refused[0] == "execution"
    assert "PowerSGD" in refused[1]
    assert refusal(make_trial(device="gpu", execution="graph")) is None


def test_a_compilers_process_that_still_cleans_up_costs_no_trial(
    make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inductor's own processes may still write to the folder that is being removed."""
    threads = torch.get_num_threads()
    for name, value in rank_environ(RANK, [f"127.0.0.1:{free_ports(1)[0]}"]).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "")
    trainer = TRAINERS["torch-ddp"].load()(make_trial(execution="compiled"), RANK)
    folder = os.environ["TORCHINDUCTOR_CACHE_DIR"]
    assert Path(folder).is_dir()
    monkeypatch.setattr("shutil.rmtree", _racing(folder))
    trainer.close()
    # The way out of a rank that failed, too.
    remove_scratch()
    torch.set_num_threads(threads)


def _racing(folder: str) -> Callable[..., None]:
    """Return a removal that finds a new file in a folder which it has just emptied."""

    def remove(path: Any, *args: Any, **options: Any) -> None:
        error = OSError(errno.ENOTEMPTY, "Directory not empty", folder)
        # Python 3.12 renamed the handler.
        if handler := options.get("onexc"):
            handler(os.rmdir, folder, error)
        else:
            options["onerror"](os.rmdir, folder, (OSError, error, None))

    return remove


def test_the_benchmark_s_bare_loop_keeps_what_its_graph_reads(cuda: Cuda, monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph that runs on after its batch and network were given back reads what is not its own any more."""
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "benchmarks")
    from gpu_contest import _captured

    batch = torch.zeros(8)
    read = weakref.ref(batch)

    def loop(batch: Tensor) -> Callable[[], None]:
        def gradients() -> None:
            batch.add_(1)

        return _captured(gradients, torch.cuda.Stream())

    replay = loop(batch)
    del batch
    gc.collect()
    assert read() is not None
    replay()
    assert cuda.log[-1] == "replay"
