"""README.md and docs/*.md: every block is run, in the order of its page, or named below with the reason why not.

Names of files, models of the hub and ports are those of a folder made for the page.
"""

import contextlib
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

import florence2_cli as cli
import pytest
from conftest import ROOT
from florence2_release.health import Health, serve_health
from florence2_release.install import install
from florence2_release.tritonserver import ServerError, find_tritonserver
from pages import LANGUAGES, PAGES, Block, Room, blocks, text
from serving import serve
from warm_commands import warm_commands

NOT_RUN = {
    ("README.md", "sudo apt"): "changes the machine",
    ("README.md", "make demo"): "is this test's own run, and CI's",
    ("benchmarks/README.md", "make perf_analyzer"): "made a table, in minutes; docs/measure.md has the commands",
    ("docs/docker.md", ""): "needs Docker and a GPU; test_docker.py runs the steps of the image",
    ("docs/export.md", "python export/to_tensorrt.py"): "needs a GPU",
    ("docs/export.md", "florence2 export microsoft/Florence-2-base-ft --layout"): "test_javascript.py runs it",
    ("docs/export.md", "cd client/examples/transformers_js"): "test_javascript.py runs it",
    ("docs/measure.md", "sudo apt"): "changes the machine, and downloads; CI does",
    ("docs/redeploy.md", "florence2 release RUN"): "needs a bucket",
}
"""By page and beginning. Of these the arguments are parsed."""

CUT = {
    "docs/fine-tune.md": {
        "stamps var/stamps\n": "stamps var/stamps --scale 0.01\n",
        "stamps.yaml\n": "stamps.yaml max_steps=2 per_device_train_batch_size=4\n",
    },
    "docs/measure.md": {
        "1,4,16 --output report": "1,4 --output report --window-requests 5 --max-trials 3 --stability-percentage 99",
    },
    # Cut to two steps, a run goes live only by force. The gate's data are the page's, not those of the repository.
    "docs/redeploy.md": {
        "stamps.yaml\n": "stamps.yaml max_steps=2 per_device_train_batch_size=4\n",
        "release/gate.yaml": "gate.yaml",
        "gate.yaml\nflorence2 rollback": "gate.yaml --force\nflorence2 rollback",
        "../var": "var",
        "watch_seconds: 60": "watch_seconds: 0",
    },
}
EXPORTS = {
    "exports/base-ft": "fp32",
    "exports/base-ft-fp16": "fp16",
    "exports/base-ft-int8": "int8",
    "exports/base-int8": "int8",
    "exports/large-ft": "fp16",
    "exports/mine": "fp32",
}
"""What commands make that is made once for all pages: they find it done."""


def is_run(block: Block) -> bool:
    return not any(block.page == page and block.code.startswith(start) for page, start in NOT_RUN)


def runs(page: str) -> bool:
    return any(is_run(block) for block in blocks(page))


# --- the pages' code ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ports(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, int]]:
    try:
        find_tritonserver()
    except ServerError as error:
        pytest.skip(str(error))
    with (
        serve(demo_export, tmp_path_factory.mktemp("docs")) as server,
        serve_health(Health(server), "127.0.0.1", 0) as endpoint,
    ):
        yield {
            "HTTP": server.http_port,
            "gRPC": server.grpc_port,
            "metrics": server.metrics_port,
            "health": endpoint.server_port,
        }
        endpoint.shutdown()


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with warm_commands(tmp_path_factory.mktemp("warm")) as folder:
        yield folder


