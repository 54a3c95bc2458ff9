"""fastdiff: a benchmark-first runtime for diffusion models."""
from fastdiff.probe import tabulate, cache as table_cache
from fastdiff.table import StepTable, prune
