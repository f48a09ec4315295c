"""NVIDIA devices as NVML tells of them: what they are, how they are connected, and samples of what they do.

What a driver does not answer is null, and `missing` says why, once. Units and meanings are those of NVIDIA's NVML API
reference, and so are the times that a sample stands for:

* `busy` and `memory_busy`: the share of the driver's last period, 1/6 to 1 s long, in which any kernel ran, which one
  small kernel makes 1, and in which memory was read or written.
* `sm_active` and what else is counted inside the chip (GPM, from Hopper on): the mean since the last such value,
  0.25 s or more before. A sample that has none in between is null.
* `power_w`: watts of the moment (NVML_FI_DEV_POWER_INSTANT) where the device tells them. Elsewhere it is what
  nvmlDeviceGetPowerUsage gives, from Ampere on (but GA100) the mean of the last second. `Gpu.power` says which.
* `energy_j`: the device's own counter, in joules; it needs no power.
"""

import ctypes
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal, TypeVar

from scalestudy.cluster.cuda_devices import Failing, Inventory, rank_gpus
from scalestudy.cluster.nvml_library import (
    NvmlError,
    call,
    driver_fault,
    make,
    not_supported,
    number,
    of_code,
    text,
)
from scalestudy.cluster.telemetry import Gpu, Link

# ECC counters and process lists change slowly and take long to ask for.
_SLOW_S = 1.0
# Two samples of GPM that are less than 100 ms apart make no valid value.
_GPM_S = 0.25
_SWITCH = "switch"
_MAX_NVLINKS = 18
# Power of the GPU with its memory, not of the module that also holds a processor.
_GPU_SCOPE = 0
# A field of NVLink summed over all links.
_ALL_LINKS = 2**32 - 1
_MIG_ENABLED = 1
# By nvml.h's nvmlGpuTopologyLevel.
_PATHS = {
    0: "same board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "PCIe host bridge",
    40: "one NUMA node",
    50: "between NUMA nodes",
}
# The part of the union that holds a field's value, by nvml.h's nvmlValueType.
_VALUE_TYPES = ("dVal", "uiVal", "ulVal", "ullVal", "sllVal", "siVal", "usVal")
# Column and GPM metric; NVML tells them in percent.
_GPM = {
    "sm_active": "NVML_GPM_METRIC_SM_UTIL",
    "sm_occupancy": "NVML_GPM_METRIC_SM_OCCUPANCY",
    "tensor_active": "NVML_GPM_METRIC_ANY_TENSOR_UTIL",
    "dram_active": "NVML_GPM_METRIC_DRAM_BW_UTIL",
}

Answer = TypeVar("Answer")


def inventory() -> Inventory:
    """Return this host's GPUs, one that does not work with the reason, or what is wrong with their driver."""
    try:
        call("nvmlInit")
    except NvmlError as error:
        return Inventory(fault=driver_fault(error))
    missing: dict[str, str] = {}
    failing: list[Failing] = []
    try:
        gpus = tuple(gpu for _, gpu in _found(missing, failing))
        return Inventory(gpus=gpus, driver=_driver(), failing=tuple(failing))
    except NvmlError as error:
        return Inventory(fault=driver_fault(error))
    finally:
        with suppress(NvmlError):
            call("nvmlShutdown")


