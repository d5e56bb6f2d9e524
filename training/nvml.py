"""What NVIDIA's management library says of a device: read once into a value, from which every number comes.

    libnvidia-ml.so.1 --> pynvml (nvidia-ml-py) --> Device(index=3, temperature=41, links=(True, True, ...), ...)

What a device cannot tell, because its kind has no such part or its driver is too old, is None and no error. A device
that has fallen off the bus tells nothing at all: ``fault`` says so. Without such a library there are no devices. Loads
no torch.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

# Bits of what slows a device's clocks down, as nvml.h has them.
THROTTLES = {
    0x001: "idle",
    0x002: "clocks set by an application",
    0x004: "software power cap",
    0x008: "hardware slowdown",
    0x010: "sync boost",
    0x020: "software thermal slowdown",
    0x040: "hardware thermal slowdown",
    0x080: "hardware power brake",
    0x100: "display clocks",
    0x200: "board limit",
    0x400: "low reliability voltage",
}
FAULTS = {15: "has fallen off the bus", 16: "has to be reset"}  # NVML_ERROR_GPU_IS_LOST, NVML_ERROR_RESET_REQUIRED
VISIBLE = "CUDA_VISIBLE_DEVICES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """A device, a moment ago."""

    index: int  # among those that the library knows, in the order of their places on the bus
    fault: str = ""  # why it says nothing else
    name: str | None = None
    uuid: str | None = None
    ecc_volatile: int | None = None  # uncorrected errors of memory since the driver was loaded
    ecc_aggregate: int | None = None  # and in the device's life
    remapped_correctable: int | None = None  # rows of memory that were replaced
    remapped_uncorrectable: int | None = None
    remap_pending: bool | None = None  # a row is to be replaced at the next reset
    remap_failed: bool | None = None  # no row was left to replace it
    temperature: int | None = None  # degrees Celsius
    slowdown_temperature: int | None = None  # at which it slows itself down
    throttles: tuple[str, ...] | None = None  # why its clocks are not higher
    watts: float | None = None
    cap_watts: float | None = None  # that is enforced
    default_cap_watts: float | None = None
    sm_mhz: int | None = None
    sm_mhz_most: int | None = None
    memory_mhz: int | None = None
    memory_mhz_most: int | None = None
    links: tuple[bool, ...] | None = None  # NVLink: which are up
    pcie_generation: int | None = None
    pcie_generation_most: int | None = None  # of this device in this machine
    pcie_width: int | None = None
    pcie_width_most: int | None = None
    utilisation: int | None = None  # per cent of the time in which some kernel ran
    memory_used: int | None = None  # bytes
    memory_total: int | None = None
    joules: float | None = None  # since the driver was loaded


class Nvml:
    """The library, set up. ``open_nvml`` makes one."""

    def __init__(self, library: Any) -> None:
        self._library = library
        self.count: int = library.nvmlDeviceGetCount()
        self.driver: str | None = self._ask(library.nvmlSystemGetDriverVersion)
        self.version: str | None = self._ask(library.nvmlSystemGetNVMLVersion)

    def read(self, index: int) -> Device:
        """All of device ``index``."""
        n = self._library
        try:
            handle = n.nvmlDeviceGetHandleByIndex(index)
            ask = self._of(handle)
            remapped = ask("nvmlDeviceGetRemappedRows") or (None,) * 4
            use, memory = ask("nvmlDeviceGetUtilizationRates"), ask("nvmlDeviceGetMemoryInfo")
            uncorrected = n.NVML_MEMORY_ERROR_TYPE_UNCORRECTED
            degrees = ask("nvmlDeviceGetTemperatureV", n.NVML_TEMPERATURE_GPU)
            if degrees is None:
                degrees = ask("nvmlDeviceGetTemperature", n.NVML_TEMPERATURE_GPU)  # of drivers before R570
            return Device(
                index=index,
                name=ask("nvmlDeviceGetName"),
                uuid=ask("nvmlDeviceGetUUID"),
                ecc_volatile=ask("nvmlDeviceGetTotalEccErrors", uncorrected, n.NVML_VOLATILE_ECC),
                ecc_aggregate=ask("nvmlDeviceGetTotalEccErrors", uncorrected, n.NVML_AGGREGATE_ECC),
                remapped_correctable=remapped[0],
                remapped_uncorrectable=remapped[1],
                remap_pending=None if remapped[2] is None else bool(remapped[2]),
                remap_failed=None if remapped[3] is None else bool(remapped[3]),
                temperature=degrees,
                slowdown_temperature=ask("nvmlDeviceGetTemperatureThreshold", n.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN),
                throttles=self._read_throttles(ask),
                watts=_scale(ask("nvmlDeviceGetPowerUsage")),
                cap_watts=_scale(ask("nvmlDeviceGetEnforcedPowerLimit")),
                default_cap_watts=_scale(ask("nvmlDeviceGetPowerManagementDefaultLimit")),
                sm_mhz=ask("nvmlDeviceGetClockInfo", n.NVML_CLOCK_SM),
                sm_mhz_most=ask("nvmlDeviceGetMaxClockInfo", n.NVML_CLOCK_SM),
                memory_mhz=ask("nvmlDeviceGetClockInfo", n.NVML_CLOCK_MEM),
                memory_mhz_most=ask("nvmlDeviceGetMaxClockInfo", n.NVML_CLOCK_MEM),
                links=self._read_links(ask),
                pcie_generation=ask("nvmlDeviceGetCurrPcieLinkGeneration"),
                pcie_generation_most=ask("nvmlDeviceGetMaxPcieLinkGeneration"),
                pcie_width=ask("nvmlDeviceGetCurrPcieLinkWidth"),
                pcie_width_most=ask("nvmlDeviceGetMaxPcieLinkWidth"),
                utilisation=None if use is None else use.gpu,
                memory_used=None if memory is None else memory.used,
                memory_total=None if memory is None else memory.total,
                joules=_scale(ask("nvmlDeviceGetTotalEnergyConsumption")),
            )
        except n.NVMLError as error:
            return Device(index=index, fault=FAULTS.get(error.value, f"does not answer: {error}"))

    def _of(self, handle: Any) -> Callable[..., Any]:
        """What asks a function of the library by name, of one device."""

        def ask(name: str, *args: Any) -> Any:
            function = getattr(self._library, name, None)
            return None if function is None else self._ask(function, handle, *args)

        return ask

    def _ask(self, function: Callable[..., Any], *args: Any) -> Any:
        """What the library answers; None where it cannot. Raises its error where the device is not there any more."""
        try:
            return function(*args)
        except self._library.NVMLError as error:
            if error.value in FAULTS:
                raise
            return None

    def _read_throttles(self, ask: Callable[..., Any]) -> tuple[str, ...] | None:
        bits = ask("nvmlDeviceGetCurrentClocksEventReasons")
        if bits is None:
            bits = ask("nvmlDeviceGetCurrentClocksThrottleReasons")  # its name in drivers before R535
        return None if bits is None else tuple(words for bit, words in THROTTLES.items() if bits & bit)

    def _read_links(self, ask: Callable[..., Any]) -> tuple[bool, ...] | None:
        states = (ask("nvmlDeviceGetNvLinkState", link) for link in range(self._library.NVML_NVLINK_MAX_LINKS))
        return tuple(bool(state) for state in states if state is not None) or None


@contextmanager
def open_nvml() -> Iterator[Nvml | None]:
    """The library while entered; None where there is none, or no driver."""
    import pynvml

    with suppress(pynvml.NVMLError):
        pynvml.nvmlInit()
        try:
            yield Nvml(pynvml)
        finally:
            pynvml.nvmlShutdown()
        return
    yield None


def find_visible(environment: Mapping[str, str], devices: Sequence[Device]) -> list[Device]:
    """Those of ``devices`` that CUDA shows to a process with ``environment``, in its order."""
    words = environment.get(VISIBLE)
    if words is None:
        return list(devices)
    found = []
    for word in filter(None, (word.strip() for word in words.split(","))):
        uuid = [
            each for each in devices if each.uuid is not None and word.startswith("GPU-") and each.uuid.startswith(word)
        ]
        index = [each for each in devices if word.isdecimal() and each.index == int(word)]
        if not uuid and not index:
            break  # as CUDA does: what stands behind one that is none counts for nothing
        found.append((uuid or index)[0])
    return found


def _scale(thousandths: int | None) -> float | None:
    return None if thousandths is None else thousandths / 1000
