"""NVIDIA's management library (NVML), asked by the names of its functions and constants.

Which names there are depends on the `pynvml` that is installed: nvidia-ml-py has provided it for years, and an older
package of that name may stand in front of it. A name that is missing, and a `pynvml` that cannot be imported, are
answers like any other of NVML's errors, so that they cost one column and not the program.
"""

import ctypes
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import pynvml
# Whatever an import may raise: a broken package must not end a program that needs no GPU.
except Exception as error:
    pynvml = None
    _WHY_NONE = f"pynvml cannot be imported ({type(error).__name__}: {error})"

_LIBRARY = "libnvidia-ml.so.1"
# What pynvml raises; nothing where it is too broken to say.
_ERRORS: tuple[type[Exception], ...] = tuple(filter(None, [getattr(pynvml, "NVMLError", None)]))
# nvml.h's nvmlReturn_t.
_NOT_SUPPORTED, _NO_PERMISSION, _NOT_FOUND = 3, 4, 6
_DRIVER_NOT_LOADED, _TIMEOUT, _LIBRARY_NOT_FOUND, _FUNCTION_NOT_FOUND = 9, 10, 12, 13
_GPU_IS_LOST, _RESET_REQUIRED, _VERSION_MISMATCH = 15, 16, 18
_ARGUMENT_VERSION_MISMATCH, _DEPRECATED, _GPU_NOT_FOUND = 25, 26, 28
_NVIDIA_VENDOR, _DISPLAY_CLASS = "0x10de", "0x03"

# An old package `pynvml` hides the file of that name that nvidia-ml-py installs.
_UPGRADE = "pip uninstall pynvml, then pip install --upgrade --force-reinstall nvidia-ml-py"
_RESET = "reset it (`nvidia-smi --gpu-reset`) or reboot"
_ADVICE = {
    None: _UPGRADE,
    _NO_PERMISSION: "ask for it in the job or the container, or have an administrator let you open /dev/nvidia*",
    _DRIVER_NOT_LOADED: "load it (`modprobe nvidia`), install it again after an update of the kernel, or start the "
    "container with its GPUs (docker's --gpus all, apptainer's --nv)",
    _LIBRARY_NOT_FOUND: "install the driver again, or start the container with its GPUs (docker's --gpus all, "
    "apptainer's --nv)",
    _GPU_IS_LOST: _RESET,
    _RESET_REQUIRED: _RESET,
    _VERSION_MISMATCH: "the driver was updated while it ran: reboot, or unload its kernel modules and load them again",
}


class NvmlError(Exception):
    """NVML does not answer a question; `code` is its nvmlReturn_t, null where it could not even be asked."""

    def __init__(self, code: int | None, said: str) -> None:
        super().__init__(said)
        self.code = code

    @property
    def final(self) -> bool:
        """Whether the same question will not be answered later either: the driver or the device cannot tell.

        INVALID_ARGUMENT is not: two samples taken too close together get it as well.
        """
        return self.code in {
            None,
            _NOT_SUPPORTED,
            _NO_PERMISSION,
            _FUNCTION_NOT_FOUND,
            _ARGUMENT_VERSION_MISMATCH,
            _DEPRECATED,
        }

    @property
    def gone(self) -> bool:
        """Whether the device does not come back without a reset."""
        return self.code in {_GPU_IS_LOST, _RESET_REQUIRED, _GPU_NOT_FOUND}

    @property
    def not_found(self) -> bool:
        """Whether what was asked for does not exist."""
        return self.code == _NOT_FOUND

    @property
    def timed_out(self) -> bool:
        """Whether it was waited for in vain."""
        return self.code == _TIMEOUT

    @property
    def advice(self) -> str:
        """How to mend it, as far as its code tells."""
        return _ADVICE.get(self.code, "see what `nvidia-smi` and `dmesg | grep NVRM` say, or reboot")


def call(function: str, *arguments: Any) -> Any:
    """Call one of NVML's functions; raises NvmlError."""
    asked: Callable[..., Any] = _named(function)
    try:
        return asked(*arguments)
    except _ERRORS as error:
        raise of_code(int(error.value)) from None  # type: ignore[attr-defined]


def number(constant: str) -> int:
    """Return one of NVML's constants; raises NvmlError where the installed pynvml does not know it."""
    return int(_named(constant))


def make(structure: str) -> Any:
    """Return a new one of NVML's structures; raises NvmlError."""
    return _named(structure)()


def of_code(code: int) -> NvmlError:
    """Return the error that an nvmlReturn_t stands for, in NVML's words."""
    said = f"NVML error {code}"
    # An old pynvml fails to say what it does not know.
    with suppress(Exception):
        said = str(_named("NVMLError")(code))
    return NvmlError(code, said)


def not_supported() -> NvmlError:
    """Return what a device says that does not have what it is asked for."""
    return of_code(_NOT_SUPPORTED)


def text(answer: Any) -> str:
    """Return a text of NVML's, which an old pynvml gives as bytes."""
    return answer.decode(errors="replace") if isinstance(answer, bytes) else str(answer)


def driver_fault(error: NvmlError, root: Path = Path("/")) -> str | None:
    """Return what is wrong with the driver and how to mend it, when NVML did not start with `error`.

    None where there is nothing to mend: no driver, or the library of one on a machine without a GPU. `root` holds
    the /dev, /proc and /sys to look into.
    """
    said = str(error)
    if error.code == _LIBRARY_NOT_FOUND:
        why = _library_fault()
        # A container that was started without its host's GPUs shares its kernel, and sees the driver there.
        if why is None and not (root / "proc/driver/nvidia/version").exists():
            return None
        said = why or f"the kernel has it loaded, and its library {_LIBRARY} is not here"
    if error.code in {None, _DRIVER_NOT_LOADED, _LIBRARY_NOT_FOUND} and not _gpu_in_machine(root):
        return None
    return f"NVIDIA's driver does not work here: {said.rstrip('.')}; {error.advice}"


def _library_fault() -> str | None:
    """Return why the library that is there cannot be loaded, or None where there is none: NVML tells no difference."""
    try:
        ctypes.CDLL(_LIBRARY)
    except OSError as error:
        absent = _LIBRARY in str(error) and "No such file" in str(error)
        return None if absent else str(error)
    return None


def _gpu_in_machine(root: Path) -> bool:
    """Return whether an NVIDIA GPU shows without NVML: by its driver's files, or on the PCI bus."""
    if (root / "proc/driver/nvidia").exists() or any((root / "dev").glob("nvidia[0-9]*")):
        return True
    return any(
        _read(device / "vendor") == _NVIDIA_VENDOR and _read(device / "class").startswith(_DISPLAY_CLASS)
        for device in (root / "sys/bus/pci/devices").glob("*")
    )


def _read(path: Path) -> str:
    with suppress(OSError):
        return path.read_text(encoding="utf-8", errors="replace").strip()
    return ""


def _named(name: str) -> Any:
    if pynvml is None:
        raise NvmlError(None, _WHY_NONE)
    try:
        return getattr(pynvml, name)
    except AttributeError:
        raise NvmlError(None, f"the installed pynvml has no {name}: {_UPGRADE}") from None
