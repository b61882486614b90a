"""torchtitan, and trainers of its style: a checkpointer with the duties of its own, over the engine.

torchtitan 0.2: `from shardckpt.integrations.titan import Checkpointer as CheckpointManager` where its trainer imports
its own. From 0.3 on: `checkpoint=component().Config(interval=500)` in the trainer's config. A trainer of one's own
makes a `Checkpointer` with a `CheckpointConfig`, or any object that has those names.
"""

from shardckpt.integrations.titan.component import component
from shardckpt.integrations.titan.config import CheckpointConfig
from shardckpt.integrations.titan.duties import Checkpointer

__all__ = ["CheckpointConfig", "Checkpointer", "component"]
