"""README.md and docs/*.md as something to run: their code blocks, in order, in a folder that has what they suppose."""

import contextlib
import io
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import florence2_cli as cli
import pytest
from conftest import DEMO_CHECKPOINT, ROOT
from florence2_release import startup
from florence2_release.repository import Repository
from PIL import Image

PAGES = ["README.md", "benchmarks/README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))]
LANGUAGES = ("bash", "python", "js", "yaml", "json", "text")
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_STARTS = re.compile(r"^florence2 (?:serve|ui) .*$", re.MULTILINE)
"""What runs until it is stopped."""
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?(?:e-?\d+)?")
_ASKING = {
    "ask": "--url=localhost:8001",
    "label": "--url=localhost:8001",
    "bench prepare": "--url=localhost:8001",
    "bench run": "--url=localhost:8001 --http-url=localhost:8000 --metrics-url=localhost:8002/metrics",
}
"""Commands that ask a server at Triton's own ports, with what these are by default."""
_TOOLS = {"curl": "curl", "node": "node", "florence2 bench run": "perf_analyzer"}
"""What code with these words needs."""
_PORTS = {"HTTP": 8000, "gRPC": 8001, "metrics": 8002, "health": 8003}


@dataclass(frozen=True)
class Block:
    page: str
    language: str
    code: str

    def commands(self) -> list[list[str]]:
        """Arguments of `florence2`, of the commands in it."""
        joined = self.code.replace("\\\n", " ")
        found = re.findall(r"(?:^|florence2-triton +)florence2 ([^#|&\n]*)", joined, re.MULTILINE)
        return [shlex.split(command) for command in found]


def text(page: str) -> str:
    return (ROOT / page).read_text()


def blocks(page: str) -> list[Block]:
    return [Block(page, *found) for found in _FENCE.findall(text(page))]


@dataclass
class Room:
    """A folder with what the pages suppose: a photo, the repository's folders, models under the names of the hub."""

    folder: Path
    ports: dict[str, int]
    """Of a server, as _PORTS; one that the page starts takes its place."""
    programs: Path
    """Where `florence2` is."""
    cut: dict[str, str] = field(default_factory=dict)
    """What is replaced in the page's commands, to take less time."""
    output: str | None = None
    """What the block before has printed; None where it could not run."""
    missing: set[str] = field(default_factory=set)
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    """Of the page's Python."""

    def __post_init__(self) -> None:
        pictures = DEMO_CHECKPOINT.parent / "pictures"
        Image.open(pictures / "scene-1.png").convert("RGB").save(self.folder / "photo.jpg")
        shutil.copytree(pictures, self.folder / "pictures", ignore=shutil.ignore_patterns("*.json"))
        for name in ("training", "demo", "release", "client", "export", "benchmarks"):
            (self.folder / name).symlink_to(ROOT / name)
        (self.folder / "microsoft").mkdir()
        for name in ("microsoft/Florence-2-base-ft", "microsoft/Florence-2-large-ft", "my-finetune"):
            (self.folder / name).symlink_to(DEMO_CHECKPOINT)

    def write_files(self, page: str) -> None:
        """YAML whose first line is its file's name in a comment. They may stand behind the commands that read them."""
        for block in blocks(page):
            if block.language == "yaml" and (name := re.match(r"# (\S+)\n", self._here(block.code))):
                (self.folder / name[1]).write_text(self._here(block.code))

    def run(self, block: Block, stack: contextlib.ExitStack) -> None:
        """`stack` holds the server that the page has started, if any; another takes its place."""
        code = self._here(block.code)
        path = self._environment()["PATH"]
        lacking = {tool for word, tool in _TOOLS.items() if word in code and shutil.which(tool, path=path) is None}
        self.missing |= lacking
        if lacking:
            self.output = None
        elif block.language in ("json", "text"):
            if self.output is not None:
                assert_printed(self.output, block.code)
        elif block.language == "python":
            printed = io.StringIO()
            with contextlib.redirect_stdout(printed):
                exec(compile(code, block.page, "exec"), self.names)
            self.output = printed.getvalue()
        elif block.language == "js":
            self.output = self._program("node", "--input-type=module", "--eval", code)
        elif block.language == "bash":
            self._bash(code, stack)

    def _here(self, code: str) -> str:
        for old, new in self.cut.items():
            code = code.replace(old, new)
        for command, urls in _ASKING.items():
            code = re.sub(rf"^(florence2 {command})\b", rf"\1 {urls}", code, flags=re.MULTILINE)
        for name, port in _PORTS.items():
            code = code.replace(f"localhost:{port}", f"localhost:{self.ports[name]}")
        return code

    def _bash(self, code: str, stack: contextlib.ExitStack) -> None:
        output = ""
        # This environment is the installation; a test looks the extras up.
        code = re.sub(r"^pip install .*\n", "", code, flags=re.MULTILINE)
        starts = [*_STARTS.findall(code), ""]
        for part, start in zip(_STARTS.split(code), starts, strict=True):
            if part.strip():
                output += self._program("bash", "-euo", "pipefail", "-c", part)
            if start:
                stack.close()
                stack.enter_context(self._started(shlex.split(start, comments=True)[1:]))
        self.output = output

    def _program(self, *command: str) -> str:
        done = subprocess.run(command, cwd=self.folder, env=self._environment(), capture_output=True, text=True)
        assert done.returncode == 0, f"{command[-1]}\n{done.stdout}{done.stderr}"
        return done.stdout

    def _environment(self) -> dict[str, str]:
        """With this environment's programs first, and the folder as the home."""
        folders = self.programs, Path(sys.executable).parent, ROOT / "var" / "perf_analyzer"
        path = os.pathsep.join([*map(str, folders), os.environ["PATH"]])
        named = {"URL": "HTTP", "METRICS": "metrics", "HEALTH": "health"}
        urls = {name: f"http://localhost:{self.ports[port]}" for name, port in named.items()}
        ours = {f"FLORENCE2_{name}": url for name, url in urls.items()}
        return os.environ | ours | {"PATH": path, "HOME": str(self.folder)}

    @contextlib.contextmanager
    def _started(self, arguments: list[str]) -> Iterator[None]:
        """On free ports, until the page is over. For a GPU only the repository is made ready."""
        args = cli.parser().parse_args(arguments)
        if getattr(args, "profile", None) not in (None, "cpu"):
            startup.prepare(Repository(self.folder / args.repository), args.profile)
            assert Repository(self.folder / args.repository).profile == args.profile
            yield
            return
        free = (
            ["--port=0"]
            if arguments[0] == "ui"
            else [f"--{name}-port=0" for name in ("http", "grpc", "metrics", "health")]
        )
        command = [sys.executable, "-m", "florence2_cli", *arguments, *free]
        with subprocess.Popen(
            command, cwd=self.folder, env=self._environment(), stdout=subprocess.PIPE, text=True
        ) as process:
            try:
                assert process.stdout
                for line in process.stdout:
                    if found := re.match(r"  (\w+) +\S+:(\d+)", line):
                        self.ports[found[1]] = int(found[2])
                    if line.startswith("page: "):
                        with urllib.request.urlopen(line.split()[1], timeout=60) as response:
                            assert b"<html" in response.read()
                        break
                    if "curl" in line:
                        break
                else:
                    pytest.fail(f"{arguments}: it stopped with {process.wait()}")
                yield
            finally:
                process.send_signal(signal.SIGINT)
                process.communicate()


def assert_printed(printed: str, shown: str) -> None:
    """What a page shows is what was printed: numbers to a twentieth, blanks aside, and `…` is anything."""
    pattern, numbers, place = "", [], 0
    shown = re.sub(r"\s", "", shown)
    for found in re.finditer(rf"{_NUMBER.pattern}|…", shown):
        pattern += re.escape(shown[place : found.start()])
        pattern += ".*?" if found[0] == "…" else f"({_NUMBER.pattern})"
        numbers += [] if found[0] == "…" else [float(found[0])]
        place = found.end()
    whole = re.fullmatch(pattern + re.escape(shown[place:]), re.sub(r"\s", "", printed))
    assert whole, f"shown:\n{shown}\nprinted:\n{printed}"
    assert [float(number) for number in whole.groups()] == pytest.approx(numbers, rel=0.05, abs=0.005), printed
