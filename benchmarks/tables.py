"""Tables in Markdown, and what they were measured on."""

import os
import platform
import subprocess
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

LOAD = os.getloadavg()[0]
TOOLS = ("torch", "transformers", "onnxruntime")


class Table:
    def __init__(self, *head: str) -> None:
        self._rows = [head, ("---",) * len(head)]

    def add(self, *row: str) -> None:
        self._rows.append(row)

    @property
    def last(self) -> str:
        return " | ".join(self._rows[-1])

    def __str__(self) -> str:
        return "".join(f"| {' | '.join(row)} |\n" for row in self._rows)


def environment(*tools: str) -> str:
    """Processor, cores, memory, versions, commit, date, and how busy the machine was before."""
    cpuinfo = Path("/proc/cpuinfo").read_text().splitlines()
    cpu = next(line.split(":")[1].strip() for line in cpuinfo if line.startswith("model name"))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{tool} {_version(tool)}" for tool in (*TOOLS, *tools))
    folder = Path(__file__).parent
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=folder, capture_output=True, text=True)
    return (
        f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB; Python {platform.python_version()}, "
        f"{versions}; commit {commit.stdout.strip()}; {date.today().isoformat()}.\n"
        f"Load average before: {LOAD:.1f}; OMP_WAIT_POLICY: {os.environ.get('OMP_WAIT_POLICY', 'not set')}.\n"
    )


def _version(tool: str) -> str:
    try:
        return version(tool)
    except PackageNotFoundError:
        return version(f"{tool}-gpu")
