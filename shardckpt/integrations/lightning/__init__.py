"""Lightning 2.x: `checkpoints(ModelCheckpoint(...))` among the callbacks, or `checkpoint_io()` among the plugins.

The first saves and loads the state of every rank, sharded or not, while training goes on. The second leaves
`ModelCheckpoint` as it is, and stores what Lightning hands to a `CheckpointIO`: on rank 0, the whole of it.
"""

from shardckpt.integrations.lightning.making import checkpoint_io, checkpoints

__all__ = ["checkpoint_io", "checkpoints"]
