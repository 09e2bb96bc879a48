"""The wheel in an environment of its own, outside the clone: exports, releases and serves."""

import json
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from conftest import DEMO_CHECKPOINT, ROOT
from florence2_release.installation import ServerError, find_tritonserver

SERVE = """
import sys, florence2
from florence2_release.server import TritonServer
from florence2_client import Florence2Client
with TritonServer("models") as server:
    server.wait_ready()
    with Florence2Client(f"127.0.0.1:{server.grpc_port}") as client:
        print(client.run("<CAPTION>", sys.argv[1], max_new_tokens=3).to_json())
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of a new environment that has the wheel, and this one's packages for what the wheel depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet"]
    subprocess.run([*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("florence2_triton-*.whl")
    venv.create(folder / "env", with_pip=False)
    site = folder / "env" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    # A path in a .pth file is not searched for .pth files itself, so the clone's editable install stays out.
    (site / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return folder / "env" / "bin" / "python"


def run(python: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run([str(python), *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.server
def test_exports_releases_and_serves(python: Path, tmp_path: Path) -> None:
    try:
        find_tritonserver()
    except ServerError as error:
        pytest.skip(str(error))
    where = run(python, tmp_path, "-c", "import florence2, florence2_release; print(florence2.__file__)")
    assert str(python.parents[1]) in where
    run(python, tmp_path, "-m", "florence2.cli", "export", str(DEMO_CHECKPOINT), "--output", "export")
    run(python, tmp_path, "-m", "florence2.cli", "release", "export", "--repository", "models")
    answer = json.loads(run(python, tmp_path, "-c", SERVE, str(DEMO_CHECKPOINT.parent / "pictures" / "scene-1.png")))
    assert len(answer["token_ids"]) <= 4


def test_the_wheel_carries_what_is_served_and_no_more(python: Path) -> None:
    site = next(python.parents[1].glob("lib/*/site-packages"))
    models = site / "florence2_release" / "model_repository"
    assert {folder.name for folder in models.iterdir()} == {
        *("florence2", "preprocess", "vision_encoder", "beam_search", "postprocess")
    }
    assert not list(site.glob("tests*"))
    assert list(site.glob("florence2_triton-*.dist-info/licenses/LICENSE"))