@pytest.fixture(scope="module")
def stamps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A handful of the generator's pages, in ms-swift's format."""
    folder = tmp_path_factory.mktemp("stamps")
    command = [sys.executable, "-m", "florence2_demo", "stamps", str(folder / "stamps"), "--scale", "0.01"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    return folder / "stamps"


@pytest.mark.server
@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)])
def test_page(
    page: str,
    ports: dict[str, int],
    demo_exports: Callable[[str], Path],
    stamps: Path,
    programs: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    room = Room(tmp_path, dict(ports), programs, CUT.get(page, {}))
    for name, precision in EXPORTS.items():
        if name in text(page):
            shutil.copytree(demo_exports(precision), tmp_path / name)
    if page == "docs/tune.md":
        install(demo_exports("fp32"), tmp_path / "models")
    for name in ("invoices", "var/stamps"):
        if name in text(page):
            shutil.copytree(stamps, tmp_path / name)
    room.write_files(page)
    monkeypatch.chdir(tmp_path)
    with contextlib.ExitStack() as stack:
        for block in filter(is_run, blocks(page)):
            room.run(block, stack)
    check = CHECKS.get(page)
    if check:
        check(room)
    if room.missing:
        pytest.skip(f"{' and '.join(sorted(room.missing))} missing; the rest of the page ran")


def _trained(room: Room) -> None:
    for name in ("check.html", "invoices-lines.jsonl", "invoices-coco.json", "scores.html"):
        assert (room.folder / name).stat().st_size > 100
    for name in ("checkpoints/invoices", "var/stamps-checkpoint"):
        assert (room.folder / name / "model.safetensors").is_file()


def _released(room: Room) -> None:
    assert room.output
    assert "   1  florence2  live, loaded" in room.output
    assert "   2  florence2 " in room.output


def _drawn(room: Room) -> None:
    assert (room.folder / "boxes.png").is_file()


CHECKS = {
    "README.md": _drawn,
    "docs/answers.md": _drawn,
    "docs/call.md": _drawn,
    "docs/fine-tune.md": _trained,
    "docs/redeploy.md": _released,
}


@pytest.mark.parametrize("page", PAGES)
def test_no_block_is_forgotten(page: str) -> None:
    found = blocks(page)
    assert {block.language for block in found} <= set(LANGUAGES)
    assert len(re.findall(r"^\s*(?:```|~~~)", text(page), re.MULTILINE)) == 2 * len(found)
    assert not re.search(r"\n\n {4}\S", text(page)), "an indented block"


@pytest.mark.parametrize("page", CUT)
def test_what_is_cut_is_there(page: str) -> None:
    assert [old for old in CUT[page] if old not in text(page)] == []


@pytest.mark.parametrize(("page", "start"), NOT_RUN)
def test_what_is_not_run_is_there_and_has_arguments_that_exist(page: str, start: str) -> None:
    found = [block for block in blocks(page) if block.code.startswith(start)]
    assert found
    for block in found:
        assert block.language == "bash"
        assert subprocess.run(["bash", "-n", "-c", block.code], capture_output=True).returncode == 0
        for arguments in block.commands():
            cli.parser().parse_args(arguments)


def test_make_targets_exist() -> None:
    targets = {target for page in PAGES for target in re.findall(r"^make (\w+)", text(page), re.MULTILINE)}
    assert targets == {"demo", "test", "perf_analyzer"}
    for target in targets:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_have_options_that_exist(page: str) -> None:
    helps = {}
    prose = re.sub(r"^```.*?^```$", "", text(page), flags=re.DOTALL | re.MULTILINE)
    for arguments in re.findall(r"`florence2 ([^`]+)`", " ".join(prose.split())):
        command, *rest = shlex.split(arguments)
        if command == "COMMAND":
            continue
        assert command in cli.COMMANDS, arguments
        if command in ("data", "bench") and rest:
            command = f"{command} {rest[0]}"
        if command not in helps:
            done = subprocess.run(
                [sys.executable, "-m", "florence2_cli", *command.split(), "--help"], capture_output=True, text=True
            )
            helps[command] = set(re.findall(r"--[a-z][a-z-]*", done.stdout))
        assert {word for word in rest if word.startswith("--")} <= helps[command] | {"--help"}, arguments


def test_pip_names_extras_that_exist() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    named = [
        extra for page in PAGES for found in re.findall(r"\.\[([\w,-]+)\]'", text(page)) for extra in found.split(",")
    ]
    assert len(named) > 5
    assert set(named) <= set(extras)
    table = re.findall(r"^\| (`.*?`) \| ", text("docs/index.md"), re.MULTILINE)
    assert {*re.findall(r"`(\w[\w-]*)`", " ".join(table))} == set(extras) - {"dev"}


# --- the site -----------------------------------------------------------------------------------------------


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", str(ROOT / "mkdocs.yml")]
    done = subprocess.run([*command, "--site-dir", str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for page in tmp_path.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?([^\"> ]+)", page.read_text())
        loaded += re.findall(
            r"<link[^>]* rel=\"?(?:stylesheet|preconnect|icon)\"? [^>]*href=\"?([^\"> ]+)", page.read_text()
        )
        assert loaded
        assert [link for link in loaded if "//" in link] == []


@pytest.mark.parametrize("page", ["README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    targets = [link for link in re.findall(r"\]\(([^)]+)\)", path.read_text()) if not link.startswith("http")]
    assert targets
    assert [link for link in targets if not (path.parent / link).exists()] == []
