"""Training loops that take turns, each in a process of its own: ours, a bare one, and one with timm's model.

In one process a second model would be compiled otherwise than the first, with dynamic shapes, and would find caches
that the first has filled.
"""

import multiprocessing
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from gpu_plan import Case, NoTimeError
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from scalestudy.cluster.ports import free_ports
from scalestudy.cluster.rank import Rank, rank_environ
from scalestudy.trainers import torch_models
from scalestudy.trainers.measure import timed_window
from scalestudy.trainers.models import model_spec
from scalestudy.trainers.torch_trainer import make_optimizer
from scalestudy.trainers.trainer import TRAINERS

LOOPS = ("ours", "bare", "timm")
RANK = Rank(rank=0, world_size=1, local_rank=0, local_world_size=1, node_rank=0, host="here")
# So often a step runs before it is captured, that DDP has made its buckets (torch's notes on CUDA graphs).
_STEPS_BEFORE_CAPTURE = 11
_FIRST_STEPS = 3


class Took(NamedTuple):
    """The seconds of a window, by the host's clock and by the device's, which a CPU has not."""

    host_s: float
    device_s: float | None = None


class NoAnswerError(Exception):
    """A loop is not there, or failed."""


class Contestant:
    """One loop in its own process, which imports what it needs at once and touches the device when told to `build`."""

    def __init__(self, case: Case, name: str) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(case, name, theirs))
        self._process.start()
        theirs.close()

    def build(self, ends_s: float) -> dict[str, Any]:
        """Build the loop and take its first steps; return what they took. Raises NoAnswerError, NoTimeError."""
        self.connection.send(None)
        found: dict[str, Any] = self.answer(ends_s)
        return found

    def window(self, steps: int, ends_s: float) -> Took:
        """Take so many steps. Raises NoAnswerError, NoTimeError."""
        self.connection.send(steps)
        took: Took = self.answer(ends_s)
        return took

    def answer(self, ends_s: float) -> Any:
        """Wait for the answer to what was sent. Raises NoAnswerError, NoTimeError."""
        try:
            if not self.connection.poll(max(0.0, ends_s - time.monotonic())):
                raise NoTimeError("was not done when the time was over")
            answer = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            raise NoAnswerError(f"its process ended with exit code {self._process.exitcode}") from None
        if isinstance(answer, str):
            raise NoAnswerError(answer)
        return answer

    def end(self) -> None:
        """End the process, whatever it does."""
        self._process.kill()
        self._process.join()


def _serve(case: Case, name: str, connection: "Connection[Any, Any]") -> None:
    """Build the loop when told to, then take as many steps as is asked for, until there is nobody to ask."""
    try:
        connection.recv()
        os.environ |= rank_environ(RANK, [f"127.0.0.1:{free_ports(1)[0]}"])
        # A cache that another loop has filled would hide what compiling takes.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = tempfile.mkdtemp()
        began_s = time.perf_counter()
        window = _ours(case) if name == "ours" else _bare(case, name)
        window(_FIRST_STEPS)
        found: dict[str, Any] = {"until_third_step_s": time.perf_counter() - began_s}
        if case.device == "gpu":
            found["peak_reserved_bytes"] = torch.cuda.max_memory_reserved()
            # What cuDNN has tried out is room for the loops that are built next.
            torch.cuda.empty_cache()
        connection.send(found)
        while True:
            connection.send(window(connection.recv()))
    except EOFError:
        pass
    except NoAnswerError as error:
        connection.send(str(error))
    except Exception as error:
        traceback.print_exc()
        connection.send(f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


def _ours(case: Case) -> Callable[[int], Took]:
    trial = case.trial()
    trainer = TRAINERS[trial.trainer].load()(trial, RANK)
    trainer.build()

    def window(steps: int) -> Took:
        taken = timed_window(trainer, steps)
        return Took(taken.end_s - taken.start_s, taken.device_s)

    return window


def _bare(case: Case, name: str) -> Callable[[int], Took]:
    """Return a loop as a user of DDP writes it, with the memory format, precision and optimizer that ours has."""
    trial, data = case.trial(), case.data()
    network = torch_models.build(model_spec(case.model, data)) if name == "bare" else _timm(case.model)
    gpu = case.device == "gpu"
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    if case.execution == "graph":
        # NCCL's watchdog asks CUDA for events, which a capture forbids (torch's notes on CUDA graphs).
        os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
    dist.init_process_group("nccl" if gpu else "gloo", rank=0, world_size=1)
    torch.set_num_threads(trial.threads_per_device)
    torch.backends.cudnn.benchmark = True
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = case.precision == "tf32"
    memory_format = torch.channels_last if gpu and case.precision != "fp32" else torch.contiguous_format
    network.to(device)
    network.to(memory_format=memory_format)  # type: ignore[call-overload]
    images = torch.randn(trial.per_device_batch, data.channels, data.image_size, data.image_size, device=device)
    images = images.contiguous(memory_format=memory_format)
    labels = torch.randint(data.classes, (trial.per_device_batch,), device=device)
    optimizer = make_optimizer(trial.optimizer, network, device)
    aside = torch.cuda.Stream() if case.execution == "graph" else None
    # What is to be captured must not have met the default stream.
    with torch.cuda.stream(aside):
        model: Any = DistributedDataParallel(network)
    if case.execution == "compiled":
        model = torch.compile(model)
    mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(case.precision)
    scaler = torch.amp.GradScaler(device.type, enabled=mixed is torch.float16)

    def gradients() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, mixed, enabled=mixed is not None):
            loss = cross_entropy(model(images), labels)
        scaler.scale(loss).backward()

    step = gradients if aside is None else _captured(gradients, aside)
    synchronize: Callable[[], None] = torch.cuda.synchronize if gpu else lambda: None

    def window(steps: int) -> Took:
        synchronize()
        began_s = time.perf_counter()
        for _ in range(steps):
            step()
            scaler.step(optimizer)
            scaler.update()
        synchronize()
        return Took(time.perf_counter() - began_s)

    return window


def _captured(gradients: Callable[[], None], aside: "torch.cuda.Stream") -> Callable[[], None]:
    """Return forward and backward as one CUDA graph."""
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        for _ in range(_STEPS_BEFORE_CAPTURE):
            gradients()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=aside):
        gradients()

    def replay(keeps: Callable[[], None] = gradients) -> None:
        """Run the graph; `keeps` holds what it reads by address, batch, network and buckets."""
        graph.replay()

    return replay


def _timm(model: str) -> nn.Module:
    """Return timm's model of that name, or torchvision's; raises NoAnswerError where neither has one."""
    try:
        import timm

        if model in timm.list_models():
            return cast(nn.Module, timm.create_model(model))
    except ImportError:
        pass
    try:
        import torchvision

        if hasattr(torchvision.models, model):
            return cast(nn.Module, getattr(torchvision.models, model)())
    except ImportError:
        pass
    raise NoAnswerError(f"neither timm nor torchvision, where one is installed, has a {model}")


def flops_per_image(case: Case) -> float:
    """Return the FLOPs of forward and backward, as torch counts those of convolutions and products; computes none."""
    from torch.utils.flop_counter import FlopCounterMode

    data = case.data()
    with torch.device("meta"):
        network = torch_models.build(model_spec(case.model, data))
        images: Tensor = torch.empty(2, data.channels, data.image_size, data.image_size)
        labels = torch.zeros(2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        cross_entropy(network(images), labels).backward()
    return float(counter.get_total_flops()) / 2
