"""Is a training resumable? `assert_resumable`, for people's own tests of their own models."""

from shardckpt.testing.resumable.check import assert_resumable as assert_resumable
from shardckpt.testing.resumable.training import Training as Training

__all__ = ["Training", "assert_resumable"]
