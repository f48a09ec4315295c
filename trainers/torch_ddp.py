"""PyTorch DistributedDataParallel: one process a device, gradients averaged by gloo (CPU) or NCCL (GPU)."""

import os
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from functools import cached_property
from typing import cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook, fp16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook
from torch.nn.parallel import DistributedDataParallel

from scalestudy.cluster.rank import Rank
from scalestudy.trainers.options import DdpOptions
from scalestudy.trainers.torch_trainer import TorchTrainer
from scalestudy.trainers.trial import Trial

# The least that torch takes; its default of 1,000 would be past most measurements.
_POWERSGD_FROM_STEP = 2


class TorchDdp(TorchTrainer):
    """The trainer `torch-ddp`."""

    def __init__(self, trial: Trial, rank: Rank) -> None:
        super().__init__(trial, rank)
        assert isinstance(trial.options, DdpOptions)
        self._options = trial.options
        if trial.execution == "graph":
            # NCCL's watchdog asks CUDA for events, which a capture forbids (torch's notes on CUDA graphs).
            os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] = "0"
        dist.init_process_group(
            "nccl" if trial.device == "gpu" else "gloo",
            rank=rank.rank,
            world_size=rank.world_size,
            timeout=timedelta(seconds=trial.measurement.deadline_s),
        )

    def max_over_ranks(self, value: float) -> float:
        largest = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest.item())

    def exchange_step(self) -> None:
        # All at once and then awaited, as DDP does at the end of its backward pass.
        for work in [dist.all_reduce(bucket, async_op=True) for bucket in self._buckets]:
            work.wait()

    def exchanged_bytes(self) -> int | None:
        # What PowerSGD sends is not as large as its buckets.
        if self._options.communication_hook == "powersgd":
            return None
        return sum(bucket.nbytes for bucket in self._buckets)

    def all_reduce(self, values: Callable[[int], NDArray[np.float32]]) -> "_AllReduce":
        return _AllReduce(torch.from_numpy(values(self._rank.rank)).to(self._device))

    def settings(self) -> dict[str, str | int]:
        found = {**super().settings(), "communication": dist.get_backend()}
        if hasattr(self, "_ddp"):
            found["bucket_bytes"] = "/".join(map(str, self._bucket_sizes_bytes()))
        return found

    def close(self) -> None:
        super().close()
        dist.destroy_process_group()

    @cached_property
    def _buckets(self) -> list[Tensor]:
        """Zeros, as many as DDP sends at a time, in the format that it sends."""
        sent = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(self._options.communication_hook, torch.float32)
        of_parameters = torch.float32.itemsize
        return [
            torch.zeros(size // of_parameters, dtype=sent, device=self._device) for size in self._bucket_sizes_bytes()
        ]

    def _bucket_sizes_bytes(self) -> list[int]:
        told = self._ddp._get_ddp_logging_data()
        # Buckets are made anew after the first steps, in the order in which gradients were ready.
        return [int(size) for size in (told.get("rebuilt_bucket_sizes") or told["bucket_sizes"]).split(",")]

    def _alone(self) -> AbstractContextManager[None]:
        return cast(AbstractContextManager[None], self._ddp.no_sync())

    def _distribute(self) -> torch.nn.Module:
        # What is to be captured must not have met the default stream.
        with torch.cuda.stream(self._captures.stream) if self._captures else nullcontext():
            model = DistributedDataParallel(
                self._network,
                device_ids=[self._device] if self._device.type == "cuda" else None,
                bucket_cap_mb=self._options.bucket_cap_mb,
                gradient_as_bucket_view=self._options.gradient_as_bucket_view,
                static_graph=self._options.static_graph,
            )
        if self._captures:
            torch.cuda.current_stream().wait_stream(self._captures.stream)
        match self._options.communication_hook:
            case "fp16":
                model.register_comm_hook(None, fp16_compress_hook)
            case "bf16":
                model.register_comm_hook(None, bf16_compress_hook)
            case "powersgd":
                state = PowerSGDState(
                    process_group=None,
                    matrix_approximation_rank=self._options.powersgd_rank,
                    start_powerSGD_iter=_POWERSGD_FROM_STEP,
                )
                model.register_comm_hook(state, powerSGD_hook)
        self._ddp = model
        return model


class _AllReduce:
    """torch.distributed's, in place."""

    def __init__(self, message: Tensor) -> None:
        self._message = message

    def __call__(self) -> None:
        dist.all_reduce(self._message)

    def sums(self) -> list[NDArray[np.float32]]:
        return [self._message.cpu().numpy()]
