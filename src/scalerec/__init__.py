"""Recommenders that get better as they get bigger: RankMixer, HSTU and their baselines, from log to service."""

__version__ = "0.1.0"
