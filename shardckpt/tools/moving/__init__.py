"""Checkpoints from one form into another: sources that read any, sinks that write any, always by bounded pieces."""
