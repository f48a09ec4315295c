"""Horovod on torch: one process a device, gradients averaged by Horovod's own Gloo (CPU) or NCCL (GPU)."""

import importlib.metadata
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from scalestudy.cluster.rank import Rank
from scalestudy.trainers.horovod_rendezvous import join
from scalestudy.trainers.torch_trainer import TorchTrainer
from scalestudy.trainers.trial import Trial

# Passes of backward.
_NEVER = 2**31


class HorovodTorch(TorchTrainer):
    """The trainer `horovod-torch`."""

    _exchanges = True

    def __init__(self, trial: Trial, rank: Rank) -> None:
        super().__init__(trial, rank)
        self._options = join(hvd, trial, rank)

    def max_over_ranks(self, value: float) -> float:
        largest = hvd.allreduce(torch.tensor(value, dtype=torch.float64), op=hvd.Max, name="largest")
        return float(largest.item())

    def exchange_step(self) -> None:
        handles = [
            hvd.allreduce_async_(gradient, op=hvd.Average, name=f"exchange.{index}")
            for index, gradient in enumerate(self._zeros)
        ]
        for handle in handles:
            hvd.synchronize(handle)

    def exchanged_bytes(self) -> int:
        return sum(gradient.nbytes for gradient in self._zeros)

    def all_reduce(self, values: Callable[[int], NDArray[np.float32]]) -> "_AllReduce":
        return _AllReduce(torch.from_numpy(values(self._rank.rank)).to(self._device))

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "horovod": importlib.metadata.version("horovod")}

    def settings(self) -> dict[str, str | int]:
        return {**super().settings(), "communication": "nccl" if self._device.type == "cuda" else "gloo"}

    def close(self) -> None:
        super().close()
        hvd.shutdown()

    @cached_property
    def _zeros(self) -> list[Tensor]:
        """As large as every gradient, in the format that is sent."""
        sent = torch.float16 if self._options.compression == "fp16" else torch.float32
        return [torch.zeros_like(parameter, dtype=sent) for parameter in self._network.parameters()]

    @contextmanager
    def _alone(self) -> Iterator[None]:
        # It exchanges a gradient when it was added to so often.
        delays = self._exchanging._allreduce_delay
        usual = dict(delays)
        delays.update(dict.fromkeys(delays, _NEVER))
        self._exchanges = False
        try:
            with self._exchanging.skip_synchronize():
                yield
        finally:
            self._exchanges = True
            delays.update(usual)
            # Of gradients that wait to be exchanged, which it would insist on.
            self._exchanging._handles.clear()

    def _distribute(self) -> torch.nn.Module:
        hvd.broadcast_parameters(self._network.state_dict(), root_rank=0)
        self._exchanging: Any = hvd.DistributedOptimizer(
            self._optimizer,
            named_parameters=self._network.named_parameters(),
            compression=getattr(hvd.Compression, self._options.compression),
            op=hvd.Average,
        )
        # Horovod makes the optimizer anew, and loses this mark of a fused one: without it the scaler of a scaled loss
        # asks the device at every step whether gradients are finite, and the host waits for the answer.
        if getattr(self._optimizer, "_step_supports_amp_scaling", False):
            self._exchanging._step_supports_amp_scaling = True
        self._optimizer = self._exchanging
        return self._network

    def _update(self) -> None:
        if not (self._exchanges and self._scaler.is_enabled()):
            super()._update()
            return
        # The scaler must see what all ranks see: first the exchange, then the look for infinities.
        self._exchanging.synchronize()
        self._scaler.unscale_(self._optimizer)
        with self._exchanging.skip_synchronize():
            self._scaler.step(self._optimizer)
        self._scaler.update()


class _AllReduce:
    """Horovod's, in place."""

    def __init__(self, message: Tensor) -> None:
        self._message = message

    def __call__(self) -> None:
        hvd.allreduce_(self._message, op=hvd.Sum, name=f"message.{self._message.numel()}")

    def sums(self) -> list[NDArray[np.float32]]:
        return [self._message.cpu().numpy()]
