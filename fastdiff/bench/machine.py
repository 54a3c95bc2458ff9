"""What the figures were taken on, and what its GPU did meanwhile. Read only: no clock or limit is ever set."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypeVar

import torch

_PACKAGES = ("fastdiff-runtime", "torch", "diffusers", "transformers", "numpy", "scipy")
_THROTTLES = {
    "application clocks": "ApplicationsClocksSetting",
    "power cap": "SwPowerCap",
    "hardware slowdown": "HwSlowdown",
    "thermal slowdown": "SwThermalSlowdown",
    "hardware thermal slowdown": "HwThermalSlowdown",
    "power brake": "HwPowerBrakeSlowdown",
}
"""What holds the clocks down, with NVML's names; an idle GPU's low clocks are no throttling."""
_NORMAL = {"application clocks", "power cap"}  # under full load, for as long as it lasts
_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_ALLOC_CONF", "CUDA_MODULE_LOADING", "TORCH_LOGS")

T = TypeVar("T")


def fingerprint(device: torch.device) -> dict[str, Any]:
    """CPU, GPU, versions and settings that move timings; `id` is a hash of those that do not change by the minute."""
    stable: dict[str, Any] = {
        "system": platform.system(),
        "architecture": platform.machine(),
        "cpu": _cpu_model(),
        "cpus_usable": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": _memory_bytes(),
        "simd": torch.backends.cpu.get_cpu_capability(),
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "threads": torch.get_num_threads(),
        "environment": {name: os.environ[name] for name in _ENVIRONMENT if name in os.environ},
        "gpu": _gpu(device) if device.type == "cuda" else None,
    }
    identity = hashlib.sha256(json.dumps(stable, sort_keys=True).encode()).hexdigest()[:12]
    return {"id": identity, **stable, "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None}


def fingerprint_apart(device: torch.device) -> dict[str, Any]:
    """The same, from a process of its own: this one then holds no context on the GPU, nor memory of it."""
    code = "import sys, torch; from fastdiff.bench import machine; machine.tell(torch.device(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", code, str(device)], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def tell(device: torch.device) -> None:
    """Print the fingerprint."""
    sys.stdout.write(json.dumps(fingerprint(device)) + "\n")


def describe(machine: dict[str, Any]) -> str:
    """The fingerprint in one line."""
    packages = machine["packages"]
    gpu = f"{machine['gpu']['name']} (driver {machine['gpu']['driver']}), " if machine["gpu"] else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cpus_usable']} CPUs, {machine['threads']} torch thread(s), "
        f"torch {packages['torch']}, diffusers {packages['diffusers']}, Python {machine['python']} "
        f"(fingerprint {machine['id']})"
    )


def lasting(known: Mapping[str, Any]) -> dict[str, Any]:
    """What of a fingerprint times are of: neither the version that is measured nor what else ran at the time."""
    packages = {name: version for name, version in known["packages"].items() if name != "fastdiff-runtime"}
    moving = ("id", "load_average", "packages")
    return {"packages": packages} | {name: value for name, value in known.items() if name not in moving}


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu(device: torch.device) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(device)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": [properties.major, properties.minor],
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "driver": Nvml(device).driver,
    }


@dataclass(frozen=True)
class GpuState:
    """A GPU between two blocks. None is what NVML does not tell on this one."""

    sm_mhz: int | None
    temperature_c: int | None
    throttles: tuple[str, ...] | None  # what holds the clocks down
    foreign_processes: int | None  # that have a context on the device, this one's not counted

    @property
    def flags(self) -> tuple[str, ...]:
        """What makes times beside it doubtful."""
        slowed = tuple(name for name in self.throttles or () if name not in _NORMAL)
        return (*slowed, "foreign process") if self.foreign_processes else slowed


class Nvml:
    """NVIDIA's management library on one torch device; where it tells nothing, `reason` says why."""

    def __init__(self, device: torch.device) -> None:
        self.reason: str | None = None
        if device.type != "cuda":
            self.reason = f"{device} is no CUDA device"
            return
        try:
            import pynvml
        except ImportError:
            self.reason = "nvidia-ml-py is missing: pip install 'fastdiff-runtime[bench]'"
            return
        self._nvml = pynvml
        try:
            pynvml.nvmlInit()
            # By its UUID: NVML counts devices in another order, and also those that CUDA_VISIBLE_DEVICES hides.
            uuid = torch.cuda.get_device_properties(device).uuid
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
        except pynvml.NVMLError as error:
            self.reason = f"NVML: {error}"

    @property
    def driver(self) -> str | None:
        """The NVIDIA driver's version, which torch does not tell."""
        return None if self.reason else self._ask(lambda: str(self._nvml.nvmlSystemGetDriverVersion()))

    def state(self) -> GpuState | None:
        """Clocks, what holds them down, temperature and company, now."""
        if self.reason:
            return None
        nvml, handle = self._nvml, self._handle
        throttles = self._ask(lambda: nvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle))
        processes = self._ask(lambda: nvml.nvmlDeviceGetComputeRunningProcesses(handle))
        return GpuState(
            sm_mhz=self._ask(lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM)),
            temperature_c=self._ask(lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU)),
            throttles=None
            if throttles is None
            else tuple(
                name
                for name, nvmls in _THROTTLES.items()
                if throttles & getattr(nvml, f"nvmlClocksThrottleReason{nvmls}")
            ),
            # One is this process, whatever its number: within a container NVML's numbers are the host's.
            foreign_processes=None if processes is None else max(0, len(processes) - 1),
        )

    def process_bytes(self) -> tuple[int | None, str | None]:
        """Device bytes of this process, its context included; else None and the reason."""
        if self.reason:
            return None, self.reason
        processes = self._ask(lambda: self._nvml.nvmlDeviceGetComputeRunningProcesses(self._handle))
        if processes is None:
            return None, "NVML does not list the processes of this device"
        used = {one.pid: one.usedGpuMemory for one in processes}
        if os.getpid() not in used:
            return None, f"NVML knows no process {os.getpid()}: in a container it has another number outside"
        if used[os.getpid()] is None:
            return None, "NVML does not tell the bytes of a process under this driver model"
        return used[os.getpid()], None

    def _ask(self, question: Callable[[], T]) -> T | None:
        """The answer; None where this device or driver has none."""
        try:
            return question()
        except self._nvml.NVMLError:
            return None
