"""How much memory this process holds, and how much it held at most since the last reset; from the Linux kernel's own
counters.

`resource.getrusage` knows only the peak since the process began, imports and model loading included. The kernel's
high-water mark can be set back, so that the peak is that of one unit of work.
"""

from __future__ import annotations

from pathlib import Path

_STATUS = Path("/proc/self/status")
_CLEAR = Path("/proc/self/clear_refs")
_RESET_PEAK = "5"  # proc(5): writing 5 resets VmHWM to the present resident size


def resident_mb() -> float:
    """Resident memory of this process now, in MB of 1024 * 1024 bytes."""
    return _read("VmRSS")


def peak_mb() -> float:
    """The most memory that was resident since `reset_peak`, or since the process began."""
    return _read("VmHWM")


def reset_peak() -> None:
    """Start a new high-water mark at what is resident now.

    Raises:
        OSError: the kernel refuses, as some containers make it do; a peak that includes start-up would be a wrong
            number.
    """
    _CLEAR.write_text(_RESET_PEAK)


def _read(name: str) -> float:
    for line in _STATUS.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return float(value.split()[0]) / 1024  # the kernel writes kB
    raise OSError(f"{_STATUS} has no {name}: memory can be measured on Linux only")
