"""Typed errors. Each message says what was expected, what came, and what to do about it."""


class FastdiffError(Exception):
    """Every error that fastdiff raises on purpose, built-in ones (`TypeError`, `ValueError`) apart."""


class NotLinear(FastdiffError):
    """A scheduler (or one of its options) is not a linear system over latents, so no table exists for it."""


class PlanMismatch(FastdiffError):
    """A request does not fit the shapes and capacities of a `CapturePlan`."""


class NumericalError(FastdiffError):
    """A request produced a value that is not finite."""
