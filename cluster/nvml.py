"""NVIDIA devices as NVML tells of them: what they are, how they are connected, and samples of what they do.

What a driver does not answer is null, and `missing` says why, once. Units and meanings are those of NVIDIA's NVML API
reference; `busy` is the share of time in which any kernel ran, which one small kernel makes 1. The share of the chip
that was at work is `sm_active`, which GPUs from Hopper on measure (GPM).
"""

import ctypes
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

import pynvml as nvml

from scalestudy.cluster.telemetry import Gpu, Link

# ECC counters and process lists change slowly and take long to ask for.
_SLOW_S = 1.0
# Errors after which the same question is not asked again: the driver or the device does not have the answer.
_FINAL = {
    nvml.NVML_ERROR_NOT_SUPPORTED,
    nvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    nvml.NVML_ERROR_NO_PERMISSION,
    nvml.NVML_ERROR_INVALID_ARGUMENT,
    nvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
}
_SWITCH = "switch"
# A field of NVLink summed over all links.
_ALL_LINKS = 2**32 - 1
_MIG_ENABLED = 1

# nvml.h's nvmlClocksEventReasons: what keeps a clock below what was asked for; idleness and set clocks do not count.
POWER_CAP = nvml.nvmlClocksThrottleReasonSwPowerCap
THROTTLE_REASONS = {
    nvml.nvmlClocksThrottleReasonHwSlowdown: "hardware slowdown",
    nvml.nvmlClocksThrottleReasonSwThermalSlowdown: "heat (driver)",
    nvml.nvmlClocksThrottleReasonHwThermalSlowdown: "heat (hardware)",
    nvml.nvmlClocksThrottleReasonHwPowerBrakeSlowdown: "power brake",
}
_PATHS = {
    nvml.NVML_TOPOLOGY_INTERNAL: "same board",
    nvml.NVML_TOPOLOGY_SINGLE: "one PCIe switch",
    nvml.NVML_TOPOLOGY_MULTIPLE: "several PCIe switches",
    nvml.NVML_TOPOLOGY_HOSTBRIDGE: "PCIe host bridge",
    nvml.NVML_TOPOLOGY_NODE: "one NUMA node",
    nvml.NVML_TOPOLOGY_SYSTEM: "between NUMA nodes",
}
# Column and GPM metric; NVML tells them in percent.
_GPM = {
    "sm_active": nvml.NVML_GPM_METRIC_SM_UTIL,
    "sm_occupancy": nvml.NVML_GPM_METRIC_SM_OCCUPANCY,
    "tensor_active": nvml.NVML_GPM_METRIC_ANY_TENSOR_UTIL,
    "dram_active": nvml.NVML_GPM_METRIC_DRAM_BW_UTIL,
}


