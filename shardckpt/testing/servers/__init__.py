"""Servers of one's own, started and stopped with a block."""
