"""Comparisons with other libraries, each in an environment of its own; `python -m benchmarks.peers` is DCNv2."""
