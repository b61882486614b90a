"""Readers of checkpoints that other programs have written."""
