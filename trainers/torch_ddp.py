"""PyTorch DistributedDataParallel: one process a device, gradients averaged by gloo (CPU) or NCCL (GPU)."""

from collections.abc import Mapping
from datetime import timedelta

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

from scalestudy.cluster.host import peak_resident_bytes
from scalestudy.cluster.rank import Rank
from scalestudy.trainers import torch_data, torch_models
from scalestudy.trainers.data import load_arrays
from scalestudy.trainers.models import initial_parameters, model_spec
from scalestudy.trainers.record import Memory
from scalestudy.trainers.trial import ADAM_BETAS, ADAM_EPSILON, Optimizer, Trial


class TorchDdp:
    """The trainer `torch-ddp`."""

    def __init__(self, trial: Trial, rank: Rank) -> None:
        self._trial = trial
        self._rank = rank
        torch.manual_seed(trial.seed + rank.rank)
        torch.set_num_threads(trial.threads_per_device)
        if trial.device == "gpu":
            self._device = torch.device("cuda", rank.local_rank)
            torch.cuda.set_device(self._device)
            # fp32 means fp32: no TF32 in convolutions or matrix products.
            torch.backends.cuda.matmul.allow_tf32 = False
            torch.backends.cudnn.allow_tf32 = False
            # Shapes never change; TensorFlow searches for the fastest convolution unasked.
            torch.backends.cudnn.benchmark = True
        else:
            self._device = torch.device("cpu")
        dist.init_process_group(
            "nccl" if trial.device == "gpu" else "gloo",
            rank=rank.rank,
            world_size=rank.world_size,
            timeout=timedelta(seconds=trial.measurement.deadline_s),
        )

    def build(self) -> None:
        spec = model_spec(self._trial.model, self._trial.data)
        self._network = torch_models.build(spec)
        torch_models.load(self._network, initial_parameters(spec, self._trial.seed))
        self._network.to(self._device)
        self._model = DistributedDataParallel(
            self._network, device_ids=[self._device] if self._device.type == "cuda" else None
        )
        self._optimizer = make_optimizer(self._trial.optimizer, self._model)
        self._arrays = load_arrays(self._trial.data)
        self._batches = torch_data.batches(self._trial, self._rank.rank, self._device, self._arrays)

    def step(self) -> None:
        images, labels = next(self._batches)
        self._optimizer.zero_grad(set_to_none=True)
        loss = cross_entropy(self._model(images), labels)
        loss.backward()
        self._optimizer.step()
        self._loss = loss.detach()

    def synchronize(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)

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

    def parameters(self) -> Mapping[str, NDArray[np.float32]]:
        return {
            name: parameter.detach().cpu().numpy()
            for name, parameter in torch_models.named_parameters(self._network).items()
        }

    def replicas(self) -> tuple[Mapping[str, NDArray[np.float32]], ...]:
        return (self.parameters(),)

    def max_over_ranks(self, value: float) -> float:
        largest = torch.tensor(value, dtype=torch.float64, device=self._device)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX)
        return float(largest.item())

    def versions(self) -> dict[str, str]:
        found = {"torch": str(torch.__version__)}
        if self._device.type == "cuda":
            found["cuda"] = str(torch.version.cuda)
            found["cudnn"] = str(torch.backends.cudnn.version())
            found["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
        return found

    def threads(self) -> dict[str, int]:
        return {"intra_op": torch.get_num_threads(), "inter_op": torch.get_num_interop_threads()}

    def close(self) -> None:
        dist.destroy_process_group()


def make_optimizer(chosen: Optimizer, model: torch.nn.Module) -> torch.optim.Optimizer:
    if chosen.name == "sgd":
        return torch.optim.SGD(model.parameters(), lr=chosen.learning_rate, momentum=chosen.momentum)
    return torch.optim.Adam(model.parameters(), lr=chosen.learning_rate, betas=ADAM_BETAS, eps=ADAM_EPSILON)
