"""`florence2` for tests that run many commands of it: every one in a fork of a process that has imported what takes
seconds each time. How a command starts by itself is test_wheel.py's matter.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from pathlib import Path

_ASK = """#!{python} -IS
import json, os, socket, sys
server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
server.connect({address!r})
asked = {{"arguments": sys.argv[1:], "folder": os.getcwd(), "environment": dict(os.environ)}}
socket.send_fds(server, [json.dumps(asked).encode()], [0, 1, 2])
# Nothing comes from one that was killed.
os._exit(int(server.recv(16) or 137))
"""


@contextlib.contextmanager
def warm_commands(folder: Path) -> Iterator[Path]:
    """-> a folder for PATH."""
    address, programs = str(folder / "socket"), folder / "programs"
    programs.mkdir()
    (programs / "florence2").write_text(_ASK.format(python=sys.executable, address=address))
    (programs / "florence2").chmod(0o755)
    command = [sys.executable, __file__, address]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        try:
            yield programs
        finally:
            process.kill()


def _serve(address: str) -> None:
    import florence2_cli
    import florence2_export.export  # noqa: F401
    import florence2_training.merge
    import florence2_training.train  # noqa: F401

    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listener.bind(address)
    listener.listen()
    # Who has ended leaves nothing.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # With whoever started it.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(0)), daemon=True).start()
    print("ready", flush=True)
    while True:
        asking, _ = listener.accept()
        message, descriptors, *_ = socket.recv_fds(asking, 1 << 20, 3)
        if os.fork() == 0:
            listener.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            for number, descriptor in enumerate(descriptors):
                os.dup2(descriptor, number)
            asking.send(str(_run(**json.loads(message), main=florence2_cli.main)).encode())
            os._exit(0)
        for descriptor in descriptors:
            os.close(descriptor)
        asking.close()


def _run(arguments: list[str], folder: str, environment: dict[str, str], main) -> int:
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    try:
        code = main(arguments)
    except SystemExit as ended:
        code = ended.code or 0 if isinstance(ended.code, int | None) else 1
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    _serve(sys.argv[1])