class Gpus:
    """The GPUs of this host; `missing` tells by device and column why something is null."""

    def __init__(self) -> None:
        self.missing: dict[str, str] = {}
        self.driver: str | None = None
        self._events: Any = None
        found: list[tuple[_Device, Gpu]] = []
        failing: list[Failing] = []
        try:
            call("nvmlInit")
            self.driver = _driver()
            found += _found(self.missing, failing)
        except NvmlError as error:
            self.missing["gpu"] = str(error)
        self.missing |= {name: said for name, said, _ in failing}
        self.gpus = tuple(gpu for _, gpu in found)
        self._devices = [device for device, _ in found]
        self.links = tuple(self._links())
        self._watch_xid_events()
        self._pcie = _PcieRates(
            [device for device in list(self._devices) if self._try(device, device.lacks_pcie_counters)]
        )

    def sample(self, at_s: float) -> Iterator[dict[str, Any]]:
        """Yield a row for every device that still answers."""
        xids = self._new_xids()
        for device in list(self._devices):
            if (row := self._try(device, device.sample, at_s)) is not None:
                yield row | self._pcie.of(device) | {"xid": xids.get(device.address)}

    def _try(self, device: "_Device", question: Callable[..., Answer], *arguments: Any) -> Answer | None:
        """Return what a device answers, or None where it is gone: it is asked no more, and the others go on."""
        try:
            return question(*arguments)
        except NvmlError as error:
            # It does not come back without a reset; every further question would take seconds.
            self._devices.remove(device)
            self.missing[device.name] = f"lost at {datetime.now(UTC).isoformat(timespec='seconds')}: {error}"
            return None

    def _links(self) -> Iterator[Link]:
        whole = [device for device in self._devices if not device.mig]
        ends = [(device, *found) for device in whole if (found := self._try(device, device.nvlink_ends)) is not None]
        for (one, from_one, _), (other, from_other, bus) in itertools.combinations(ends, 2):
            direct = from_one.count(bus) if bus else 0
            # Through NVSwitch every GPU reaches every other with all of its links.
            switched = min(from_one.count(_SWITCH), from_other.count(_SWITCH))
            yield Link(a=one.name, b=other.name, path=one.path_to(other), nvlinks=direct or switched)

    def _watch_xid_events(self) -> None:
        if not self._devices:
            return
        try:
            self._events = call("nvmlEventSetCreate")
            kind = number("nvmlEventTypeXidCriticalError")
        except NvmlError as error:
            self._events, self.missing["xid"] = None, str(error)
            return
        for device in list(self._devices):
            if not device.mig:
                self._try(device, device.ask, "xid", "nvmlDeviceRegisterEvents", kind, self._events)

    def _new_xids(self) -> dict[int | None, int]:
        """Return the last XID of each device since the last sample."""
        found: dict[int | None, int] = {}
        try:
            # Ends by NVML_ERROR_TIMEOUT when no event waits.
            while self._events is not None:
                event = call("nvmlEventSetWait_v2", self._events, 0)
                found[_address(event.device)] = event.eventData
        except NvmlError as error:
            if not error.timed_out:
                self.missing.setdefault("xid", str(error))
            if error.final:
                self._events = None
        return found


