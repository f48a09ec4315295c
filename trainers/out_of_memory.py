"""Whether an error says that memory ran out, and whose: every library has its own words for it."""

import errno
import re
import shutil
from collections.abc import Iterator
from typing import Literal

Owner = Literal["device", "host"]

# All are matched in lower case. Words that leave no doubt: the allocators of torch, TensorFlow, XLA, CUDA's libraries
# and NCCL. "Out of memory bounds" is a wrong address.
_DEVICE = re.compile(
    r"out of memory(?! bounds)|out_of_memory|outofmemory"
    r"|oom when allocating"
    r"|(?<!host_)alloc(?:ation)?_failed"
    r"|cudaerrormemoryallocation"
    r"|failed to (?:cuda (?:calloc|malloc)|allocate (?:device )?(?:memory|request|buffer|[\d.]+))\b"
)
_HOST = re.compile(
    r"std::bad_alloc|\bmemoryerror"
    r"|(?:can't|cannot) allocate memory"
    r"|defaultcpuallocator: not enough memory"
    r"|host_allocation_failed"
    r"|by allocator (?:(?:mkl)?cpu\b|\w*host)"
    r"|unable to allocate [\d.]+ [kmgtp]?i?b(?:ytes)? for an array"
    r"|failed to (?:cuda host alloc|allocate host|c?malloc|calloc)\b|could not allocate pinned host memory"
)
# A kernel that asks for more than a processor of the GPU has, or a call that failed for a reason it names.
_NOT_THIS = re.compile(
    r"out of resource: .*(?:hardware limit|required)|shared memory size limit"
    r"|cuda failure (?!2\b)\d+"
)
# Something else is short: disks, descriptors, sizes of messages, /dev/shm, what InfiniBand may lock of the memory.
_NOT_MEMORY = re.compile(
    r"no space left on device|quota exceeded|too many open files|larger than max|out of shared memory|bus error|\bibv_"
)
# What libraries say when none of their ways worked. Want of memory is one reason, an unsuitable build is another.
_DOUBTFUL = re.compile(
    r"unable to find an engine|unable to find a valid cudnn algorithm|no valid convolution algorithms"
    r"|no algorithm worked|failed to get convolution algorithm|no (?:valid )?execution plans"
    r"|dnn library (?:is not found|initialization failed)|without (?:blas|dnn) support"
    r"|dst tensor is not initialized|unhandled cuda error|unhandledcudaerror"
    r"|status_internal_error|status_not_initialized|status_execution_failed"
    r"|previous error during capture|capture_invalidated"
)
# With less of the device free than this, doubtful words mean memory.
LITTLE_FREE_SHARE = 0.1


def whose_memory(error: BaseException, free_device_share: float | None = None) -> Owner | None:
    """Return whose memory ran out, None where the error is another.

    An error that was raised while another was handled, as by the end of a CUDA graph's capture, is what the first one
    was. Doubtful words count only if little of the device is free.
    """
    owners = [owner for each in _and_what_led_to_it(error) if (owner := _whose_memory(each, free_device_share))]
    return owners[0] if owners else None


def is_doubtful(error: BaseException) -> bool:
    """Return whether the error alone does not say if memory ran out: ask the device."""
    return any(_DOUBTFUL.search(str(each).lower()) for each in _and_what_led_to_it(error))


def _and_what_led_to_it(error: BaseException) -> Iterator[BaseException]:
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or (None if following.__suppress_context__ else following.__context__)


def _whose_memory(error: BaseException, free_device_share: float | None) -> Owner | None:
    said = str(error).lower()
    # By name: this module imports no framework.
    if isinstance(error, OSError):
        # It names a file, which may be called anything.
        return "host" if error.errno == errno.ENOMEM else None
    if _NOT_THIS.search(said):
        return None
    classes = {cls.__name__ for cls in type(error).__mro__}
    if _HOST.search(said) and not _NOT_MEMORY.search(said):
        return "host"
    if _DEVICE.search(said) or "OutOfMemoryError" in classes:
        return "device"
    if _NOT_MEMORY.search(said):
        return None
    if isinstance(error, MemoryError):
        return "host"
    if "ResourceExhaustedError" in classes:
        return "device"
    little_free = free_device_share is not None and free_device_share < LITTLE_FREE_SHARE
    return "device" if little_free and _DOUBTFUL.search(said) else None


def shared_memory_advice(error: BaseException) -> str | None:
    """Return what to do where /dev/shm is too small for torch's loaders or for NCCL; None where it is not the cause."""
    said = " ".join(str(each).lower() for each in _and_what_led_to_it(error))
    if re.search(r"/dev/shm/nccl-|error while creating shared memory segment", said):
        whose, otherwise = "NCCL's buffers", "NCCL_SHM_DISABLE=1, which is slower"
    elif re.search(r"out of shared memory|/dev/shm|shared memory\(shm\)|to file </torch_", said):
        whose, otherwise = "the loaders' batches", "loader_workers: 0"
    else:
        return None
    size_mib = shutil.disk_usage("/dev/shm").total / 2**20
    return (
        f"/dev/shm of {size_mib:,.0f} MiB is too small for {whose}: enlarge it (docker --shm-size, Kubernetes "
        f"emptyDir with medium Memory), or set {otherwise}"
    )
