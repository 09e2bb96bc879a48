"""Which model versions a server has ready, and which of their processes are there."""

import json
import os
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from florence2_release.server import TritonServer

Version = tuple[str, int]
"""A model and its version."""
ANSWERING = 5.0
"""Seconds that the server may take to say what it has."""


def ready(server: TritonServer) -> set[Version]:
    """What the server calls ready. It says so of a python model whose process has ended, too (up to 25.11). Raises
    OSError, ValueError, http.client.HTTPException."""
    entries = json.loads(_fetch(f"{server.http_url}/v2/repository/index", post=True))
    return {(entry["name"], int(entry["version"])) for entry in entries if entry.get("state") == "READY"}


def config(server: TritonServer, model: str, version: int) -> dict[str, Any]:
    """As the server has loaded it. Raises as `ready` does."""
    return json.loads(_fetch(f"{server.http_url}/v2/models/{model}/versions/{version}/config"))


def pinned(server: TritonServer, names: Iterable[str], ready: set[Version]) -> set[Version]:
    """What the ensembles of these names are made of, as they are loaded: what is on the disk may be on its way. Of one
    that is not `ready`, its name and 0. Raises as `ready` does."""
    found = set()
    for name in names:
        versions = [version for model, version in ready if model == name]
        if not versions:
            found.add((name, 0))
            continue
        steps = config(server, name, max(versions))["ensemble_scheduling"]["step"]
        found |= {(step["model_name"], int(step["model_version"])) for step in steps}
    return found


def incomplete(server: TritonServer, versions: set[Version]) -> set[Version]:
    """Those of `versions` that lack a process: never one of what is no python model. Raises as `ready` does."""
    running = Counter(_stubs(server.pid, server.repository))
    return {version for version in versions if running[version] < _instances(server, version)}


def named(versions: Iterable[Version]) -> str:
    return ", ".join(f"{model} {version}" if version else model for model, version in sorted(versions))


def _instances(server: TritonServer, version: Version) -> int:
    """Processes that it has when it is whole."""
    try:
        loaded = config(server, *version)
    except urllib.error.HTTPError:
        # It was retired a moment ago.
        return 0
    if loaded.get("backend") != "python":
        return 0
    # `count` is of each GPU that is named.
    return sum(group["count"] * max(1, len(group.get("gpus", ()))) for group in loaded["instance_group"])


def _fetch(url: str, post: bool = False) -> bytes:
    request = urllib.request.Request(url, data=b"{}", method="POST") if post else url
    with urllib.request.urlopen(request, timeout=ANSWERING) as response:
        return response.read()


def _stubs(server: int | None, repository: Path) -> Iterator[Version]:
    """Of the server's children; their command line names the model.py."""
    for process in Path("/proc").glob("[0-9]*"):
        try:
            state, parent = (process / "stat").read_text().rpartition(")")[2].split()[:2]
            arguments = (process / "cmdline").read_bytes().split(b"\0")
        except (OSError, ValueError, IndexError):
            # It has ended in between.
            continue
        if int(parent) == server and state != "Z" and len(arguments) > 1:
            model = Path(os.fsdecode(arguments[1]))
            if model.name == "model.py" and model.parents[2] == repository:
                yield model.parents[1].name, int(model.parent.name)
