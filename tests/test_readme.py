"""The README's commands, run as they stand: only names of files, the hub id and the ports are replaced."""

import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import DEMO_CHECKPOINT, ROOT
from florence2_release.installation import ServerError, find_tritonserver
from florence2_release.repository import Repository, install
from florence2_release.server import TritonServer

from florence2 import cli

README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "training" / "README.md").read_text()
RELEASE = (ROOT / "release" / "README.md").read_text()


def blocks(language: str, containing: str, page: str = README) -> str:
    every = re.findall(r"```(\w+)\n(.*?)```", page, re.DOTALL)
    (found,) = [code for kind, code in every if kind == language and containing in code]
    return found


@pytest.fixture
def room(tmp_path: Path) -> Path:
    """A folder with a photo.jpg, as the README supposes."""
    from PIL import Image

    Image.open(DEMO_CHECKPOINT.parent / "pictures" / "scene-1.png").convert("RGB").save(tmp_path / "photo.jpg")
    return tmp_path


@pytest.fixture(scope="module")
def server(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    try:
        find_tritonserver()
    except ServerError as error:
        pytest.skip(str(error))
    repository = tmp_path_factory.mktemp("readme") / "models"
    install(demo_export, repository)
    with TritonServer(repository) as running:
        running.wait_ready()
        yield running


def shell(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """With this environment's programs first on the path, stopping at the first command that fails."""
    path = f"{Path(sys.executable).parent}:/usr/bin:/bin"
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", code], cwd=folder, env={"PATH": path}, capture_output=True, text=True
    )


def with_ports(code: str, server: TritonServer) -> str:
    return code.replace("localhost:8001", f"localhost:{server.grpc_port}").replace(
        "localhost:8000", f"localhost:{server.http_port}"
    )


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^make (\w+)", blocks("bash", "make demo"), re.MULTILINE))
    assert targets == {"demo", "test"}
    for target in targets:
        assert subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True).returncode == 0


def test_from_a_checkpoint_to_a_repository(room: Path) -> None:
    code = blocks("bash", "florence2 export microsoft/Florence-2-base-ft")
    code = code.replace("microsoft/Florence-2-base-ft", str(DEMO_CHECKPOINT))
    lines = code.splitlines()
    # The installation is this environment; a server that runs until stopped has tests of its own.
    assert lines[0].startswith("pip install")
    assert lines[-1] == "florence2 serve --repository models"
    assert lines[-1] in blocks("bash", "--response-cache")
    done = shell("\n".join(lines[1:-1]), room)
    assert done.returncode == 0, done.stderr
    assert (room / "exports" / "base-ft" / "manifest.json").is_file()
    assert (room / "models" / "florence2" / "config.pbtxt").is_file()


def test_for_a_gpu(room: Path) -> None:
    export, release, serve = blocks("bash", "--precision fp16").splitlines()
    export = export.replace("microsoft/Florence-2-large-ft", str(DEMO_CHECKPOINT))
    done = shell(f"{export}\n{release}", room)
    assert done.returncode == 0, done.stderr
    arguments = cli.parser().parse_args(shlex.split(serve)[1:])
    Repository(room / "models").tidy(arguments.profile)
    assert Repository(room / "models").profile == "cuda"
    section = README[README.index("## On a GPU") :]
    profiles = {path.stem for path in (ROOT / "model_repository").glob("*/configs/*.pbtxt")}
    assert set(re.findall(r"^\| `([a-z-]+)` \|", section, re.MULTILINE)) == {"cpu", *profiles}