class _Device:
    """One handle and the questions that it answers; a method raises NvmlError only where the device is gone."""

    def __init__(self, name: str, handle: Any, missing: dict[str, str], mig: bool = False) -> None:
        self.name = name
        self.handle = handle
        self.mig = mig
        self.address = _address(handle)
        self._missing = missing
        self._refused: set[str] = set()
        self._asked_slow_s = self._asked_gpm_s = -_SLOW_S
        self._gpm: _Gpm | None = None
        self._power: Literal["instant", "usual"] | None = None

    def described(self) -> Gpu:
        """Raises NvmlError, too, where the device does not tell its name: then it is not to be used."""
        uuid, model = (text(call(function, self.handle)) for function in ("nvmlDeviceGetUUID", "nvmlDeviceGetName"))
        memory = self.ask("memory_used_bytes", "nvmlDeviceGetMemoryInfo")
        limit_mw = None if self.mig else self.ask("power_limit_w", "nvmlDeviceGetEnforcedPowerLimit")
        self._power = None if self.mig else self._power_reading()
        return Gpu(
            name=self.name,
            uuid=uuid,
            model=model,
            memory_bytes=memory and memory.total,
            power_limit_w=limit_mw and limit_mw / 1e3,
            mig=self.mig,
            mig_mode=not self.mig and self._mig_mode(),
            gpu_instance=self.ask("gpu_instance", "nvmlDeviceGetGpuInstanceId") if self.mig else None,
            compute_instance=self.ask("compute_instance", "nvmlDeviceGetComputeInstanceId") if self.mig else None,
            power=self._power,
            pci_address=None if self.mig else self._pci_address(),
        )

    def _pci_address(self) -> str | None:
        info = self.ask("pci_bus", "nvmlDeviceGetPciInfo")
        return None if info is None else text(info.busId)

    def sample(self, at_s: float) -> dict[str, Any]:
        row: dict[str, Any] = {"time_s": at_s, "device": self.name}
        questions = dict(_MIG_QUESTIONS if self.mig else _QUESTIONS)
        if self._power != "usual":
            questions.pop("power_w", None)
        if time.monotonic() - self._asked_slow_s >= _SLOW_S:
            self._asked_slow_s = time.monotonic()
            questions |= _MIG_SLOW_QUESTIONS if self.mig else _SLOW_QUESTIONS
        for column, question in questions.items():
            if (answer := self._answer(column, question, self.handle)) is not None:
                row |= answer if isinstance(answer, dict) else {column: answer}
        return row if self.mig else row | self._fields() | self._gpm_shares()

    def ask(self, column: str, function: str, *more: Any) -> Any:
        """Return the answer of one of NVML's functions, or None and note why."""
        return self._answer(column, call, function, self.handle, *more)

    def lacks_pcie_counters(self) -> bool:
        return not self.mig and "pcie_tx_bytes" not in self._fields()

    def pcie_rates(self) -> dict[str, int] | None:
        """Return bytes a second, for which the driver watches the link 20 ms each; None where it never will."""
        asked = {column: self._answer(column, question, self.handle) for column, question in _PCIE_RATES.items()}
        if asked.keys() <= self._refused:
            return None
        return {column: rate for column, rate in asked.items() if rate is not None}

    def nvlink_ends(self) -> tuple[list[str], str | None]:
        """Return what every active NVLink ends at, the PCI bus of a GPU or a switch, and the device's own bus."""
        found: list[str] = []
        for link in range(_MAX_NVLINKS):
            try:
                if call("nvmlDeviceGetNvLinkState", self.handle, link):
                    found.append(_nvlink_end(self.handle, link))
            except NvmlError as error:
                # The first link it does not have; before any, NVLink itself.
                if link == 0:
                    self._note("nvlink", error)
                break
        return found, self._pci_address()

    def path_to(self, other: "_Device") -> str | None:
        """Return the way to another over PCIe; None where either of the two does not tell."""
        with suppress(NvmlError):
            return _PATHS.get(call("nvmlDeviceGetTopologyCommonAncestor", self.handle, other.handle))
        return None

    def _power_reading(self) -> Literal["instant", "usual"] | None:
        # What fails once may answer the second time, and is asked for the whole trial otherwise.
        for _ in range(2):
            try:
                [found] = call("nvmlDeviceGetFieldValues", self.handle, [(number("NVML_FI_DEV_POWER_INSTANT"), 0)])
                if found.nvmlReturn:
                    raise of_code(found.nvmlReturn)
                # No device draws 0 W: that is one that only seems to answer.
                if _value(found):
                    self._missing.pop(f"{self.name} power of the moment", None)
                    return "instant"
            except NvmlError as error:
                if error.gone:
                    raise
                self._missing[f"{self.name} power of the moment"] = str(error)
                if error.final:
                    break
            else:
                break
        self.ask("power_w", "nvmlDeviceGetPowerUsage")
        return None if "power_w" in self._refused else "usual"

    def _mig_mode(self) -> bool:
        try:
            return bool(call("nvmlDeviceGetMigMode", self.handle)[0] == _MIG_ENABLED)
        except NvmlError as error:
            # Most GPUs have no MIG mode, which needs no note.
            if error.code is None or error.gone:
                self._note("mig", error)
            return False

    def _fields(self) -> dict[str, float]:
        wanted: dict[str, tuple[int, int]] = {}
        for column, (name, scope, _) in _FIELDS.items():
            if column != "power_w" or self._power == "instant":
                field = self._answer(column, number, name)
                wanted |= {} if field is None else {column: (field, scope)}
        if not wanted:
            return {}
        try:
            values = call("nvmlDeviceGetFieldValues", self.handle, list(wanted.values()))
        except NvmlError as error:
            for column in wanted:
                self._note(column, error)
            return {}
        row: dict[str, float] = {}
        for column, value in zip(wanted, values, strict=True):
            try:
                if value.nvmlReturn:
                    raise of_code(value.nvmlReturn)
                row[column] = _value(value) * _FIELDS[column][2]
            except NvmlError as error:
                self._note(column, error)
        return row

    def _gpm_shares(self) -> dict[str, float]:
        if self._refused >= _GPM.keys() or time.monotonic() - self._asked_gpm_s < _GPM_S:
            return {}
        try:
            self._gpm = self._gpm or _Gpm(self.handle)
            shares = self._gpm.sample(self.handle)
        except NvmlError as error:
            shares = dict.fromkeys(_GPM, error)
        # Seen from here, where the sample has been taken: the next comes no sooner.
        self._asked_gpm_s = time.monotonic()
        row: dict[str, float] = {}
        for column, share in shares.items():
            if isinstance(share, NvmlError):
                self._note(column, share)
            else:
                row[column] = share
        return row

    def _answer(self, column: str, question: Callable[..., Answer], *arguments: Any) -> Answer | None:
        """Return what a question about a column gives, or None and note why; asked no more once that is final."""
        if column in self._refused:
            return None
        try:
            return question(*arguments)
        except NvmlError as error:
            self._note(column, error)
            return None

    def _note(self, column: str, error: NvmlError) -> None:
        if error.gone:
            raise error
        if error.final:
            self._refused.add(column)
        self._missing.setdefault(f"{self.name} {column}", str(error))


