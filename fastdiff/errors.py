"""Typed errors. Each message says what was expected, what came, and what to do about it."""


class FastdiffError(Exception):
    """Every error that fastdiff raises on purpose, built-in ones (`TypeError`, `ValueError`) apart."""


class NotLinear(FastdiffError):
    """A scheduler (or one of its options) is not a linear system over latents, so no table exists for it."""


class PlanMismatch(FastdiffError):
    """A request does not fit the shapes and capacities of a `CapturePlan`."""


class NumericalError(FastdiffError):
    """A request produced a value that is not finite."""


class CannotCapture(FastdiffError):
    """A CUDA graph was asked for where none is possible: no CUDA device, or a step that cannot be captured."""


class StaleGraph(FastdiffError):
    """The model is no longer the one that was compiled or captured: weights replaced, moved, wrapped or rescaled."""


class RowsCoupled(FastdiffError):
    """A model whose output for one request depends on what other requests of the batch hold."""


class OutOfMemory(FastdiffError):
    """The device has no room for what a plan asks for."""
