"""Checkpoints that DCP's own writers made: read and written, without DCP."""
