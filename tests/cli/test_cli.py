"""The command line: help that imports nothing heavy, errors in one line."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from florence2_cli import COMMANDS, main
from florence2_cli.ask import describe
from serving import result


def test_help_names_every_command_and_imports_neither_torch_nor_onnxruntime() -> None:
    code = """
import sys
from florence2_cli import main
try:
    main(["--help"])
except SystemExit as end:
    assert end.code == 0
heavy = {"torch", "transformers", "onnxruntime", "tritonclient", "onnx"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for command in COMMANDS:
        assert re.search(rf"^    {command}\b", done.stdout, re.MULTILINE)


def test_errors_are_one_line_and_verbose_adds_the_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["release", str(tmp_path), "--repository", str(tmp_path / "models")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("florence2: ")
    assert error.count("\n") == 1
    assert "florence2 export" in error
    assert main(["release", str(tmp_path), "--repository", str(tmp_path / "models"), "--verbose"]) == 1
    assert "Traceback" in capsys.readouterr().err


def test_a_missing_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "florence2_export.export", None)
    assert main(["export", "somewhere"]) == 1
    assert "pip install 'florence2-triton[export]'" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["0", "-5", "64MB"])
def test_a_response_cache_has_a_size(size: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["serve", "--repository", "models", f"--response-cache={size}"])
    assert refused.value.code == 2
    assert "--response-cache" in capsys.readouterr().err.splitlines()[-1]


def test_the_script_and_the_command_are_the_same(tmp_path: Path) -> None:
    script = ROOT / "export" / "to_onnx.py"
    done = subprocess.run([sys.executable, str(script), str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "config.json" in done.stderr


@pytest.mark.parametrize(
    ("answer", "printed"),
    [
        ({"<CAPTION>": "a car"}, "a car"),
        ({"<OD>": {"bboxes": [[1, 2, 3, 4]], "labels": ["car"], "scores": [0.5]}}, "car  0.50  1.0 2.0 3.0 4.0"),
        ({"<REGION_PROPOSAL>": {"bboxes": [[1, 2, 3, 4]], "labels": [""], "scores": [1]}}, "-  1.00  1.0 2.0 3.0 4.0"),
        ({"<OD>": {"bboxes": [], "labels": [], "scores": []}}, "nothing found"),
        (
            {"<X>": {"polygons": [[[1, 2, 3, 4], [5, 6]]], "labels": ["cat"], "scores": [0.25]}},
            "cat  0.25  1.0 2.0 3.0 4.0 5.0 6.0",
        ),
    ],
)
def test_describe(answer: dict, printed: str) -> None:
    assert describe(result(answer)) == printed
    assert describe(result(answer, finish_reason="length")) == f"{printed}\n(cut short by the limit on new tokens)"
