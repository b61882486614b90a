"""Where `shardckpt` begins and ends. It imports hardly anything by itself, so that Ctrl-C is quiet from here on."""

from __future__ import annotations

import atexit
import os
import signal
import sys

UNUSABLE, INTERRUPTED = 2, 130


def main() -> None:
    """The entry point of `shardckpt` and of `python -m shardckpt`; in the main thread of a process of its own."""
    # As long as nothing has been begun: an exception amid an import would be shown as a traceback, or swallowed.
    quiet = _leave_at_once()
    from shardckpt.cli.outlets import prepare

    prepare()
    from shardckpt.cli.commands import app

    if quiet:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        app(prog_name="shardckpt")  # a command that is interrupted cleans up, and ends with the same status
    except KeyboardInterrupt:  # before the command was known
        sys.exit(INTERRUPTED)
    except OSError as error:  # commands explain their own; this one is of what was to be printed
        print(f"shardckpt: {error}", file=sys.stderr)
        sys.exit(UNUSABLE)
    finally:
        if _leave_at_once():  # what was to be done is done
            # The last thing before Python gives the signal back to the system, which would end the process by it.
            atexit.register(signal.signal, signal.SIGINT, signal.SIG_IGN)


def _leave_at_once() -> bool:
    """Have Ctrl-C end the process, from now on, without another word; unless it was ignored, as `nohup` does."""
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return False
    signal.signal(signal.SIGINT, lambda number, frame: os._exit(INTERRUPTED))
    return True
