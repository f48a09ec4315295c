"""What only a GPU can show. Without one these tests are skipped, and say so."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from scalestudy.cluster.ports import free_ports
from scalestudy.cluster.rank import Rank, rank_environ
from scalestudy.trainers.measure import timed_window
from scalestudy.trainers.record import RankReport
from scalestudy.trainers.torch_data import batches
from scalestudy.trainers.torch_trainer import make_optimizer
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Data, Measurement, Optimizer, Trial
from scalestudy.trainers.worker import run

pytestmark = [
    pytest.mark.slow,
    # Of images with one channel torch 2.11 says so of DDP's buckets, once a process.
    pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU: what only a GPU can show is not shown"),
]


RANK = Rank(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, host="here")


@pytest.fixture
def start(make_trial: Callable[..., Trial], monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Return a maker of torch-ddp trainers on the first GPU, closed after the test."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    started: list[Any] = []

    def start(**changes: Any) -> Any:
        for trainer in started:
            trainer.close()
        started.clear()
        monkeypatch.setenv("MASTER_PORT", str(free_ports(1)[0]))
        started.append(TRAINERS["torch-ddp"].load()(make_trial(device="gpu", **changes), RANK))
        return started[-1]

    yield start
    for trainer in started:
        trainer.close()


@pytest.mark.parametrize(("precision", "least", "most"), [("fp32", 0.0, 1e-6), ("tf32", 1e-5, 1e-2)])
def test_tf32_is_off_in_fp32(start: Callable[..., Any], precision: str, least: float, most: float) -> None:
    """TF32 keeps 10 bits of mantissa: a product of 2^-11 off per input where fp32 is 2^-24 off."""
    start(precision=precision)
    left, right = torch.rand(2, 512, 512, device="cuda").unbind()
    exact = left.double() @ right.double()
    off = ((left @ right).double() - exact).abs().max() / exact.abs().max()
    assert least <= off <= most


def test_host_and_device_time_windows_alike(start: Callable[..., Any]) -> None:
    trainer = start()
    trainer.build()
    timed_window(trainer, 50)
    window = timed_window(trainer, 500)
    assert window.device_s == pytest.approx(window.end_s - window.start_s, rel=0.01)


def test_batches_that_are_copied_ahead_come_in_their_order(make_trial: Callable[..., Trial]) -> None:
    trial = make_trial()
    trial = trial.model_copy(update={"data": trial.data.model_copy(update={"source": "synthetic-host"})})
    there, here = (batches(trial, 0, torch.device(device), None) for device in ("cuda", "cpu"))
    for _ in range(20):
        for on_gpu, on_host in zip(next(there), next(here), strict=True):
            assert on_gpu.is_cuda
            assert torch.equal(on_gpu.cpu(), on_host)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_fused_optimizers_do_the_same(name: str) -> None:
    after = []
    for device in ("cuda", "cpu"):
        torch.manual_seed(0)
        model = torch.nn.Linear(64, 64)
        inputs = torch.rand(8, 64)
        model.to(device)
        optimizer = make_optimizer(Optimizer(name=name), model, torch.device(device))
        for _ in range(10):
            optimizer.zero_grad()
            model(inputs.to(device)).square().mean().backward()
            optimizer.step()
        after.append(model.weight.detach().cpu())
    torch.testing.assert_close(*after, rtol=1e-4, atol=1e-6)


@pytest.fixture
def run_rank(
    make_trial: Callable[..., Trial], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., RankReport]:
    """Return a runner of the only rank of a trial, as a worker runs it, within so many bytes of the device."""
    own = os.sched_getaffinity(0)

    def run_rank(limit_bytes: int | None = None, **changes: Any) -> RankReport:
        # A rank names an interface where none is.
        named = rank_environ(RANK, [f"127.0.0.1:{free_ports(1)[0]}"]) | {"GLOO_SOCKET_IFNAME": "lo"}
        for name, value in named.items():
            monkeypatch.setenv(name, value)
        measurement = Measurement(window_s=0.05, windows=2, warm_up_max_s=0.5, telemetry_hz=0, cause_windows=1)
        trial = make_trial(device="gpu", **({"measurement": measurement} | changes))
        torch.cuda.empty_cache()
        torch.cuda.reset_accumulated_memory_stats()
        if limit_bytes:
            torch.cuda.set_per_process_memory_fraction(limit_bytes / torch.cuda.mem_get_info()[1])
        try:
            return run(trial, RANK, tmp_path)
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
            # The next rank compiles its own.
            torch.compiler.reset()
            if dist.is_initialized():
                dist.destroy_process_group()
            # A rank pins its process.
            os.sched_setaffinity(0, own)

    return run_rank


@pytest.mark.parametrize(
    ("execution", "precision"),
    [("eager", "bf16"), ("graph", "fp32"), ("graph", "bf16"), ("graph", "fp16"), ("compiled", "bf16")],
)
def test_a_rank_measures_all_and_closes(run_rank: Callable[..., RankReport], execution: str, precision: str) -> None:
    digits = Data(source="digits", channels=1, image_size=32, classes=10)
    report = run_rank(execution=execution, precision=precision, data=digits, per_device_batch=64)
    assert report.error is None
    assert report.missing == {}
    assert report.test_accuracy is not None
    assert report.whole_windows
    assert report.local_windows
    assert report.local_step_times_s
    assert "close" in report.phases
    assert report.losses[-1].loss is not None
    assert report.software is not None
    assert report.software.settings["communication"] == "nccl"


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("execution", ["graph", "compiled"])
def test_every_execution_learns_the_same(start: Callable[..., Any], execution: str, precision: str) -> None:
    """Losses of 20 steps, apart by no more than rounding in another order makes of them."""
    losses = []
    for way in ("eager", execution):
        trainer = start(execution=way, precision=precision, per_device_batch=64)
        trainer.build()
        seen = []
        for _ in range(20):
            trainer.step()
            seen.append(trainer.loss())
        losses.append(seen)
    assert losses[0][-1] < losses[0][0]
    assert losses[0] == pytest.approx(losses[1], rel={"fp32": 1e-4}.get(precision, 2e-2))


def test_out_of_memory_shows_what_the_allocator_held(run_rank: Callable[..., RankReport]) -> None:
    # 64 MiB of images: nothing to the host, and twice what the allocator may take of the device.
    report = run_rank(2**25, per_device_batch=2**14)
    assert report.error is not None
    assert report.error.kind == "oom"
    assert "Allocated memory" in (report.error.allocator or "")


@pytest.mark.parametrize(
    ("execution", "shares"),
    [("eager", (0.2, 0.5, 0.8, 0.95)), ("graph", (0.2, 0.4, 0.5, 0.6, 0.8, 0.95)), ("compiled", (0.3, 0.9))],
)
def test_whatever_memory_runs_out_in_is_told_as_memory(
    run_rank: Callable[..., RankReport], execution: str, shares: tuple[float, ...]
) -> None:
    """With a part of what a trial takes it ends in its first step, while that is captured, or in the step's parts."""
    data = Data(source="synthetic", channels=3, image_size=64, classes=10)
    changes: dict[str, Any] = {"model": "resnet18", "data": data, "per_device_batch": 256, "execution": execution}
    whole = run_rank(**changes)
    assert whole.error is None
    assert whole.memory is not None
    assert whole.memory.peak_reserved_bytes is not None
    kinds = []
    for share in shares:
        report = run_rank(int(share * whole.memory.peak_reserved_bytes), **changes)
        errors = [report.error, *report.missing.values()]
        kinds += [error.kind for error in errors if error]
        print(execution, share, list(report.phases), [error.message for error in errors if error])
    assert kinds
    assert set(kinds) == {"oom"}
