"""What every torch trainer does: the device, the model in its precision, and the step, eager, captured or compiled."""

import io
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy

from scalestudy.cluster.host import peak_resident_bytes
from scalestudy.cluster.rank import Rank
from scalestudy.trainers import torch_data, torch_models
from scalestudy.trainers.data import load_arrays, most_batches_ahead
from scalestudy.trainers.devices import own_devices
from scalestudy.trainers.models import initial_parameters, model_spec
from scalestudy.trainers.record import Memory
from scalestudy.trainers.scratch import scratch_folder
from scalestudy.trainers.software import tf32_in_force
from scalestudy.trainers.trial import ADAM_BETAS, ADAM_EPSILON, Optimizer, Trial

# The compute capability from which on a GPU has the format.
_NEEDS_CAPABILITY = {"tf32": (8, 0), "bf16": (8, 0), "fp16": (5, 3)}
# So often a step runs before it is captured, that DDP has made its buckets (torch's notes on CUDA graphs).
_STEPS_BEFORE_CAPTURE = 11


class TorchTrainer:
    """A process that trains on one device; a subclass says how gradients are exchanged."""

    def __init__(self, trial: Trial, rank: Rank) -> None:
        self._trial = trial
        self._rank = rank
        torch.manual_seed(trial.seed + rank.rank)
        torch.set_num_threads(trial.threads_per_device)
        if trial.device == "gpu":
            self._device = torch.device("cuda", *own_devices(trial, rank))
            torch.cuda.set_device(self._device)
            _check_precision(trial.precision, self._device)
            # Shapes never change; TensorFlow searches for the fastest convolution unasked.
            torch.backends.cudnn.benchmark = True
        else:
            self._device = torch.device("cpu")
        # fp32 means fp32: cuDNN would use TF32 unasked.
        torch.backends.cuda.matmul.allow_tf32 = trial.precision == "tf32"
        torch.backends.cudnn.allow_tf32 = trial.precision == "tf32"
        # Tensor cores want channels last; on CPU it made cnn faster and resnet18 slower.
        fast = trial.device == "gpu" and trial.precision != "fp32"
        self._memory_format = torch.channels_last if fast else torch.contiguous_format
        if trial.execution == "compiled":
            # A cache that another trial has filled would hide what compiling costs.
            os.environ["TORCHINDUCTOR_CACHE_DIR"] = scratch_folder("scalestudy-inductor-")
        self._captures = Captures() if trial.execution == "graph" else None

    @staticmethod
    def visible_gpus() -> int:
        return torch.cuda.device_count()

    @staticmethod
    def cuda_build() -> str | None:
        return torch.version.cuda

    @staticmethod
    def allocator_summary() -> str | None:
        return torch.cuda.memory_summary() if torch.cuda.is_initialized() else None

    @staticmethod
    def allocator_refusals() -> int | None:
        return int(torch.cuda.memory_stats().get("num_ooms", 0)) if torch.cuda.is_initialized() else None

    def build(self) -> None:
        spec = model_spec(self._trial.model, self._trial.data)
        self._network = torch_models.build(spec)
        torch_models.load(self._network, initial_parameters(spec, self._trial.seed))
        self._network.to(self._device)
        self._network.to(memory_format=self._memory_format)  # type: ignore[call-overload]
        self._optimizer = make_optimizer(self._trial.optimizer, self._network, self._device)
        self._model = self._distribute()
        if self._trial.execution == "compiled":
            self._model.compile()
        mixed = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(self._trial.precision)
        self._autocast: AbstractContextManager[Any] = (
            torch.autocast(self._device.type, mixed) if mixed else nullcontext()
        )
        self._scaler = torch.amp.GradScaler(self._device.type, enabled=mixed is torch.float16)
        self._gradients = self._as_executed()
        self._arrays = load_arrays(self._trial.data)
        self._batches = torch_data.batches(
            self._trial, self._rank.rank, self._device, self._arrays, self._memory_format
        )

    def step(self) -> None:
        images, labels = next(self._batches)
        self._loss = self._gradients(images, labels)
        self._update()

    def resident_step(self) -> None:
        self._loss = self._gradients(*self._resident_batch)
        self._update()

    def local_step(self) -> None:
        with self._alone():
            self._loss = self._local_gradients(*self._resident_batch)
            self._update()

    def batches_ahead(self) -> int:
        return most_batches_ahead(self._trial)

    def next_batch(self) -> None:
        next(self._batches)

    def kept(self) -> Callable[[], None]:
        parts: list[Any] = [self._network, self._optimizer, self._scaler]
        # In the host's memory: the device's may be full.
        buffer = io.BytesIO()
        torch.save([part.state_dict() for part in parts], buffer)

        def put_back() -> None:
            buffer.seek(0)
            for part, state in zip(parts, torch.load(buffer, map_location="cpu", weights_only=True), strict=True):
                part.load_state_dict(state)

        return put_back

    @cached_property
    def _resident_batch(self) -> tuple[Tensor, Tensor]:
        images, labels = next(self._batches)
        return images.clone(memory_format=self._memory_format), labels.clone()

    @cached_property
    def _local_gradients(self) -> Callable[[Tensor, Tensor], Tensor]:
        # A graph of its own: the other one has the exchange in it.
        return self._as_executed()

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

    def device_timer(self) -> Callable[[], float | None]:
        if self._device.type != "cuda":
            return lambda: None
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()

        def stop() -> float:
            end.record()
            end.synchronize()
            return float(start.elapsed_time(end)) / 1e3

        return stop

    def loss(self) -> float:
        return float(self._loss.item())

    def test_accuracy(self) -> float | None:
        if self._arrays is None:
            return None
        images, labels = (
            torch.from_numpy(self._arrays.test_images),
            torch.from_numpy(self._arrays.test_labels),
        )
        self._network.eval()
        with torch.no_grad():
            named = torch.cat([self._network(some.to(self._device)).argmax(dim=1).cpu() for some in images.split(256)])
        self._network.train()
        return float((named == labels).double().mean())

    def memory(self) -> Memory:
        if self._device.type != "cuda":
            return Memory(peak_resident_bytes=peak_resident_bytes())
        return Memory(
            peak_resident_bytes=peak_resident_bytes(),
            peak_allocated_bytes=torch.cuda.max_memory_allocated(self._device),
            peak_reserved_bytes=torch.cuda.max_memory_reserved(self._device),
        )

    def reset_peaks(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def parameters(self) -> Mapping[str, NDArray[np.float32]]:
        return {
            name: parameter.detach().cpu().numpy()
            for name, parameter in torch_models.named_parameters(self._network).items()
        }

    def replicas(self) -> tuple[Mapping[str, NDArray[np.float32]], ...]:
        return (self.parameters(),)

    def versions(self) -> dict[str, str]:
        found = {"torch": str(torch.__version__)}
        if self._device.type == "cuda":
            found["cuda"] = str(torch.version.cuda)
            found["cudnn"] = str(torch.backends.cudnn.version())
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        return found

    def settings(self) -> dict[str, str | int]:
        return {
            "intra_op": torch.get_num_threads(),
            "inter_op": torch.get_num_interop_threads(),
            "memory_format": str(self._memory_format).removeprefix("torch."),
            "tf32": int(tf32_in_force(torch.backends.cuda.matmul.allow_tf32, self._trial.device, os.environ)),
            "cudnn_benchmark": int(torch.backends.cudnn.benchmark),
            "fused_optimizer": int(self._device.type == "cuda"),
        }

    def close(self) -> None:
        if self._captures is not None:
            self._captures.release()
        self.synchronize()

    def _distribute(self) -> torch.nn.Module:
        """Return the network to call, its gradients exchanged; may put another optimizer in the place of ours."""
        raise NotImplementedError

    def _alone(self) -> AbstractContextManager[Any]:
        """Return a context in which a step exchanges nothing."""
        raise NotImplementedError

    def _as_executed(self) -> Callable[[Tensor, Tensor], Tensor]:
        """Return the two passes as this trial executes them."""
        if self._captures is None:
            return self._backpropagate
        return self._captures.of(self._backpropagate, self._network)

    def _backpropagate(self, images: Tensor, labels: Tensor) -> Tensor:
        images = images.contiguous(memory_format=self._memory_format)
        self._optimizer.zero_grad()
        with self._autocast:
            loss = cross_entropy(self._model(images), labels)
        self._scaler.scale(loss).backward()
        return loss.detach()

    def _update(self) -> None:
        self._scaler.step(self._optimizer)
        self._scaler.update()


class Captures:
    """The CUDA graphs of one trainer: built, warmed up and captured on one `stream`, in one pool of memory.

    They can share the pool because only one of them runs at a time; what each leaves behind it keeps alive itself.
    """

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()
        self.last_run: CapturedGradients | None = None
        self._graphs: list[CapturedGradients] = []

    def of(self, gradients: Callable[[Tensor, Tensor], Tensor], network: torch.nn.Module) -> "CapturedGradients":
        """Return the two passes as a graph of their own, to be captured at the first call."""
        self._graphs.append(CapturedGradients(gradients, network, self))
        return self._graphs[-1]

    def release(self) -> None:
        """Give all graphs back: NCCL waits without end to leave a process group while one holds its nodes."""
        for graph in self._graphs:
            graph.release()


class CapturedGradients:
    """Forward, backward and exchange as one CUDA graph, captured at the first call.

    The optimizer stays outside: its few kernels gain little, and a scaled loss must be looked at by the host.
    """

    def __init__(
        self, gradients: Callable[[Tensor, Tensor], Tensor], network: torch.nn.Module, captures: Captures
    ) -> None:
        self._gradients = gradients
        self._network = network
        self._captures = captures
        self._graph: torch.cuda.CUDAGraph | None = None

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        if self._graph is None:
            self._capture(images, labels)
        assert self._graph is not None
        if self._captures.last_run is not self:
            # The optimizer would take the gradients that another graph has left.
            for parameter, gradient in self._left:
                parameter.grad = gradient
            self._captures.last_run = self
        self._images.copy_(images, non_blocking=True)
        self._labels.copy_(labels, non_blocking=True)
        self._graph.replay()
        return self._loss

    def release(self) -> None:
        if self._graph is not None:
            self._graph.reset()
            self._graph = None

    def _capture(self, images: Tensor, labels: Tensor) -> None:
        self._images, self._labels = images.clone(), labels.clone()
        # Parameters stay as they are without the optimizer; running statistics do not.
        buffers = list(self._network.buffers())
        kept = [buffer.clone() for buffer in buffers]
        aside = self._captures.stream
        aside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(aside):
            for _ in range(_STEPS_BEFORE_CAPTURE):
                self._gradients(self._images, self._labels)
        torch.cuda.current_stream().wait_stream(aside)
        self._graph = torch.cuda.CUDAGraph()
        # thread_local: the data loader's thread that pins memory allocates meanwhile, which is no fault of the capture.
        with torch.cuda.graph(self._graph, pool=self._captures.pool, stream=aside, capture_error_mode="thread_local"):
            self._loss = self._gradients(self._images, self._labels)
        self._left = [(parameter, parameter.grad) for parameter in self._network.parameters()]
        for buffer, before in zip(buffers, kept, strict=True):
            buffer.copy_(before)


def make_optimizer(chosen: Optimizer, model: torch.nn.Module, device: torch.device) -> torch.optim.Optimizer:
    """Return the optimizer; on GPU fused, one kernel for all parameters instead of several for each few of them."""
    # None: torch chooses.
    fused = True if device.type == "cuda" else None
    if chosen.name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=chosen.learning_rate, momentum=chosen.momentum, fused=fused)
    return torch.optim.Adam(
        model.parameters(), lr=chosen.learning_rate, betas=ADAM_BETAS, eps=ADAM_EPSILON, fused=fused
    )


def _check_precision(precision: str, device: torch.device) -> None:
    needed, there = _NEEDS_CAPABILITY.get(precision, (0, 0)), torch.cuda.get_device_capability(device)
    if there < needed:
        raise ValueError(
            f"precision: {precision!r} needs compute capability {needed[0]}.{needed[1]}, "
            f"{torch.cuda.get_device_name(device)} has {there[0]}.{there[1]}; use fp32"
        )
