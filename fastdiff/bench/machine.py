"""What the figures were taken on."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

_PACKAGES = ("fastdiff-runtime", "torch", "diffusers", "transformers", "numpy", "scipy")
_ENVIRONMENT = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "PYTORCH_ALLOC_CONF", "CUDA_MODULE_LOADING", "TORCH_LOGS")


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


def describe(machine: dict[str, Any]) -> str:
    """The fingerprint in one line."""
    packages = machine["packages"]
    gpu = f"{machine['gpu']['name']} (driver {machine['gpu']['driver']}), " if machine["gpu"] else ""
    return (
        f"{gpu}{machine['cpu']}, {machine['cpus_usable']} CPUs, {machine['threads']} torch thread(s), "
        f"torch {packages['torch']}, diffusers {packages['diffusers']}, Python {machine['python']} "
        f"(fingerprint {machine['id']})"
    )


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
        "driver": _driver(),
    }


def _driver() -> str | None:
    """The NVIDIA driver's version, which torch does not tell; None without nvidia-ml-py."""
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return str(pynvml.nvmlSystemGetDriverVersion())
    except pynvml.NVMLError:
        return None
