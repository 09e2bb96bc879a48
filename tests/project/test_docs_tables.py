"""What README.md and docs/*.md say in tables, held against the code and the measurements."""

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

from conftest import ROOT
from florence2_release.configs import parsed
from pages import blocks, text
from test_house import IMPORTS

from florence2.backend.metric_names import COUNTERS, GAUGES
from florence2.generation.settings import MAX_BEAMS
from florence2.images import FORMATS as PICTURE_FORMATS
from florence2.images import PIL_MEGAPIXELS, Limits
from florence2.tasks import TASKS, Takes


def rows(page: str, heading: str = "") -> list[list[str]]:
    """Of the tables below a heading, or of all, cells by row."""
    part = text(page).split(f"## {heading}\n")[1].split("\n## ")[0] if heading else text(page)
    lines = re.findall(r"^\| (.*) \|$", part, re.MULTILINE)
    return [re.split(r" *\| *", line) for line in lines]


def test_the_tables_are_those_that_were_measured() -> None:
    measured = (ROOT / "benchmarks" / "one_request.md").read_text()
    found = re.findall(r"^\| (?:Triton|transformers) \|.*$", text("README.md"), re.MULTILINE)
    assert len(found) == 2
    assert [row for row in found if row not in measured] == []
    files = (
        "one_request",
        "in_flight/steps",
        "in_flight/pictures",
        "in_flight/mixed",
        "in_flight/tasks",
        "int8/pictures",
    )
    _, *lines = rows("docs/measure.md", "What was measured")
    for file, (_, *cells) in zip(files, lines, strict=True):
        measured = (ROOT / "benchmarks" / f"{file}.md").read_text()
        for number in re.findall(r"\d+\.\d+", " ".join(cells)):
            assert number in measured, f"{file}: {number}"


def test_metrics() -> None:
    assert set(re.findall(r"`(florence2_[a-z_]+)`", text("docs/measure.md"))) == {*COUNTERS, *GAUGES}


def test_parameters_and_profiles_are_those_of_the_configs() -> None:
    configs = [path.read_text() for path in (ROOT / "model_repository").glob("*/config.pbtxt")]
    _, *lines = rows("docs/tune.md", "Under load")
    for name in [name for line in lines for name in re.findall(r"`([a-z_]+)`", line[0])]:
        assert any(f'"{name}"' in config for config in configs), name
    profiles = {path.stem for path in (ROOT / "model_repository").glob("*/configs/*.pbtxt")}
    assert [line[0].strip("`") for line in rows("docs/tune.md", "On a GPU")[1:]] == ["cpu", *sorted(profiles)]


def test_tensors_are_those_of_the_ensemble() -> None:
    config = (ROOT / "model_repository" / "florence2" / "config.pbtxt").read_text().split("ensemble_scheduling")[0]
    tables = " ".join(line[0] for line in rows("docs/call.md", "Any other client"))
    assert re.findall(r"`(\w+)`", tables) == re.findall(r'name: "(\w+)" data_type', config)


def test_every_task_is_there() -> None:
    from florence2_client import AsyncFlorence2Client, Florence2Client

    called = [line for line in rows("docs/call.md") if "(" in line[1]]
    assert sorted(re.findall(r"`(<\w+>)`", " ".join(line[0] for line in called))) == sorted(TASKS)
    for method in [line[1].split("(")[0].strip("`") for line in called]:
        assert callable(getattr(Florence2Client, method))
        assert callable(getattr(AsyncFlorence2Client, method))
    takes = {Takes.NOTHING: "", Takes.TEXT: "text", Takes.REGION: "a region"}
    _, *lines = rows("docs/answers.md")
    answers = {token: line[1].strip() for line in lines for token in re.findall(r"`(<\w+>)`", line[0])}
    assert answers == {token: takes[task.takes] for token, task in TASKS.items()}


def test_limits() -> None:
    page = text("docs/limits.md")
    given = parsed(ROOT / "model_repository" / "preprocess" / "config.pbtxt").parameters
    megapixels, megabytes = (given[name].string_value for name in ("max_megapixels", "max_megabytes"))
    assert f"at most {megapixels} megapixels and {megabytes} MB" in page
    assert f"At most {Limits().megapixels} megapixels" in text("docs/formats.md")
    assert f"to {PIL_MEGAPIXELS}" in page
    assert f"| `num_beams` | 1 to {MAX_BEAMS}, or" in page
    assert re.findall(r"[A-Z]\w+", text("docs/formats.md").split("## Pictures\n")[1])[: len(PICTURE_FORMATS)] == [
        name.replace("WEBP", "WebP") for name in PICTURE_FORMATS
    ]


def test_training_formats() -> None:
    from florence2_data.formats import FORMATS

    assert [line[0].strip("`") for line in rows("docs/formats.md", "Training data")[1:]] == list(FORMATS)


def test_the_gate_is_the_repositorys_and_its_settings_are_all_there() -> None:
    from florence2_release.gate import Gate

    (shown,) = [block.code for block in blocks("docs/redeploy.md") if block.language == "yaml"]
    assert [line.partition("#")[0].strip() for line in shown.splitlines()[1:]] == [
        line for line in (ROOT / "release" / "gate.yaml").read_text().splitlines() if not line.startswith("#")
    ]
    gate = Gate()
    settings = []
    for one in fields(gate):
        value = getattr(gate, one.name)
        settings.append((one.name, "" if value is None else str(value), one.metadata["help"]))
    assert re.findall(r"^\| `(\w+)` \| (.*?) ?\| (.*) \|$", text("docs/redeploy.md"), re.MULTILINE) == settings


# --- messages -----------------------------------------------------------------------------------------------


def literals(path: Path) -> Iterator[str]:
    """The strings of a module, `…` for what is put in."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)  # type: ignore[misc]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_messages_are_still_printed() -> None:
    rooms = (*IMPORTS, "model_repository")
    printed = "\n".join(line for room in rooms for path in (ROOT / room).rglob("*.py") for line in literals(path))
    _, *tables = text("docs/troubleshooting.md").split("| it says | because | do |")
    assert len(tables) == 6
    shown = [
        message
        for table in tables
        for line in re.findall(r"^\| (.*?) \|", table.split("\n## ")[0], re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", line)
    ]
    assert len(shown) > 40
    patterns = {message: ".*".join(map(re.escape, message.split("…"))) for message in shown}
    assert [message for message, pattern in patterns.items() if not re.search(pattern, printed)] == []
