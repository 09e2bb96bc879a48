"""The wheel in an environment of its own, outside the clone: exports, releases, serves; alone, it calls."""

import json
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from conftest import DEMO_CHECKPOINT, ROOT
from florence2_release.tritonserver import ServerError, find_tritonserver
from packaging.requirements import Requirement
from serving import serve

PIP = [sys.executable, "-m", "pip", "--quiet"]

SERVE = """
import sys, florence2
from florence2_release.server import TritonServer
from florence2_client import Florence2Client
with TritonServer("models") as server:
    server.wait_ready()
    with Florence2Client(f"127.0.0.1:{server.grpc_port}") as client:
        print(client.run("<CAPTION>", sys.argv[1], max_new_tokens=3).to_json())
"""


CALL = """
import sys
import florence2, florence2_client
for missing in ("torch", "onnxruntime", "transformers"):
    try:
        __import__(missing)
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"{missing} is there")
print(florence2.__file__, florence2_client.__file__, sep="\\n")
for url in sys.argv[2:]:
    with florence2_client.Florence2Client(url) as client:
        print(client.caption(sys.argv[1]), len(client.detect(sys.argv[1])), sep="\\n")
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    command = [*PIP, "wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(ROOT)]
    subprocess.run(command, check=True)
    (made,) = folder.glob("florence2_triton-*.whl")
    return made


def environment(folder: Path, wheel: Path, packages: Path) -> Path:
    """The Python of a new environment that has the wheel, and the packages of another folder."""
    venv.create(folder / "env", with_pip=False)
    site = folder / "env" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    subprocess.run([*PIP, "install", "--no-deps", "--target", str(site), str(wheel)], check=True)
    # A path in a .pth file is not searched for .pth files itself, so the clone's editable install stays out.
    (site / "dependencies.pth").write_text(f"{packages}\n")
    return folder / "env" / "bin" / "python"


@pytest.fixture(scope="module")
def python(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With all of this environment's packages for what the wheel depends on."""
    return environment(tmp_path_factory.mktemp("all"), wheel, Path(sysconfig.get_path("purelib")))


@pytest.fixture(scope="module")
def bare(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the packages of `pip install florence2-triton` alone: no extra."""
    folder = tmp_path_factory.mktemp("bare")
    packages = folder / "packages"
    packages.mkdir()
    for name in dependencies("florence2-triton", ()):
        for file in metadata.files(name) or []:
            top = packages / file.parts[0]
            if file.parts[0] != ".." and not top.exists():
                top.symlink_to(metadata.distribution(name).locate_file(file.parts[0]))
    return environment(folder, wheel, packages)


def dependencies(name: str, extras: Iterable[str]) -> set[str]:
    """The distributions that a distribution needs, and what they need."""
    found: set[str] = set()
    for line in metadata.requires(name) or []:
        needed = Requirement(line)
        if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            found |= {needed.name} | dependencies(needed.name, needed.extras)
    return found


def run(python: Path, folder: Path, *arguments: str) -> str:
    done = subprocess.run([str(python), *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.server
def test_the_bare_install_calls_a_server(bare: Path, demo_export: Path, tmp_path: Path) -> None:
    try:
        find_tritonserver()
    except ServerError as error:
        pytest.skip(str(error))
    with serve(demo_export, tmp_path) as server:
        picture = str(DEMO_CHECKPOINT.parent / "pictures" / "scene-1.png")
        lines = run(bare, tmp_path, "-c", CALL, picture, server.grpc_url, server.http_url).splitlines()
        asked = run(bare, tmp_path, "-m", "florence2_cli", "ask", picture, "<CAPTION>", "--url", server.grpc_url)
    assert all(str(bare.parents[1]) in line for line in lines[:2])
    assert lines[2:4] == lines[4:]
    assert asked.strip() == lines[2]
    assert int(lines[3]) > 0


@pytest.mark.server
def test_exports_releases_and_serves(python: Path, tmp_path: Path) -> None:
    try:
        find_tritonserver()
    except ServerError as error:
        pytest.skip(str(error))
    where = run(python, tmp_path, "-c", "import florence2, florence2_release; print(florence2.__file__)")
    assert str(python.parents[1]) in where
    run(python, tmp_path, "-m", "florence2_cli", "export", str(DEMO_CHECKPOINT), "--output", "export")
    run(python, tmp_path, "-m", "florence2_cli", "release", "export", "--repository", "models")
    answer = json.loads(run(python, tmp_path, "-c", SERVE, str(DEMO_CHECKPOINT.parent / "pictures" / "scene-1.png")))
    assert len(answer["token_ids"]) <= 4


def test_the_wheel_carries_what_is_served_and_no_more(python: Path) -> None:
    site = next(python.parents[1].glob("lib/*/site-packages"))
    models = site / "florence2_release" / "model_repository"
    assert {folder.name for folder in models.iterdir()} == {
        *("florence2", "preprocess", "vision_encoder", "beam_search", "postprocess")
    }
    assert not [*site.glob("tests*"), *site.glob("florence2_demo*")]
    data = {path.name for path in site.glob("florence2*/**/*") if path.suffix in (".jinja", ".css", ".typed")}
    assert data == {"report.html.jinja", "page.html.jinja", "page.css", "py.typed"}
    recipes = {path.name for path in (site / "florence2_training" / "recipes").iterdir()}
    assert recipes == {path.name for path in (ROOT / "training" / "recipes").iterdir()}
    assert list(site.glob("florence2_triton-*.dist-info/licenses/LICENSE"))
