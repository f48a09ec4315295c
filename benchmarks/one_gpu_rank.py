"""A rank of torch-ddp that shares the first GPU with the others, over gloo: NCCL takes one rank a GPU.

It stands in the place of an interpreter: `python one_gpu_rank.py -m scalestudy.trainers.worker FOLDER`.
"""

import sys
from dataclasses import replace
from typing import Any

import torch.distributed as dist

from scalestudy.cluster.rank import Rank
from scalestudy.trainers import worker
from scalestudy.trainers.torch_ddp import TorchDdp
from scalestudy.trainers.trainer import TRAINERS
from scalestudy.trainers.trial import Trial


class OneGpu(TorchDdp):
    """The trainer `torch-ddp`, but for the device and the backend that it takes."""

    def __init__(self, trial: Trial, rank: Rank) -> None:
        join: Any = dist.init_process_group

        def over_gloo(*_: Any, **given: Any) -> None:
            join("gloo", **{name: value for name, value in given.items() if name not in ("backend", "device_id")})

        dist.init_process_group = over_gloo
        try:
            super().__init__(trial, rank.model_copy(update={"devices": (0,)}))
        finally:
            dist.init_process_group = join


if __name__ == "__main__":
    TRAINERS["torch-ddp"] = replace(TRAINERS["torch-ddp"], module="one_gpu_rank", class_name="OneGpu")
    del sys.argv[1:3]
    worker.main()
