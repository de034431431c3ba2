"""Measures kernels, blocks, training steps, fits and counters beside their peers and against the machine's own ceilings.

The protocol stands in ``docs/benchmarks.md`` and is implemented once, in ``timing.py``. No other room imports this one.
"""
