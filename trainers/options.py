"""What users tune in each way to train: the framework's own names and defaults; units in names."""

from typing import Literal

from pydantic import Field

from scalestudy.cluster.frozen import Frozen


class DdpOptions(Frozen):
    """DistributedDataParallel's; a communication hook compresses what is exchanged, PowerSGD by its rank."""

    bucket_cap_mb: float = Field(default=25.0, gt=0)
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    communication_hook: Literal["none", "fp16", "bf16", "powersgd"] = "none"
    powersgd_rank: int = Field(default=1, ge=1)


class HorovodOptions(Frozen):
    """Horovod's: its background thread wakes every cycle and fuses what is ready, up to the threshold."""

    fusion_threshold_mb: float = Field(default=128.0, ge=0)
    cycle_time_ms: float = Field(default=1.0, gt=0)
    compression: Literal["none", "fp16"] = "none"
    hierarchical_allreduce: bool = False
    autotune: bool = False


class MultiWorkerOptions(Frozen):
    """MultiWorkerMirroredStrategy's CommunicationOptions; 0 bytes a pack leave the packing to TensorFlow."""

    implementation: Literal["auto", "ring", "nccl"] = "auto"
    bytes_per_pack: int = Field(default=0, ge=0)


class MirroredOptions(Frozen):
    """MirroredStrategy's cross-device operations; `auto` is NCCL on GPUs and a reduction to one device on CPU."""

    cross_device_ops: Literal["auto", "nccl", "hierarchical_copy", "reduction_to_one_device"] = "auto"


Options = DdpOptions | HorovodOptions | MultiWorkerOptions | MirroredOptions


def changes(options: Options) -> str:
    """Return what differs from the defaults, as `bucket_cap_mb=1 static_graph=True`."""
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in options.model_dump(exclude_defaults=True).items()
    )