class _Gpm:
    """What GPUs from Hopper on count of themselves between two samples; raises NvmlError where one does not."""

    def __init__(self, handle: Any) -> None:
        if not call("nvmlGpmQueryDeviceSupport", handle).isSupportedDevice:
            raise not_supported()
        self._asked = make("c_nvmlGpmMetricsGet_t")
        self._asked.version = number("NVML_GPM_METRICS_GET_VERSION")
        self._asked.numMetrics = len(_GPM)
        for place, metric in enumerate(_GPM.values()):
            self._asked.metrics[place].metricId = number(metric)
        self._newest, self._older = (call("nvmlGpmSampleAlloc") for _ in range(2))
        self._samples = 0

    def sample(self, handle: Any) -> dict[str, float | NvmlError]:
        """Return the shares since the sample before, none at the first; raises NvmlError."""
        call("nvmlGpmSampleGet", handle, self._older)
        # Before anything can fail: the next value counts from here in any case.
        self._newest, self._older = self._older, self._newest
        self._samples += 1
        if self._samples < 2:
            return {}
        self._asked.sample1, self._asked.sample2 = self._older, self._newest
        call("nvmlGpmMetricsGet", self._asked)
        return {
            column: of_code(found.nvmlReturn) if found.nvmlReturn else found.value / 100
            for column, found in zip(_GPM, self._asked.metrics, strict=False)
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
                rates = None
                with suppress(NvmlError):
                    rates = device.pcie_rates()
                if rates is None:
                    devices.remove(device)
                else:
                    self._rates[device.name] = rates
            time.sleep(_SLOW_S)


def _found(missing: dict[str, str], failing: list[Failing]) -> Iterator[tuple[_Device, Gpu]]:
    """Yield every device that can be used, MIG instances behind their GPU; one that cannot be costs itself alone."""
    for index in range(call("nvmlDeviceGetCount")):
        name = f"gpu{index}"
        try:
            device = _Device(name, call("nvmlDeviceGetHandleByIndex", index), missing)
            gpu = device.described()
        except NvmlError as error:
            failing.append(Failing(name, str(error), error.advice))
            continue
        yield device, gpu
        if gpu.mig_mode:
            yield from _instances(device, missing, failing)


def takeable_gpus(listed: str | None) -> tuple[tuple[str, str | None], ...]:
    """Return UUID and PCI address of each GPU, or of the MIG instance, that ranks can take, as CUDA numbers them.

    `listed` is CUDA_VISIBLE_DEVICES. An instance has the address of its GPU. Nothing where NVML does not answer.
    """
    found = inventory()
    known = {gpu.name: gpu for gpu in found.gpus}
    names = rank_gpus(listed, found)
    return tuple((known[name].uuid, known[name.partition("/")[0]].pci_address) for name in names)


def _instances(whole: _Device, missing: dict[str, str], failing: list[Failing]) -> Iterator[tuple[_Device, Gpu]]:
    for index in range(whole.ask("mig", "nvmlDeviceGetMaxMigDeviceCount") or 0):
        name = f"{whole.name}/mig{index}"
        try:
            handle = call("nvmlDeviceGetMigDeviceHandleByIndex", whole.handle, index)
            device = _Device(name, handle, missing, mig=True)
            yield device, device.described()
        except NvmlError as error:
            if not error.not_found:
                failing.append(Failing(name, str(error), error.advice))


def _driver() -> str | None:
    with suppress(NvmlError):
        return text(call("nvmlSystemGetDriverVersion"))
    return None


def _address(handle: Any) -> int | None:
    return ctypes.cast(handle, ctypes.c_void_p).value


def _nvlink_end(handle: Any, link: int) -> str:
    kind = call("nvmlDeviceGetNvLinkRemoteDeviceType", handle, link)
    if kind == number("NVML_NVLINK_DEVICE_TYPE_SWITCH"):
        return _SWITCH
    return text(call("nvmlDeviceGetNvLinkRemotePciInfo", handle, link).busId)


def _value(field: Any) -> float:
    # What lies behind a shorter type in the union is not part of it.
    try:
        value: float = getattr(field.value, _VALUE_TYPES[field.valueType])
    except IndexError:
        raise NvmlError(None, f"a value of the unknown type {field.valueType}") from None
    return value


def _utilization(handle: Any) -> dict[str, float]:
    rates = call("nvmlDeviceGetUtilizationRates", handle)
    return {"busy": rates.gpu / 100, "memory_busy": rates.memory / 100}


def _reasons(handle: Any) -> int:
    # Its newer name is not known to drivers before 535.
    return int(call("nvmlDeviceGetCurrentClocksThrottleReasons", handle))


def _ecc(handle: Any) -> dict[str, int]:
    return {
        column: call("nvmlDeviceGetTotalEccErrors", handle, number(kind), number("NVML_VOLATILE_ECC"))
        for column, kind in (
            ("ecc_corrected", "NVML_MEMORY_ERROR_TYPE_CORRECTED"),
            ("ecc_uncorrected", "NVML_MEMORY_ERROR_TYPE_UNCORRECTED"),
        )
    }


def _processes(handle: Any) -> list[dict[str, int | None]]:
    found = call("nvmlDeviceGetComputeRunningProcesses", handle)
    return [{"pid": process.pid, "memory_bytes": process.usedGpuMemory} for process in found]


def _clock(name: str) -> Callable[[Any], int]:
    return lambda handle: int(call("nvmlDeviceGetClockInfo", handle, number(name)))


def _pcie_rate(name: str) -> Callable[[Any], int]:
    return lambda handle: 1000 * int(call("nvmlDeviceGetPcieThroughput", handle, number(name)))


# By column, or by the first of the columns that a question answers.
_QUESTIONS: dict[str, Callable[[Any], Any]] = {
    "busy": _utilization,
    "memory_used_bytes": lambda handle: call("nvmlDeviceGetMemoryInfo", handle).used,
    "power_w": lambda handle: call("nvmlDeviceGetPowerUsage", handle) / 1e3,
    "energy_j": lambda handle: call("nvmlDeviceGetTotalEnergyConsumption", handle) / 1e3,
    "temperature_c": lambda handle: call("nvmlDeviceGetTemperature", handle, number("NVML_TEMPERATURE_GPU")),
    "sm_clock_mhz": _clock("NVML_CLOCK_SM"),
    "memory_clock_mhz": _clock("NVML_CLOCK_MEM"),
    "throttle_reasons": _reasons,
}
_SLOW_QUESTIONS: dict[str, Callable[[Any], Any]] = {"ecc_corrected": _ecc, "processes": _processes}
_MIG_QUESTIONS = {"memory_used_bytes": _QUESTIONS["memory_used_bytes"]}
_MIG_SLOW_QUESTIONS = {"processes": _processes}
# Field, scope, and what a unit of it is in the column's unit.
_FIELDS: dict[str, tuple[str, int, float]] = {
    "power_w": ("NVML_FI_DEV_POWER_INSTANT", _GPU_SCOPE, 1e-3),
    "pcie_tx_bytes": ("NVML_FI_DEV_PCIE_COUNT_TX_BYTES", 0, 1),
    "pcie_rx_bytes": ("NVML_FI_DEV_PCIE_COUNT_RX_BYTES", 0, 1),
    "nvlink_tx_bytes": ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_TX", _ALL_LINKS, 1024),
    "nvlink_rx_bytes": ("NVML_FI_DEV_NVLINK_THROUGHPUT_DATA_RX", _ALL_LINKS, 1024),
}
_PCIE_RATES = {
    "pcie_tx_bytes_per_s": _pcie_rate("NVML_PCIE_UTIL_TX_BYTES"),
    "pcie_rx_bytes_per_s": _pcie_rate("NVML_PCIE_UTIL_RX_BYTES"),
}
