"""What a user of Lightning makes. Lightning is imported here, when one of these is called."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from datetime import timedelta
from functools import cache
from typing import Any

from shardckpt.engine.background.manners import Manners
from shardckpt.engine.background.policy import SavePolicy
from shardckpt.errors import InvalidOperationError
from shardckpt.integrations.frameworks import need
from shardckpt.integrations.lightning.callback import Terms, TheCallback
from shardckpt.integrations.lightning.io import TheIO
from shardckpt.manager.steps.resuming import Overwrite

_EXTRA = "lightning"


def checkpoints(
    like: Any,
    *,
    frozen: Collection[str] = (),
    overwrite: Overwrite = "error",
    saving: SavePolicy | None = None,
    manners: Manners | None = None,
    timeout: timedelta = timedelta(minutes=30),
    tolerate: int = 2,
    storage_options: Mapping[str, object] | None = None,
) -> Any:
    """A callback that saves when and where that `ModelCheckpoint` would, but the whole state of every rank, sharded as
    it is, while training goes on. It is a `ModelCheckpoint` itself, so that `ckpt_path` knows "last" and "best".

        Trainer(callbacks=[checkpoints(ModelCheckpoint("runs/a", monitor="val_loss", save_top_k=3))])

    Saved are the module, optimizers, schedulers, loops, callbacks, precision plugin, data module and hyperparameters,
    the loaders that have a `state_dict`, each rank's, and the random streams. What `ckpt_path` names may be "last" (the
    newest step that is good), "best", a step (".../step_100"), a run, or a checkpoint of Lightning itself. For
    `SingleDeviceStrategy`, `DDPStrategy` and `ModelParallelStrategy`.

    `save_top_k` steps are kept, and always the newest, as with `save_last=True`; `filename` is not used: steps lie in
    `dirpath/step_<global step>`. A save that falls on the last batch of an epoch is made at the end of the epoch.

    Args:
        like: a `ModelCheckpoint`; it is not to be given to the trainer as well.
        frozen: as in `CheckpointManager.save`: what does not change and is stored once ("*").
        overwrite: what becomes of later steps in `dirpath` where training starts afresh; see
            `CheckpointManager.resume`.
        saving: see `SavePolicy`.
        manners: see `Manners`.
        timeout: see `CheckpointManager`.
        tolerate: see `CheckpointManager`.
        storage_options: for fsspec. Lightning itself looks at what "last" names without them: it needs the environment
            (`AWS_ENDPOINT_URL_S3` and the like) to lead there.
    """
    base = need("lightning.pytorch.callbacks", extra=_EXTRA).ModelCheckpoint
    if not isinstance(like, base):
        raise InvalidOperationError(f"checkpoints() is given a ModelCheckpoint of lightning.pytorch, not {like!r:.80}")
    return again(vars(like), Terms(frozen, overwrite, saving, manners, timeout, tolerate, storage_options))


def again(attributes: Mapping[str, Any], terms: Terms) -> Any:
    """The callback with the attributes of a `ModelCheckpoint`; also how it is unpickled."""
    made = _callback_class().__new__(_callback_class())
    made.__dict__.update(attributes)
    made.prepare(terms)
    return made


@cache
def _callback_class() -> Any:
    base = need("lightning.pytorch.callbacks", extra=_EXTRA).ModelCheckpoint
    return type("Checkpoints", (TheCallback, base), {"__module__": __name__})


def checkpoint_io(*, storage_options: Mapping[str, object] | None = None) -> Any:
    """A `CheckpointIO` for `Trainer(plugins=[checkpoint_io()])`: each checkpoint is a run with one step, at the path
    that Lightning gives it (a path, or any URL that fsspec opens), put there whole or not at all, in the background.

    Lightning hands it the whole state on rank 0 and loads it on every rank. Of a checkpoint that is being replaced, or
    removed for a newer one, nothing goes before the newer one is committed. A failed save is raised at the next save,
    load or at the end.
    """
    base = need("lightning.pytorch.plugins.io", extra=_EXTRA)
    return _io_class()(storage_options=storage_options, other=base.TorchCheckpointIO())


@cache
def _io_class() -> Any:
    base = need("lightning.pytorch.plugins.io", extra=_EXTRA).CheckpointIO
    return type("ShardedCheckpointIO", (TheIO, base), {"__module__": __name__, "__abstractmethods__": frozenset()})
