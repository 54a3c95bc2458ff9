"""fastdiff: a torch.compile and CUDA-graph optimized, benchmark-first runtime for diffusion models.

    runtime = fastdiff.Runtime(pipe)
    results = runtime.generate([fastdiff.Request(prompt="a handwritten seven", scheduler="UniPCMultistep", steps=12)])

Names are loaded when first used; importing fastdiff imports no diffusers, starts no CUDA and sets nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastdiff import models as models
    from fastdiff.acceleration import accelerate as accelerate
    from fastdiff.acceleration import accelerated as accelerated
    from fastdiff.errors import CannotCapture as CannotCapture
    from fastdiff.errors import FastdiffError as FastdiffError
    from fastdiff.errors import NotLinear as NotLinear
    from fastdiff.errors import NumericalError as NumericalError
    from fastdiff.errors import OutOfMemory as OutOfMemory
    from fastdiff.errors import PlanMismatch as PlanMismatch
    from fastdiff.errors import RowsCoupled as RowsCoupled
    from fastdiff.errors import StaleGraph as StaleGraph
    from fastdiff.ownership import Lease as Lease
    from fastdiff.ownership import acquire as acquire
    from fastdiff.plan import CapturePlan as CapturePlan
    from fastdiff.probe import table_cache as table_cache
    from fastdiff.probe import tabulate as tabulate
    from fastdiff.renoising import renoise as renoise
    from fastdiff.request import Request as Request
    from fastdiff.request import Result as Result
    from fastdiff.runtime import Runtime as Runtime
    from fastdiff.scheduler import table_scheduler as table_scheduler
    from fastdiff.session import Session as Session
    from fastdiff.state import RequestState as RequestState
    from fastdiff.table import StepTable as StepTable

_HOMES = {
    "CannotCapture": "errors", "CapturePlan": "plan", "FastdiffError": "errors", "Lease": "ownership", "NotLinear":
    "errors", "NumericalError": "errors", "OutOfMemory": "errors", "PlanMismatch": "errors", "Request": "request",
    "RequestState": "state", "Result": "request", "RowsCoupled": "errors", "Runtime": "runtime", "Session":
    "session", "StaleGraph": "errors", "StepTable": "table", "accelerate": "acceleration", "accelerated":
    "acceleration", "acquire": "ownership", "models": "models", "renoise": "renoising", "table_cache":
    "probe", "table_scheduler": "scheduler", "tabulate": "probe",
}  # fmt: skip

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fastdiff' has no attribute {name!r}")
    home = import_module(f"fastdiff.{_HOMES[name]}")
    value = globals()[name] = home if name == "models" else getattr(home, name)
    return value
