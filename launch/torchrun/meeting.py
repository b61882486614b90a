"""The place where the nodes of elastic jobs meet, on a machine of its own: `python launch/torchrun/meeting.py PORT`.

It serves any number of jobs, told apart by their --rdzv-id, until it is ended. If it is lost, so are they: each goes on
from its newest step when it is started again. Say is_host=0 to torchrun, or a node of the same name hosts it as well.
"""

import signal
import sys
from datetime import timedelta

from torch.distributed import TCPStore

signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM, signal.SIGINT])
store = TCPStore("localhost", int(sys.argv[1]), is_master=True, wait_for_workers=False, timeout=timedelta(minutes=1))
print(f"meeting place at port {store.port}", flush=True)
signal.sigwait([signal.SIGTERM, signal.SIGINT])
