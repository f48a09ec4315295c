"""What users tune in each way to train, by the framework's own names; units in names.

None: the study does not say, so the framework is not told, and does what its users have unasked. To name a default
is not always the same: DDP told its own 25 MB makes the first bucket 25 MB too, and Horovod does not tune what it was
told.
"""

from typing import Literal

from pydantic import Field

from scalestudy.cluster.frozen import Given


class DdpOptions(Given):
    """DistributedDataParallel's; a communication hook compresses what is exchanged, PowerSGD by its rank."""

    bucket_cap_mb: float | None = Field(default=None, gt=0)
    gradient_as_bucket_view: bool = False
    static_graph: bool = False
    communication_hook: Literal["none", "fp16", "bf16", "powersgd"] = "none"
    powersgd_rank: int = Field(default=1, ge=1, le=2**31 - 1)


class HorovodOptions(Given):
    """Horovod's: its background thread wakes every cycle and fuses what is ready, up to the threshold."""

    fusion_threshold_mb: float | None = Field(default=None, ge=0)
    cycle_time_ms: float | None = Field(default=None, gt=0)
    compression: Literal["none", "fp16"] = "none"
    hierarchical_allreduce: bool = False
    autotune: bool = False


class MultiWorkerOptions(Given):
    """MultiWorkerMirroredStrategy's CommunicationOptions; 0 bytes a pack leave the packing to TensorFlow.

    `auto` is NCCL on GPUs, and what TensorFlow does unasked on CPUs: its ring over gRPC.
    """

    implementation: Literal["auto", "ring", "nccl"] = "auto"
    bytes_per_pack: int = Field(default=0, ge=0, le=2**31 - 1)


class MirroredOptions(Given):
    """MirroredStrategy's cross-device operations; `auto` is a collective: by NCCL on GPUs, in a ring on CPUs."""

    cross_device_ops: Literal["auto", "nccl", "hierarchical_copy", "reduction_to_one_device"] = "auto"


Options = DdpOptions | HorovodOptions | MultiWorkerOptions | MirroredOptions


def changes(options: Options) -> str:
    """Return what differs from the defaults, as `bucket_cap_mb=1 static_graph=True`."""
    return " ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in options.model_dump(exclude_defaults=True).items()
    )
