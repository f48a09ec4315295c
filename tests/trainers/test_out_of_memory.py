"""What libraries say when memory runs out, and what they say that only sounds like it."""

import errno
import os
import subprocess
import sys
from copy import copy
from pathlib import Path

import pytest

from scalestudy.trainers.out_of_memory import is_doubtful, shared_memory_advice, whose_memory


def named(name: str, message: str, base: type[Exception] = Exception) -> Exception:
    """Return an error of a framework's class, which is known by its name."""
    error: Exception = type(name, (base,), {})(message)
    return error


TF_GPU = "/job:localhost/replica:0/task:0/device:GPU:0"
ALLOCATOR = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes. Error code 12"

DEVICE = [
    named("OutOfMemoryError", "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.1 GiB"),
    RuntimeError("CUDA error: out of memory"),
    named("AcceleratorError", "CUDA error: out of memory\nSearch for `cudaErrorMemoryAllocation' in CUDA's docs"),
    RuntimeError("Caught OutOfMemoryError in pin memory thread for device 0.\nOriginal Traceback (most recent call …"),
    RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    named("DistBackendError", "NCCL error in: NCCLUtils.cpp:77, unhandled cuda error\nCuda failure 2 'out of memory'"),
    RuntimeError(
        "ncclUnhandledCudaError: Call to CUDA function failed.\nLast error:\nFailed to CUDA calloc 6291456 bytes"
    ),
    named("ResourceExhaustedError", f"OOM when allocating tensor with shape[64,3] on {TF_GPU} by allocator GPU_0_bfc"),
    named("ResourceExhaustedError", "failed to allocate memory [Op:AddV2]"),
    named("ResourceExhaustedError", "{{function_node __wrapped__Conv2D}} [Op:Conv2D]"),
    named("NotFoundError", "No algorithm worked! Error messages: RESOURCE_EXHAUSTED: Out of memory while trying to …"),
    named("InternalError", "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes."),
    named("InternalError", "Failed to allocate request for 2.00GiB (2147483648B) on device ordinal 0"),
    named("InternalError", "failed to allocate 1.52G (1632960512 bytes) from device: CUDA_ERROR_OUT_OF_MEMORY"),
    named("XlaRuntimeError", "RESOURCE_EXHAUSTED: Out of memory allocating 4294967296 bytes."),
    named("HorovodInternalError", "ncclCommInitRank failed: unhandled cuda error, Cuda failure 'out of memory'"),
]
HOST = [
    RuntimeError(f"[enforce fail at alloc_cpu.cpp:117] err == 0. {ALLOCATOR} (Cannot allocate memory)"),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8"
    ),
    RuntimeError("std::bad_alloc"),
    MemoryError(),
    named("_ArrayMemoryError", "Unable to allocate 12.0 GiB for an array with shape (8, 64)", MemoryError),
    named("ResourceExhaustedError", "MemoryError: Unable to allocate 12.0 GiB for an array with shape (8, 64)"),
    named("ResourceExhaustedError", "OOM when allocating tensor with shape[9] on …/device:CPU:0 by allocator cpu"),
    named("ResourceExhaustedError", "OOM when allocating tensor with shape[9] on …/device:CPU:0 by allocator mklcpu"),
    OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)),
    RuntimeError("unable to mmap 1024 bytes from file </data/x>: Cannot allocate memory (12)"),
    RuntimeError("Caught MemoryError in DataLoader worker process 0.\nOriginal Traceback …\nMemoryError"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR_HOST_ALLOCATION_FAILED"),
    RuntimeError("Failed to CUDA host alloc 4194304 bytes"),
    RuntimeError("NCCL error: unhandled system error\nLast error:\nFailed to malloc 65536 bytes"),
    named("ResourceExhaustedError", f"OOM when allocating tensor with shape[9] on {TF_GPU} by allocator gpu_host_bfc"),
]
DOUBTFUL = [
    RuntimeError("GET was unable to find an engine to execute this computation"),
    RuntimeError("Unable to find a valid cuDNN algorithm to run convolution"),
    named("NotFoundError", "No algorithm worked! [Op:Conv2D]"),
    named("UnknownError", "Failed to get convolution algorithm. This is probably because cuDNN failed to initialize"),
    RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
    RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
    named(
        "DistBackendError", "NCCL error in: ProcessGroupNCCL.cpp:1691, unhandled cuda error (run with NCCL_DEBUG=INFO)"
    ),
    RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
    RuntimeError("CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasSgemm( handle, opa, opb, m, n, k)`"),
    named("InternalError", "Failed copying input tensor from CPU:0 to GPU:0: Dst tensor is not initialized."),
    named("UnimplementedError", "DNN library is not found. [Op:Conv2D]"),
    named("FailedPreconditionError", "DNN library initialization failed. Look at the errors above for more details."),
    named("InternalError", "Attempting to perform BLAS operation using StreamExecutor without BLAS support"),
    RuntimeError("[cudnn_frontend] Error: No execution plans support the graph."),
    named("AcceleratorError", "CUDA error: operation failed due to a previous error during capture"),
    RuntimeError("CUDA driver error: CUDA_ERROR_STREAM_CAPTURE_INVALIDATED"),
]
OTHER = [
    RuntimeError("CUDA error: an illegal memory access was encountered"),
    RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned; pinned memory"),
    RuntimeError("Pin memory thread exited unexpectedly"),
    RuntimeError("unsupported memory format option ChannelsLast"),
    named("OutOfResources", "out of resource: shared memory, Required: 262144, Hardware limit: 232448."),
    RuntimeError("CUDA error: too many resources requested for launch"),
    named("InductorError", "RuntimeError: No valid triton configs. OutOfMemoryError: out of resource: triton_mm "
          "Required: 294912 Hardware limit:232448 Reducing block sizes or `num_stages` may help."),
    named("OutOfMemoryError", "out of resource: triton_red_fused_0 Required: 294912 Hardware limit:232448"),
    named("ResourceExhaustedError", "Shared memory size limit exceeded: requested 262144, available: 232448"),
    named("DistBackendError", "NCCL error, unhandled cuda error\nCuda failure 217 'peer access is not supported'"),
    named("DistBackendError", "NCCL error, unhandled cuda error\nCuda failure 700 'an illegal memory access'"),
    RuntimeError("Failed to allocate port 12345"),
    FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), "/data/out_of_memory/1.png"),
    RuntimeError("DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers "
                 "are out of shared memory. Please try to raise your shared memory limit."),
    RuntimeError("unable to write to file </torch_7_1_0>: No space left on device (28)"),
    OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
    named("DistBackendError", "NCCL error in: ProcessGroupNCCL.cpp:94, unhandled system error\nLast error:\n"
          "Error while creating shared memory segment /dev/shm/nccl-Kv2 (size 4096), error: No space left on device"),
    named("ResourceExhaustedError", "/data/x.jpg; Too many open files"),
    named("ResourceExhaustedError", "/tmp/cache; No space left on device"),
    named("ResourceExhaustedError", "Received message larger than max (5000000 vs. 4194304)"),
    RuntimeError("NCCL error: Call to ibv_reg_mr failed with error Cannot allocate memory"),
    RuntimeError("access out of memory bounds"),
    ValueError("precision: 'bf16' needs compute capability 8.0"),
    named("InvalidArgumentError", "Incompatible shapes: [8,10] vs. [4,10] [Op:AddV2]"),
]  # fmt: skip
NEARLY_FULL, HALF_EMPTY = 0.01, 0.5