@pytest.mark.parametrize("page", ["export/README.md", "docker/README.md"])
def test_commands_of_other_pages_have_the_arguments_they_give(page: str) -> None:
    """What they do, other tests do; some take a GPU, an image, or a checkpoint from the hub."""
    found = re.findall(r"```bash\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    commands = re.findall(r"(?:^|florence2-triton(?: \\\n)? +)florence2 ([^#\n]*)", "\n".join(found), re.MULTILINE)
    assert len(commands) > 2
    for command in commands:
        cli.parser().parse_args(shlex.split(command))


@pytest.mark.server
def test_ask(room: Path, server: TritonServer) -> None:
    for line in blocks("bash", "florence2 ask").splitlines():
        done = shell(f"{line} --url localhost:{server.grpc_port}", room)
        assert done.returncode == 0, done.stderr
    assert (room / "boxes.png").is_file()


@pytest.mark.server
def test_python(room: Path, server: TritonServer) -> None:
    code = with_ports(blocks("python", "Florence2Client"), server)
    done = subprocess.run([sys.executable, "-c", code], cwd=room, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.server
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_curl(room: Path, server: TritonServer) -> None:
    done = shell(with_ports(blocks("bash", "base64"), server), room)
    assert done.returncode == 0, done.stderr
    assert '"model_name":"florence2"' in done.stdout


@pytest.mark.server
@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_metrics(room: Path, server: TritonServer) -> None:
    code = blocks("bash", "localhost:8002").replace("localhost:8002", f"localhost:{server.metrics_port}")
    done = shell(code, room)
    assert done.returncode == 0, done.stderr
    named = set(re.findall(r"`(florence2_[a-z_]+)`", README))
    assert {line.partition("{")[0] for line in done.stdout.splitlines()} == named


def test_parameters_are_those_of_the_configs() -> None:
    section = README[README.index("## Under load") : README.index("## On a GPU")]
    for line in re.findall(r"^\| (`[a-z_`, ]+`) \| .*$", section, re.MULTILINE):
        for name in re.findall(r"`([a-z_]+)`", line):
            configs = (path.read_text() for path in (ROOT / "model_repository").glob("*/config.pbtxt"))
            assert any(f'"{name}"' in config for config in configs), name


def test_the_table_is_the_one_that_was_measured() -> None:
    measured = (ROOT / "benchmarks" / "one_request.md").read_text()
    rows = re.findall(r"^\| (?:Triton|transformers) \|.*$", README, re.MULTILINE)
    assert len(rows) == 2
    assert [row for row in rows if row not in measured] == []


def test_fine_tuning(tmp_path: Path) -> None:
    """The training page, from data to a scored checkpoint, on a handful of the generator's pages."""
    data = [sys.executable, "-m", "florence2_training.demo", "stamps", str(tmp_path / "invoices"), "--scale", "0.01"]
    assert subprocess.run(data, capture_output=True).returncode == 0
    recipe = blocks("yaml", "recipe.yaml", TRAINING).replace("microsoft/Florence-2-base-ft", str(DEMO_CHECKPOINT))
    (tmp_path / "recipe.yaml").write_text(recipe)
    for code in ("florence2 data check", "florence2 train recipe.yaml --dry-run"):
        done = shell(blocks("bash", code, TRAINING), tmp_path)
        assert done.returncode == 0, done.stderr
    assert "AP50[stamp]" in done.stdout
    for name in ("check.html", "invoices-lines.jsonl", "invoices-coco.json", "scores.html"):
        assert (tmp_path / name).stat().st_size > 100
    assert (tmp_path / "checkpoints" / "invoices" / "model.safetensors").is_file()


def test_the_worked_example(tmp_path: Path) -> None:
    """The commands of both pages, in the repository's layout, cut to two steps."""
    code = blocks("bash", "florence2_training.demo stamps", TRAINING)
    commands = [line.partition("  #")[0].rstrip() for line in blocks("bash", "florence2 train").splitlines()]
    assert [line for line in commands if line not in code] == []
    for folder in ("training", "demo"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    code = code.replace("stamps var/stamps\n", "stamps var/stamps --scale 0.01\n")
    code = code.replace("stamps.yaml\n", "stamps.yaml max_steps=2 per_device_train_batch_size=4\n")
    done = shell(code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "var" / "stamps-checkpoint" / "model.safetensors").is_file()


@pytest.mark.server
def test_releasing(tmp_path: Path) -> None:
    """The release page: a run that was cut to two steps, and so goes live by force."""
    try:
        find_tritonserver()
    except ServerError as error:
        pytest.skip(str(error))
    data = [sys.executable, "-m", "florence2_training.demo", "stamps", str(tmp_path / "var" / "stamps")]
    assert subprocess.run([*data, "--scale", "0.01"], capture_output=True).returncode == 0
    for folder in ("training", "demo", "release"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    # Its data are those of the page, not of the repository that the gate's file lies in.
    gate = blocks("yaml", "release/gate.yaml", RELEASE)
    assert [line.partition("#")[0].strip() for line in gate.splitlines()[1:]] == [
        line for line in (ROOT / "release" / "gate.yaml").read_text().splitlines() if not line.startswith("#")
    ]
    (tmp_path / "gate.yaml").write_text(gate.replace("../var", "var").replace("watch_seconds: 60", "watch_seconds: 0"))
    first, serve = blocks("bash", "florence2 serve", RELEASE).splitlines()
    assert shell(first, tmp_path).returncode == 0
    assert serve == "florence2 serve --repository var/models --grpc-port 8001"
    with TritonServer(tmp_path / "var" / "models") as running:
        running.wait_ready()
        code = blocks("bash", "florence2 rollback", RELEASE)
        assert [line for line in blocks("bash", "florence2 rollback").splitlines() if line not in code] == []
        code = with_ports(code, running)
        code = code.replace("stamps.yaml\n", "stamps.yaml max_steps=2 per_device_train_batch_size=4\n")
        code = code.replace("--gate release/gate.yaml", "--gate gate.yaml --force")
        done = shell(code + with_ports(blocks("bash", "florence2 releases", RELEASE), running), tmp_path)
    assert done.returncode == 0, done.stderr
    assert "release 2 of florence2 is live" in done.stdout
    assert "   1  florence2  live, loaded" in done.stdout


def test_the_release_page_knows_every_setting_of_a_gate() -> None:
    from dataclasses import fields

    from florence2_release.gate import Gate

    gate = Gate()
    rows = []
    for one in fields(gate):
        value = getattr(gate, one.name)
        rows.append((one.name, "" if value is None else str(value), one.metadata["help"]))
    assert re.findall(r"^\| `(\w+)` \| (.*?) ?\| (.*) \|$", RELEASE, re.MULTILINE) == rows


def test_the_training_page_knows_every_format() -> None:
    from florence2_training.data.formats import FORMATS

    assert re.findall(r"^\| `(\w+)` \| ", TRAINING, re.MULTILINE) == list(FORMATS)


@pytest.mark.parametrize("page", ["README.md", "training/README.md", "release/README.md", "benchmarks/README.md"])
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    targets = [link for link in re.findall(r"\]\(([^)]+)\)", path.read_text()) if not link.startswith("http")]
    assert targets
    assert [link for link in targets if not (path.parent / link).exists()] == []
