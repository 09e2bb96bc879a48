"""1,000 pictures labelled by the real server: through kills, through the server's end, in every format."""

import json
import os
import pty
import random
import re
import subprocess
import sys
import termios
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from florence2_apps.label import Job, label, open_source
from florence2_client import ServerRefused
from florence2_release.server import TritonServer
from label_pictures import make_pictures
from serving import client, serve, wait_until

pytestmark = pytest.mark.server

PICTURES = 1000
JOB = Job("<OD>", {"max_new_tokens": 20, "num_beams": 1})
SETTINGS = ["--max-new-tokens", "20", "--num-beams", "1"]


@pytest.fixture(scope="module")
def server(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with serve(demo_export, tmp_path_factory.mktemp("label")) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), PICTURES)


@pytest.fixture(scope="module")
def whole(server: TritonServer, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The lines of a run that nothing interrupts."""
    output = tmp_path_factory.mktemp("whole") / "out.jsonl"
    with client(server) as asked:
        assert label(open_source(str(folder)), JOB, output, asked).failed == PICTURES // 25
    return output.read_bytes()


def command(server: TritonServer, source: Path, output: Path) -> list[str]:
    here = [sys.executable, "-m", "florence2_cli", "label", str(source), "<OD>", "-o", str(output)]
    return [*here, "--url", server.grpc_url, *SETTINGS]


def lines_in(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_through_kills(server: TritonServer, folder: Path, whole: bytes, tmp_path: Path) -> None:
    output, chance = tmp_path / "out.jsonl", random.Random(1)
    kills = sorted(chance.randrange(10, PICTURES - 100) for _ in range(5))
    for lines in kills:
        with subprocess.Popen(command(server, folder, output), stderr=subprocess.PIPE) as running:
            wait_until(lambda lines=lines: lines_in(output) >= lines or running.poll() is not None)
            running.kill()
        assert running.returncode == -9
    done = subprocess.run(command(server, folder, output), capture_output=True, text=True)
    assert done.returncode == 1
    assert "960 pictures labelled, 40 not" in done.stdout
    assert done.stderr.count("\n") <= 10
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    assert [row["image"] for row in rows] == names
    assert output.read_bytes() == whole
    assert {row["model_version"] for row in rows} == {"1", None}
    assert len({row["text"] for row in rows}) > 500
    errors = Counter(row["error"] and row["error"].split("(")[0] for row in rows)
    assert sorted(errors.values()) == [20, 20, 960]


def test_through_the_end_of_a_server(
    demo_export: Path, server: TritonServer, folder: Path, whole: bytes, tmp_path: Path
) -> None:
    names = [json.loads(line)["image"] for line in whole.splitlines()[:200]]
    (folder / "some.txt").write_text("\n".join(names))
    output, source = tmp_path / "out.jsonl", open_source(str(folder / "some.txt"))
    with (
        serve(demo_export, tmp_path) as other,
        client(other) as asked,
        pytest.raises(ServerRefused) as refused,
    ):
        label(source, JOB, output, asked, progress=lambda done, row: other.kill() if done == 50 else None)
    assert refused.value.status in ("UNAVAILABLE", "DEADLINE_EXCEEDED")
    assert 50 <= lines_in(output) < 200
    with client(server) as asked:
        label(source, JOB, output, asked)
    assert output.read_bytes() == b"".join(whole.splitlines(keepends=True)[:200])


def test_other_formats_come_of_the_same_lines(server: TritonServer, folder: Path, whole: bytes, tmp_path: Path) -> None:
    from pyarrow import parquet

    (tmp_path / "out.jsonl").write_bytes(whole)
    with client(server) as asked:
        for name in ("out.json", "out.parquet"):
            label(open_source(str(folder)), JOB, tmp_path / name, asked)
            assert (tmp_path / "out.jsonl").read_bytes() == whole
    rows = [json.loads(line) for line in whole.splitlines()]
    assert parquet.read_table(tmp_path / "out.parquet").to_pylist() == rows
    coco = json.loads((tmp_path / "out.json").read_text())
    assert len(coco["images"]) == 960
    assert len(coco["annotations"]) == sum(len(row["answer"]["<OD>"]["bboxes"]) for row in rows if row["answer"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["<OD>", "--num-beams", "99"], "num_beams must be from 1 to 8, not 99"),
        (["<CAPTION>", "--min-score", "0.5"], "which have no scores"),
        (["<OD>", "--model", "nope"], "unknown model"),
        (["<OD>", "--workers", "2"], "give --ray"),
    ],
)
def test_what_no_picture_can_help_is_said_once(
    arguments: list[str],
    message: str,
    server: TritonServer,
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from florence2_cli import main

    output = tmp_path / "out.jsonl"
    assert main(["label", str(folder), *arguments, "-o", str(output), "--url", server.grpc_url]) == 1
    assert message in capsys.readouterr().err.splitlines()[-1]
    assert lines_in(output) == 0


def test_progress_on_a_terminal(server: TritonServer, folder: Path, whole: bytes, tmp_path: Path) -> None:
    lines = whole.splitlines(keepends=True)
    (tmp_path / "out.jsonl").write_bytes(b"".join(lines[:-30]))
    terminal, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (24, 100))
    subprocess.run(command(server, folder, tmp_path / "out.jsonl"), stderr=theirs, stdout=subprocess.DEVNULL)
    os.close(theirs)
    shown = b""
    with suppress(OSError):  # the end
        while True:
            shown += os.read(terminal, 10_000)
    os.close(terminal)
    assert re.search(rb"97%.* 970/1000 \[", shown)
    assert re.search(rb"100%.* 1000/1000 \[.* pictures/s\]", shown)