def words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:60]


@pytest.mark.parametrize("free_share", [None, NEARLY_FULL, HALF_EMPTY])
@pytest.mark.parametrize(
    ("error", "owner"),
    [
        *((error, "device") for error in DEVICE),
        *((error, "host") for error in HOST),
        *((error, None) for error in OTHER),
    ],
    ids=words,
)
def test_whose_memory_ran_out_is_told_by_the_words(
    error: Exception, owner: str | None, free_share: float | None
) -> None:
    assert whose_memory(error, free_share) == owner


@pytest.mark.parametrize("error", DOUBTFUL, ids=words)
def test_doubtful_words_need_a_device_that_is_nearly_full(error: Exception) -> None:
    assert whose_memory(error, NEARLY_FULL) == "device"
    assert whose_memory(error, HALF_EMPTY) is None
    assert whose_memory(error, None) is None


def raised(*errors: Exception, cause: bool = False) -> Exception:
    """Return the last error as it is caught, each raised while the one before was handled, or because of it."""
    seen: Exception | None = None
    for error in map(copy, errors):
        try:
            if cause:
                raise error from seen
            try:
                if seen is not None:
                    raise seen
            finally:
                raise error
        except Exception as caught:
            seen = caught
    assert seen is not None
    return seen


CAPTURE_ENDS = [
    named("AcceleratorError", "CUDA error: operation failed due to a previous error during capture"),
    named("BackendCompilerFailed", "backend='inductor' raised: the compiler stopped"),
    RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"),
]


