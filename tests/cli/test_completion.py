"""`florence2 completion`: what a real bash makes of it."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ASK = """
source "$1"
shift
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
completing=$(complete -p florence2 | sed 's/.*-F \\([^ ]*\\) .*/\\1/')
"$completing" florence2 "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD - 1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""


def completion(shell: str) -> str:
    done = subprocess.run([sys.executable, "-m", "florence2_cli", "completion", shell], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def script(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("completion") / "florence2"
    path.write_text(completion("bash"))
    return path


@pytest.mark.parametrize(
    ("typed", "offered"),
    [
        (["ex"], {"export"}),
        (["ask", "photo.jpg", "--n"], {"--num-beams"}),
        (["data", ""], {"check", "convert"}),
        (["data", "check", "--ht"], {"--html"}),
        (["export", "--precision", ""], {"fp32", "fp16", "int8"}),
        (["completion", ""], {"bash", "zsh", "tcsh"}),
        (["ask", "ph"], {"photo.jpg", "photos"}),
        (["ask", "photo.jpg", "--draw", "photo"], {"photo.jpg", "photos"}),
        (["export", "ph"], {"photos"}),
        (["serve", "--repository", "ph"], {"photos"}),
    ],
)
def test_bash(script: Path, tmp_path: Path, typed: list[str], offered: set[str]) -> None:
    """Words, files, and only folders where a folder is wanted."""
    (tmp_path / "photo.jpg").touch()
    (tmp_path / "photos").mkdir()
    command = ["bash", "--noprofile", "--norc", "-c", ASK, "bash", str(script), "florence2", *typed]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert set(done.stdout.split()) == offered


def test_tcsh_and_zsh() -> None:
    assert "complete florence2" in completion("tcsh")
    script = completion("zsh")
    assert script.startswith("#compdef florence2")
    if shutil.which("zsh") is None:
        pytest.skip("zsh is not installed: what it makes of its script is not seen")
    assert subprocess.run(["zsh", "-n"], input=script, capture_output=True, text=True).stderr == ""


def test_nothing_heavy_is_imported() -> None:
    code = """
import sys
from florence2_cli import main
assert main(["completion", "bash"]) == 0
heavy = {"torch", "transformers", "onnxruntime", "tritonclient", "onnx", "numpy"} & set(sys.modules)
assert not heavy, heavy
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
