"""Programs that measure, each by `python -m benchmarks.NAME`, in the surroundings that `scalerec` gives itself."""

from scalerec.__main__ import settle_openmp

settle_openmp()