@pytest.mark.parametrize("cause", [False, True], ids=["while", "because"])
@pytest.mark.parametrize("last", CAPTURE_ENDS, ids=words)
@pytest.mark.parametrize(("first", "owner"), [(DEVICE[0], "device"), (HOST[0], "host"), (OTHER[0], None)])
def test_an_error_is_what_led_to_it(first: Exception, owner: str | None, last: Exception, cause: bool) -> None:
    """A CUDA graph's capture ends by an error over the one that ended it; compilers quote theirs."""
    assert whose_memory(raised(first, last, cause=cause), HALF_EMPTY) == owner
    assert whose_memory(raised(first, OTHER[1], last, cause=cause), HALF_EMPTY) == owner
    doubtful = raised(DOUBTFUL[0], CAPTURE_ENDS[2], cause=cause)
    assert is_doubtful(doubtful)
    assert whose_memory(doubtful, NEARLY_FULL) == "device"


def test_what_was_set_aside_led_to_nothing() -> None:
    error = raised(DEVICE[0], OTHER[0])
    error.__suppress_context__ = True
    assert whose_memory(error) is None


SMALL_SHM = [error for error in OTHER if any(word in str(error) for word in ("torch_", "Bus error", "/dev/shm"))]


@pytest.mark.parametrize("error", SMALL_SHM, ids=words)
def test_who_lacks_shared_memory_is_told_what_to_enlarge(error: Exception) -> None:
    advice = shared_memory_advice(error)
    assert advice is not None
    assert "/dev/shm of " in advice
    assert "--shm-size" in advice
    nccl = "nccl-" in str(error)
    assert ("NCCL_SHM_DISABLE=1" in advice, "loader_workers: 0" in advice) == (nccl, not nccl)


def test_other_errors_have_nothing_to_do_with_shared_memory() -> None:
    told = [shared_memory_advice(error) for error in (*DEVICE, *HOST, *DOUBTFUL)]
    assert not any(told)


DRIVER = """
#include <stddef.h>
int cuInit(unsigned flags) { return (int)flags; }
int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal > 3 ? 101 : 0; }
int cuDevicePrimaryCtxRetain(void **context, int device) {
    *context = (void *)(long)(device + 1);
    return device == 3 ? 2 : 0;
}
static long current;
int cuCtxPushCurrent_v2(void *context) { current = (long)context; return 0; }
int cuMemGetInfo_v2(size_t *free, size_t *total) {
    *free = 1000 / current; *total = 2000;
    return current == 3 ? 700 : 0;
}
"""


def test_the_driver_says_how_much_of_a_device_is_free(tmp_path: Path) -> None:
    """Devices with 1000 and 500 of 2000 bytes free, a broken one, one too full to be asked, none; and no driver."""
    (tmp_path / "driver.c").write_text(DRIVER)
    subprocess.run(
        [
            "cc",
            "-Wall",
            "-Wextra",
            "-Werror",
            "-shared",
            "-fPIC",
            "-o",
            tmp_path / "libcuda.so.1",
            tmp_path / "driver.c",
        ],
        check=True,
    )
    ask = (
        "from scalestudy.cluster.cuda_memory import free_device_share, least_free_share\n"
        "print([free_device_share(device) for device in range(5)], least_free_share(range(3)), least_free_share([2]))"
    )
    told = {
        folder: subprocess.run(
            [sys.executable, "-c", ask],
            env={**os.environ, "LD_LIBRARY_PATH": folder},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for folder in (str(tmp_path), "")
    }
    assert told[str(tmp_path)] == "[0.5, 0.25, None, 0.0, None] 0.25 None\n"
    if not Path("/dev/nvidiactl").exists():
        assert told[""] == "[None, None, None, None, None] None None\n"
