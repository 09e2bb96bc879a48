"""The reaper: the small process between us and tritonserver that outlives both and leaves nothing behind.

A process of its own, because a death signal alone does not do: PR_SET_PDEATHSIG fires when the parent *thread* ends
(prctl(2)), and what a killed stub leaves in shared memory is removed by nobody. Standard library only.
"""

import contextlib
import ctypes
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_SHM = Path("/dev/shm")
_ORPHAN_SECONDS = 5


def _keep(job: dict) -> int:
    """Runs tritonserver until it ends, SIGTERM (drain, then stop) or SIGQUIT (stop at once) comes, or the
    parent is gone; then ends its process group, reaps it, removes its shared memory and runtime folder."""
    heard = {signal.SIGCHLD, signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT}
    signal.pthread_sigmask(signal.SIG_BLOCK, heard)
    prctl = ctypes.CDLL(None).prctl
    prctl(_PR_SET_CHILD_SUBREAPER, 1)
    reaper = os.getpid()

    def in_child() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, ())
        # Should the reaper itself be killed, the server ends in its own time. The reaper has one thread only.
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != reaper:
            os._exit(1)

    server = subprocess.Popen(job["command"], stdout=sys.stderr, preexec_fn=in_child, process_group=0)
    with contextlib.suppress(BrokenPipeError):
        print(server.pid, flush=True)
    give_up = None
    while server.poll() is None and (give_up is None or time.monotonic() < give_up):
        got = signal.sigtimedwait(heard, 0.5)
        asked = got is not None and got.si_signo != signal.SIGCHLD
        if got is not None and got.si_signo == signal.SIGQUIT:
            break
        orphan = os.getppid() != job["parent"]
        if give_up is None and (asked or orphan):
            give_up = time.monotonic() + (_ORPHAN_SECONDS if orphan else job["drain_seconds"] + 5)
            server.terminate()
    kill_group(server.pid)
    code = server.wait()
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    clean(job)
    return code


def clean(job: dict) -> None:
    for region in _SHM.glob(f"{job['shm_prefix']}*"):
        region.unlink(missing_ok=True)
    shutil.rmtree(job["runtime"], ignore_errors=True)


def kill_group(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


if __name__ == "__main__":
    status = _keep(json.loads(sys.argv[1]))
    sys.exit(status if status >= 0 else 128 - status)
