"""How much of a GPU's memory is free, from CUDA's driver: when a framework fails, its own answer may fail too."""

import ctypes
from collections.abc import Iterable

# cuda.h's CUDA_ERROR_OUT_OF_MEMORY.
_OUT_OF_MEMORY = 2


def least_free_share(devices: Iterable[int]) -> float | None:
    """Return which share of the memory of the fullest of some GPUs is free, None where nobody can say."""
    known = [share for device in devices if (share := free_device_share(device)) is not None]
    return min(known, default=None)


def free_device_share(device: int) -> float | None:
    """Return which share of the memory of a GPU, as CUDA numbers them here, is free, None where nobody can say.

    A driver that has no memory left to answer with is an answer too: 0.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    handle, context = ctypes.c_int(), ctypes.c_void_p()
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    # The first that fails ends it. The context is the one that the framework uses, and goes with the process.
    failed = (
        cuda.cuInit(0)
        or cuda.cuDeviceGet(ctypes.byref(handle), device)
        or cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle)
        or cuda.cuCtxPushCurrent_v2(context)
        or cuda.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
    )
    if failed == _OUT_OF_MEMORY:
        return 0.0
    return None if failed or not total.value else free.value / total.value