class Gpus:
    """The GPUs of this host; `missing` tells by device and column why something is null."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.gpus: tuple[Gpu, ...] = ()
        self.links: tuple[Link, ...] = ()
        self._devices: list[_Device] = []
        self._events: Any = None
        try:
            nvml.nvmlInit()
        except nvml.NVMLError as error:
            self.missing["gpu"] = str(error)
            return
        uncounted: list[_Device] = []
        for index in range(nvml.nvmlDeviceGetCount()):
            # One that is lost, or another job's, costs itself alone.
            try:
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                found = [_Device(f"gpu{index}", handle, self.missing)]
                found += _mig_devices(f"gpu{index}", handle, self.missing)
                self.gpus += tuple(device.described() for device in found)
                uncounted += [device for device in found if device.lacks_pcie_counters()]
            except nvml.NVMLError as error:
                self.missing[f"gpu{index}"] = str(error)
                continue
            self._devices += found
        with suppress(nvml.NVMLError_GpuIsLost):
            self.links = tuple(self._links())
            self._watch_xid_events()
        self._pcie = _PcieRates(uncounted)

    def sample(self, at_s: float) -> Iterator[dict[str, Any]]:
        """Yield a row for every device that still answers."""
        xids = self._new_xids()
        for device in list(self._devices):
            try:
                row = device.sample(at_s)
            except nvml.NVMLError_GpuIsLost:
                # It does not come back without a reset; every further question would take seconds.
                self._devices.remove(device)
                at = datetime.fromtimestamp(at_s, UTC).isoformat(timespec="seconds")
                self.missing[device.name] = f"lost at {at}: {nvml.NVMLError(nvml.NVML_ERROR_GPU_IS_LOST)}"
                continue
            yield row | self._pcie.of(device) | {"xid": xids.get(device.address)}

    def _links(self) -> Iterator[Link]:
        whole = [device for device in self._devices if not device.mig]
        ends = {device.name: device.nvlink_ends() for device in whole}
        for one, other in itertools.combinations(whole, 2):
            path = one.ask("topology", nvml.nvmlDeviceGetTopologyCommonAncestor, other.handle)
            direct = ends[one.name].count(other.pci_bus())
            # Through NVSwitch every GPU reaches every other with all of its links.
            switched = min(ends[one.name].count(_SWITCH), ends[other.name].count(_SWITCH))
            yield Link(a=one.name, b=other.name, path=_PATHS.get(path), nvlinks=direct or switched)

    def _watch_xid_events(self) -> None:
        try:
            self._events = nvml.nvmlEventSetCreate()
        except nvml.NVMLError as error:
            self.missing["xid"] = str(error)
            return
        for device in self._devices:
            if not device.mig:
                device.ask("xid", nvml.nvmlDeviceRegisterEvents, nvml.nvmlEventTypeXidCriticalError, self._events)

    def _new_xids(self) -> dict[int | None, int]:
        """Return the last XID of each device since the last sample."""
        found: dict[int | None, int] = {}
        with suppress(nvml.NVMLError):
            # Ends by NVML_ERROR_TIMEOUT when no event waits.
            while self._events is not None:
                event = nvml.nvmlEventSetWait_v2(self._events, 0)
                found[_address(event.device)] = event.eventData
        return found


class _Device:
    """One handle and the questions that it answers."""

    def __init__(self, name: str, handle: Any, missing: dict[str, str], mig: bool = False) -> None:
        self.name = name
        self.handle = handle
        self.mig = mig
        self.address = _address(handle)
        self._missing = missing
        self._refused: set[str] = set()
        self._asked_slow_s = -_SLOW_S
        self._gpm = None if mig else self.ask("sm_active", _Gpm)

    def described(self) -> Gpu:
        memory = self.ask("memory_used_bytes", nvml.nvmlDeviceGetMemoryInfo)
        limit_mw = None if self.mig else self.ask("power_limit_w", nvml.nvmlDeviceGetEnforcedPowerLimit)
        return Gpu(
            name=self.name,
            uuid=str(self.ask("uuid", nvml.nvmlDeviceGetUUID)),
            model=str(self.ask("model", nvml.nvmlDeviceGetName)),
            memory_bytes=memory and memory.total,
            power_limit_w=limit_mw and limit_mw / 1e3,
            mig=self.mig,
        )

    def sample(self, at_s: float) -> dict[str, Any]:
        row: dict[str, Any] = {"time_s": at_s, "device": self.name}
        questions = dict(_MIG_QUESTIONS if self.mig else _QUESTIONS)
        if time.monotonic() - self._asked_slow_s >= _SLOW_S:
            self._asked_slow_s = time.monotonic()
            questions |= _MIG_SLOW_QUESTIONS if self.mig else _SLOW_QUESTIONS
        for column, question in questions.items():
            if (answer := self.ask(column, question)) is not None:
                row |= answer if isinstance(answer, dict) else {column: answer}
        if not self.mig:
            row |= self._fields()
        if self._gpm is not None:
            row |= self.ask("sm_active", self._gpm.sample) or {}
        return row

    def ask(self, column: str, question: Callable[..., Any], *more: Any) -> Any:
        """Return the answer, or None and note why; raises NVMLError_GpuIsLost."""
        if column in self._refused:
            return None
        try:
            return question(self.handle, *more)
        except nvml.NVMLError_GpuIsLost:
            raise
        except nvml.NVMLError as error:
            self._refuse(column, error)
            return None

    def lacks_pcie_counters(self) -> bool:
        return not self.mig and "pcie_tx_bytes" not in self._fields()

    def nvlink_ends(self) -> list[str | None]:
        """Return what every active NVLink ends at: the PCI bus of a GPU, or a switch."""
        ends: list[str | None] = []
        for link in range(nvml.NVML_NVLINK_MAX_LINKS):
            try:
                if nvml.nvmlDeviceGetNvLinkState(self.handle, link):
                    kind = nvml.nvmlDeviceGetNvLinkRemoteDeviceType(self.handle, link)
                    switch = kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH
                    end = _SWITCH if switch else nvml.nvmlDeviceGetNvLinkRemotePciInfo(self.handle, link).busId
                    ends.append(end)
            except nvml.NVMLError as error:
                # The first link it does not have; before any, NVLink itself.
                if link == 0:
                    self._refuse("nvlink", error)
                break
        return ends

    def pci_bus(self) -> str | None:
        info = self.ask("pci_bus", nvml.nvmlDeviceGetPciInfo)
        return None if info is None else str(info.busId)

    def _fields(self) -> dict[str, int]:
        wanted = [column for column in _FIELDS if column not in self._refused]
        asked = [_FIELDS[column][:2] for column in wanted]
        row: dict[str, int] = {}
        for column, value in zip(
            wanted, self.ask("fields", nvml.nvmlDeviceGetFieldValues, asked) or () if asked else (), strict=False
        ):
            if value.nvmlReturn == nvml.NVML_SUCCESS:
                row[column] = value.value.ullVal * _FIELDS[column][2]
            else:
                self._refuse(column, nvml.NVMLError(value.nvmlReturn))
        return row

    def _refuse(self, column: str, error: Any) -> None:
        if error.value in _FINAL:
            self._refused.add(column)
        self._missing.setdefault(f"{self.name} {column}", str(error))


class _Gpm:
    """What GPUs from Hopper on count of themselves between two samples; raises NVMLError where one does not."""

    def __init__(self, handle: Any) -> None:
        if not nvml.nvmlGpmQueryDeviceSupport(handle).isSupportedDevice:
            raise nvml.NVMLError(nvml.NVML_ERROR_NOT_SUPPORTED)
        self._last, self._next = nvml.nvmlGpmSampleAlloc(), nvml.nvmlGpmSampleAlloc()
        nvml.nvmlGpmSampleGet(handle, self._last)
        self._asked = nvml.c_nvmlGpmMetricsGet_t()
        self._asked.version = nvml.NVML_GPM_METRICS_GET_VERSION
        self._asked.numMetrics = len(_GPM)
        for place, metric in enumerate(_GPM.values()):
            self._asked.metrics[place].metricId = metric

    def sample(self, handle: Any) -> dict[str, float]:
        nvml.nvmlGpmSampleGet(handle, self._next)
        self._asked.sample1, self._asked.sample2 = self._last, self._next
        nvml.nvmlGpmMetricsGet(self._asked)
        self._last, self._next = self._next, self._last
        return {
            column: found.value / 100
            for column, found in zip(_GPM, self._asked.metrics, strict=False)
            if found.nvmlReturn == nvml.NVML_SUCCESS
        }


class _PcieRates:
    """PCIe throughput of devices that do not count it: NVML watches the link for 20 ms, in a thread of ours."""

    def __init__(self, devices: Sequence[_Device]) -> None:
        self._rates: dict[str, dict[str, int]] = {}
        if devices:
            threading.Thread(target=self._watch, args=[list(devices)], daemon=True).start()

    def of(self, device: _Device) -> dict[str, int]:
        """Return what was last seen, once."""
        return self._rates.pop(device.name, {})

    def _watch(self, devices: list[_Device]) -> None:
        while devices:
            for device in list(devices):
                try:
                    rates = {
                        column: device.ask(column, nvml.nvmlDeviceGetPcieThroughput, counter)
                        for column, counter in _PCIE_RATES.items()
                    }
                except nvml.NVMLError_GpuIsLost:
                    rates = {}
                found = {column: 1000 * kilobytes for column, kilobytes in rates.items() if kilobytes is not None}
                if found:
                    self._rates[device.name] = found
                else:
                    devices.remove(device)
            time.sleep(_SLOW_S)


def visible_gpus(listed: str | None, gpus: Sequence[Gpu]) -> tuple[str, ...]:
    """Return the names of the GPUs that CUDA shows, in its order: `listed` is CUDA_VISIBLE_DEVICES.

    As CUDA reads it: indices or beginnings of UUIDs; what comes after a name it does not know is not seen.
    """
    whole = [gpu for gpu in gpus if not gpu.mig]
    if listed is None:
        return tuple(gpu.name for gpu in whole)
    found: list[str] = []
    for token in filter(None, map(str.strip, listed.split(","))):
        here = [
            gpu.name
            for gpu in gpus
            if (gpu.name == f"gpu{token}" if token.isdigit() else gpu.uuid.lower().startswith(token.lower()))
        ]
        if len(here) != 1:
            break
        found += here
    return tuple(found)


def visible_pci_addresses(listed: str | None) -> tuple[str, ...]:
    """Return the PCI address of each GPU that CUDA shows, in its order: local rank i takes the i-th.

    `listed` is CUDA_VISIBLE_DEVICES. Nothing where NVML does not answer.
    """
    gpus: list[Gpu] = []
    addresses: dict[str, str] = {}
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return ()
    try:
        for index in range(nvml.nvmlDeviceGetCount()):
            name = f"gpu{index}"
            # One that is lost costs itself alone.
            with suppress(nvml.NVMLError):
                handle = nvml.nvmlDeviceGetHandleByIndex(index)
                addresses[name] = str(nvml.nvmlDeviceGetPciInfo(handle).busId)
                handles = {name: handle} | {each.name: each.handle for each in _mig_devices(name, handle, {})}
                gpus += [
                    Gpu(name=each, uuid=str(nvml.nvmlDeviceGetUUID(of)), model="", mig=each != name)
                    for each, of in handles.items()
                ]
        return tuple(addresses[name.partition("/")[0]] for name in visible_gpus(listed, gpus))
    except nvml.NVMLError:
        return ()
    finally:
        nvml.nvmlShutdown()


def _mig_devices(name: str, handle: Any, missing: dict[str, str]) -> Iterator[_Device]:
    # Most GPUs have no MIG mode, which needs no note.
    with suppress(nvml.NVMLError):
        if nvml.nvmlDeviceGetMigMode(handle)[0] != _MIG_ENABLED:
            return
        for index in range(nvml.nvmlDeviceGetMaxMigDeviceCount(handle)):
            with suppress(nvml.NVMLError_NotFound):
                instance = nvml.nvmlDeviceGetMigDeviceHandleByIndex(handle, index)
                yield _Device(f"{name}/mig{index}", instance, missing, mig=True)


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def _utilization(handle: Any) -> dict[str, float]:
    rates = nvml.nvmlDeviceGetUtilizationRates(handle)
    return {"busy": rates.gpu / 100, "memory_busy": rates.memory / 100}


def _reasons(handle: Any) -> int:
    # Its newer name is not known to drivers before 535.
    return int(nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))


def _ecc(handle: Any) -> dict[str, int]:
    return {
        column: nvml.nvmlDeviceGetTotalEccErrors(handle, kind, nvml.NVML_VOLATILE_ECC)
        for column, kind in (
            ("ecc_corrected", nvml.NVML_MEMORY_ERROR_TYPE_CORRECTED),
            ("ecc_uncorrected", nvml.NVML_MEMORY_ERROR_TYPE_UNCORRECTED),
        )
    }


def _processes(handle: Any) -> list[dict[str, int | None]]:
    found = nvml.nvmlDeviceGetComputeRunningProcesses_v3(handle)
    return [{"pid": process.pid, "memory_bytes": process.usedGpuMemory} for process in found]


# By column, or by the first of the columns that a question answers.
_QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "busy": _utilization,
    "memory_used_bytes": lambda handle: nvml.nvmlDeviceGetMemoryInfo(handle).used,
    "power_w": lambda handle: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
    "energy_j": lambda handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3,
    "temperature_c": lambda handle: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    "sm_clock_mhz": lambda handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
    "memory_clock_mhz": lambda handle: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_MEM),
    "throttle_reasons": _reasons,
}
_SLOW_QUESTIONS: dict[str, Callable[[Any], Any]] = {"ecc_corrected": _ecc, "processes": _processes}
_MIG_QUESTIONS = {"memory_used_bytes": _QUESTIONS["memory_used_bytes"]}
_MIG_SLOW_QUESTIONS = {"processes": _processes}
# Field, scope, and bytes in a unit of it.
_FIELDS = {
    "pcie_tx_bytes": (nvml.NVML_FI_DEV_PCIE_COUNT_TX_BYTES, 0, 1),
    "pcie_rx_bytes": (nvml.NVML_FI_DEV_PCIE_COUNT_RX_BYTES, 0, 1),
    "nvlink_tx_bytes": (nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX, _ALL_LINKS, 1024),
    "nvlink_rx_bytes": (nvml.NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX, _ALL_LINKS, 1024),
}
_PCIE_RATES = {
    "pcie_tx_bytes_per_s": nvml.NVML_PCIE_UTIL_TX_BYTES,
    "pcie_rx_bytes_per_s": nvml.NVML_PCIE_UTIL_RX_BYTES,
}
