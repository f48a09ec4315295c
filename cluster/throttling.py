"""What keeps a GPU's clock below what was asked for: the bits of nvml.h's nvmlClocksEventReasons.

They are numbers of NVML's interface and stand here so that samples can be read where no NVML is installed. Idleness
and clocks that somebody has set do not count.
"""

POWER_CAP = 0x04
THROTTLE_REASONS = {
    0x08: "hardware slowdown",
    0x20: "heat (driver)",
    0x40: "heat (hardware)",
    0x80: "power brake",
}
