"""The machine by itself: Python and packages, devices and their free memory, attention kernels, Java."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata

import psutil
import torch
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from mrg_r1.cores import Cores, asked_for, demo_ranks, read_cores, share_cores
from mrg_r1.doctor.finding import Finding
from mrg_r1.kernels import library as kernels
from mrg_r1.metrics.lexical import why_no_meteor
from mrg_r1.policy import flash_attention
from mrg_r1.policy.attention import has_cpu_kernels

_SHOWN = ("torch", "deepspeed", "transformers", "peft")
_FLASH_CAPABILITY = (8, 0)  # Ampere: torch's flash kernels and bfloat16 begin there


@dataclass(frozen=True)
class Device:
    """A CUDA device that this process sees."""

    index: int
    name: str
    free: int  # bytes
    total: int
    capability: tuple[int, int]


def cuda_devices(indices: Sequence[int] | None = None) -> list[Device]:
    """Those that this process sees, or some of them, with what is free on each now."""
    devices = []
    for index in range(torch.cuda.device_count()) if indices is None else indices:
        free, total = torch.cuda.mem_get_info(index)
        name, capability = torch.cuda.get_device_name(index), torch.cuda.get_device_capability(index)
        devices.append(Device(index, name, free, total, capability))
    return devices


def host_memory() -> int:
    """Bytes of this machine's memory that processes can still have."""
    return int(psutil.virtual_memory().available)


def machine_findings(devices: list[Device]) -> list[Finding]:
    """Everything that needs no recipe."""
    found = [*package_findings(), device_finding(devices), kernel_finding(devices), java_finding()]
    return found if devices else [*found, core_finding(read_cores()), compiled_finding()]


def package_findings() -> list[Finding]:
    """Python and the installed packages against the ranges of setup.py; one line where all fit, one for each that does
    not.
    """
    described = metadata.metadata("mrg-r1")
    python = platform.python_version()
    wanted = described["Requires-Python"] or ""
    fits = SpecifierSet(wanted).contains(python, prereleases=True)
    remedy = None if fits else f"Python {wanted} is needed: make a virtual environment of one"
    findings = [Finding("python", "ok" if fits else "failure", python, remedy)]
    requirements = [Requirement(text) for text in metadata.requires("mrg-r1") or []]
    needed = [
        requirement
        for requirement in requirements
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""})
    ]
    wrong = [finding for requirement in needed if (finding := _package(requirement)) is not None]
    if wrong:
        return findings + wrong
    shown = ", ".join(f"{name} {metadata.version(name)}" for name in _SHOWN)
    return [*findings, Finding("packages", "ok", f"{len(needed)} in the ranges of setup.py; {shown}")]


def _package(requirement: Requirement) -> Finding | None:
    name, remedy = f"package {requirement.name}", f"pip install -c constraints.txt '{requirement}'"
    try:
        installed = metadata.version(requirement.name)
    except metadata.PackageNotFoundError:
        return Finding(name, "failure", "not installed", remedy)
    if requirement.specifier.contains(installed, prereleases=True):
        return None
    return Finding(name, "failure", f"{installed} is installed, {requirement.specifier} is needed", remedy)


def device_finding(devices: list[Device]) -> Finding:
    """Where a policy would run."""
    build = f"torch {torch.__version__}"
    if devices:
        listed = "; ".join(
            f"cuda:{one.index} {one.name}, {one.free / 1e9:.1f} of {one.total / 1e9:.1f} GB free" for one in devices
        )
        return Finding("devices", "ok", f"{listed} ({build})")
    cores = f"CPU, {read_cores().usable} cores, {host_memory() / 1e9:.1f} GB of memory free ({build})"
    if torch.version.cuda is not None or torch.version.hip is not None:
        remedy = "nvidia-smi says whether the driver sees a GPU; CUDA_VISIBLE_DEVICES may hide it"
        return Finding("devices", "warning", f"{cores}: a build for GPUs, and none to be seen", remedy)
    return Finding("devices", "ok", f"{cores}: a build for CPUs")


def core_finding(cores: Cores, environment: Mapping[str, str] = os.environ) -> Finding:
    """How many threads a rank on the CPU would get."""
    try:
        asked_for(environment)
    except ValueError as error:
        return Finding("cores", "failure", str(error), "export OMP_NUM_THREADS=1, or unset it")
    ranks = demo_ranks(cores)
    threads = share_cores(cores, ranks=ranks, labeler=True, environment=environment)
    counted = (
        f"{ranks} {'rank' if ranks == 1 else 'ranks'} x {threads.rank} {'thread' if threads.rank == 1 else 'threads'}"
    )
    text = "; ".join([f"{cores.usable} usable: {counted} beside a labeler", *threads.notes])
    return Finding("cores", "warning" if threads.notes else "ok", text)


def compiled_finding() -> Finding:
    """Whether this project's own kernels for CPUs are in use."""
    state = kernels.state()
    remedy = "install gcc, or name a C compiler by CC" if state.missing else None
    return Finding("kernels", "warning" if state.missing else "ok", state.text, remedy)


def kernel_finding(devices: list[Device]) -> Finding:
    """What attention runs on where a recipe does not ask for the flash-attn package: torch's own kernels."""
    if not devices:
        if has_cpu_kernels():
            return Finding("attention", "ok", "torch's flash kernels for CPUs")
        text = "this torch has no flash kernels for CPUs: whole score matrices are held"
        return Finding("attention", "warning", text, "install the torch of constraints.txt")
    old = [device for device in devices if device.capability < _FLASH_CAPABILITY]
    if old:
        one = old[0]
        text = (
            f"cuda:{one.index} {one.name} has compute capability {one.capability[0]}.{one.capability[1]}: bfloat16 "
            "kernels need 8.0"
        )
        return Finding(
            "attention",
            "warning",
            text,
            "policy.dtype=float32 runs there by whole score matrices, slowly; take a newer GPU",
        )
    if not torch.backends.cuda.is_flash_attention_available():
        return Finding(
            "attention",
            "failure",
            "this torch was built without flash attention",
            "install a torch build of pytorch.org",
        )
    return Finding("attention", "ok", f"torch's varlen flash kernels, in bfloat16; {_installed_flash_attn()}")


def _installed_flash_attn() -> str:
    """What of the package is installed; whether it can be used is looked at where a recipe asks for it."""
    found = []
    for name in ("flash-attn", "flash-attn-3"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            continue
    if not found:
        return "the flash-attn package is not installed, nor needed"
    return f"{' and '.join(found)} installed, which policy.attention=flash_attn takes"


def chosen_attention(attention: str, dtype: str, devices: list[Device]) -> str:
    """Of a recipe that asks for the flash-attn package: which version it gets.

    Raises:
        ValueError: it cannot be used here.
    """
    device = torch.device("cuda", devices[0].index) if devices else torch.device("cpu")
    found = flash_attention.find(device=device, dtype=getattr(torch, dtype))
    return f"flash-attn {found.version}, as policy.attention {attention} asks; it has not been measured yet"


def java_finding() -> Finding:
    """METEOR is a Java program; everything else goes without."""
    reason = why_no_meteor()
    if reason is None:
        return Finding("java", "ok", "METEOR can be scored")
    remedy = "install a Java runtime (openjdk-17-jre-headless), or do without"
    return Finding("java", "warning", f"METEOR will be left out: {reason}", remedy)
