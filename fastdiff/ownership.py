"""Who holds the loop's state: the template itself (shared), a copy of it (cloned), or tensors (tensorized).

SGLang Diffusion's PR #23716 asked the question: a request carries its scheduler, the sequential path keeps reusing the
stage's, and only a request that runs beside others or outlives the stage gets one of its own. Here the answer has a
policy, a count of the leases in flight, and a third kind of owner that costs no copy.
"""

from __future__ import annotations

import threading
import warnings
import weakref
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Any, Literal, Self

from fastdiff.errors import NotLinear
from fastdiff.probe import tabulate
from fastdiff.stepper import check_scheduler, pristine
from fastdiff.table import StepTable

Ownership = Literal["shared", "cloned", "tensorized"]
Policy = Literal["auto", "reuse", "isolate"]

_in_flight: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()
_lock = threading.Lock()
_dropped: deque[weakref.ref[Any]] = deque()  # templates of dropped leases: a finalizer may not wait for the lock


def acquire(
    template: Any,
    policy: Policy = "auto",
    *,
    isolated: Literal["tensorized", "cloned"] = "tensorized",
    outlives: bool = False,
) -> Lease:
    """Lease `template` (a diffusers scheduler) for one request; a context manager that gives it back.

    "reuse" leases the template itself and raises RuntimeError while another lease holds it. "isolate" always leases
    something of the request's own, a step table or a copy, as `isolated` says; of a class that has no table a copy, as
    the lease's `ownership` then says. "auto" reuses while no other lease of this template is in flight and the request
    does not outlive the stage, and isolates otherwise.
    """
    if template is None:
        raise TypeError("expected a scheduler to lease, got None; no template is ever taken silently")
    if policy not in ("auto", "reuse", "isolate"):
        raise ValueError(f"policy: expected 'auto', 'reuse' or 'isolate', got {policy!r}")
    if isolated not in ("tensorized", "cloned"):
        raise ValueError(f"isolated: expected 'tensorized' or 'cloned', got {isolated!r}")
    try:
        check_scheduler(template)
    except NotLinear:
        isolated = "cloned"
    with suppress(IndexError):
        while True:
            if (dropped := _dropped.popleft()()) is not None:
                _give_back(dropped)
    with _lock:
        others = _in_flight.get(template, 0)
        if policy == "reuse" and (others or outlives):
            raise RuntimeError(
                f"policy 'reuse' shares one {type(template).__name__} between one request at a time: "
                + (f"{others} already hold it" if others else "this one outlives the stage")
                + "; use 'auto' or 'isolate'"
            )
        ownership: Ownership = isolated if policy == "isolate" or others or outlives else "shared"
        _in_flight[template] = others + 1
    try:
        return Lease(template, ownership)
    except BaseException:
        _give_back(template)
        raise


def _give_back(template: Any) -> None:
    with _lock:
        remaining = _in_flight.get(template, 0) - 1
        if remaining > 0:
            _in_flight[template] = remaining
        else:
            _in_flight.pop(template, None)


class Lease:
    """One request's hold on a scheduler, given back once: by `release`, or on leaving the `with` block."""

    _template: Any = None

    def __init__(self, template: Any, ownership: Ownership) -> None:
        self.ownership = ownership
        self._scheduler = template if ownership == "shared" else pristine(template) if ownership == "cloned" else None
        self._template = template

    @property
    def scheduler(self) -> Any:
        """The scheduler to prepare and to step (shared, cloned): the same object each time, prepared or not."""
        self._check_held()
        if self._scheduler is None:
            raise TypeError("a tensorized lease has no scheduler to step: use .tabulate(...)")
        return self._scheduler

    def tabulate(self, num_inference_steps: int | None = None, **kwargs: Any) -> StepTable:
        """The request's step table (tensorized); arguments as `fastdiff.tabulate` takes them."""
        self._check_held()
        if self._scheduler is not None:
            raise TypeError(f"a {self.ownership} lease has a scheduler to step: use .scheduler")
        return tabulate(self._template, num_inference_steps, **kwargs)

    def release(self) -> None:
        """Give the lease back; a second call does nothing."""
        template, self._template, self._scheduler = self._template, None, None
        if template is not None:
            _give_back(template)

    def __del__(self) -> None:
        """Give back what nobody gave back."""
        if self._template is not None:
            _dropped.append(weakref.ref(self._template))
            warnings.warn("a lease was dropped: release it, or use it in a `with` block", ResourceWarning, 2, self)

    def _check_held(self) -> None:
        if self._template is None:
            raise RuntimeError("this lease was given back; acquire another")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.release()
