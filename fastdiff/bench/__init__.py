"""The benchmark: `python -m fastdiff.bench` measures what each way of owning a scheduler costs, and writes a report."""
