"""Checkpoints of this package, written and read by the calls of `torch.distributed.checkpoint` (DCP)."""
