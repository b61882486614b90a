"""Checkpoints in which each rank has written a file of its own, put together by what the files say."""
