"""Horovod on torch: one process a device, gradients averaged by Horovod's own Gloo (CPU) or NCCL (GPU)."""

import importlib.metadata
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import horovod.torch as hvd
import torch

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

    def versions(self) -> dict[str, str]:
        return {**super().versions(), "horovod": importlib.metadata.version("horovod")}

    def close(self) -> None:
        super().close()
        hvd.shutdown()

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
