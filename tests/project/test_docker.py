"""Dockerfile, compose.yaml and the monitoring under docker/. No image is built: what an image's build would run of ours
is run in a virtual environment."""

import argparse
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from inspect import signature
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from florence2_cli import COMMANDS, serve
from florence2_release.server import TritonServer
from packaging.requirements import Requirement

from florence2.backend.metric_names import COUNTERS, GAUGES

COMPOSE = yaml.safe_load((ROOT / "compose.yaml").read_text())
LOCK = (ROOT / "docker" / "requirements.txt").read_text()
SCRAPE = yaml.safe_load((ROOT / "docker" / "prometheus.yml").read_text())
DASHBOARD = json.loads((ROOT / "docker" / "grafana" / "dashboards" / "florence2.json").read_text())
EXPRESSIONS = [target["expr"] for panel in DASHBOARD["panels"] for target in panel["targets"]]

# https://docs.nvidia.com/deeplearning/triton-inference-server/user-guide/docs/user_guide/metrics.html
TRITON_METRICS = {
    "nv_inference_request_success",
    "nv_inference_request_failure",
    "nv_inference_request_duration_us",
    "nv_inference_queue_duration_us",
    "nv_inference_pending_request_count",
    "nv_cache_num_hits_per_model",
    "nv_cache_num_misses_per_model",
    "nv_gpu_utilization",
    "nv_gpu_memory_used_bytes",
    "nv_gpu_memory_total_bytes",
}


def instructions() -> Iterator[tuple[str, str]]:
    """The Dockerfile's, in order: the keyword and the rest, continuation lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(), flags=re.MULTILINE)
    for line in text.replace("\\\n", " ").splitlines():
        if line.strip():
            keyword, rest = line.split(maxsplit=1)
            yield keyword, " ".join(rest.split())


def last(keyword: str) -> str:
    return [rest for found, rest in instructions() if found == keyword][-1]


def build_context(folder: Path) -> None:
    """Copies what .dockerignore lets through, which is written as a list of what is let through."""
    for line in (ROOT / ".dockerignore").read_text().split():
        if line.startswith("!"):
            source, target = ROOT / line[1:], folder / line[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(source, target)


def build_steps() -> Iterator[str]:
    """The RUN instructions of the first stage, which makes the environment."""
    stage = 0
    for keyword, rest in instructions():
        stage += keyword == "FROM"
        if stage == 1 and keyword == "RUN":
            yield rest


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """What the Dockerfile's build stage makes, by its own steps; onnxruntime-gpu is a download of 255 MB."""
    context, target = tmp_path_factory.mktemp("context"), tmp_path_factory.mktemp("image") / "florence2"
    build_context(context)
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PATH"] = os.pathsep.join([os.path.dirname(sys.executable), env["PATH"]])
    env |= {"VIRTUAL_ENV": str(target), "PIP_PYTHON": str(target / "bin" / "python")}
    for step in build_steps():
        done = subprocess.run(["sh", "-c", step], cwd=context, env=env, capture_output=True, text=True)
        assert done.returncode == 0, f"{step}\n{done.stdout}{done.stderr}"
    yield target
    shutil.rmtree(target)  # 600 MB, which pytest would keep for three runs


def run(environment: Path, folder: Path, *command: str) -> str:
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env["PATH"] = os.pathsep.join([str(environment / "bin"), env["PATH"]])
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_dockerfile_passes_hadolint() -> None:
    hadolint = Path(sys.executable).parent / "hadolint"
    done = subprocess.run([hadolint, "--no-color", ROOT / "Dockerfile"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_build_steps_install_a_working_command(environment: Path, tmp_path: Path) -> None:
    listed = run(environment, tmp_path, "florence2", "--help")
    assert all(re.search(rf"^ +{command}\b", listed, re.MULTILINE) for command in COMMANDS)


def test_the_installed_packages_are_those_that_serve(environment: Path, tmp_path: Path) -> None:
    script = """
import florence2, florence2_client, florence2_release, onnxruntime
from onnxruntime.capi.build_and_package_info import cuda_version
print(florence2.__file__, florence2_client.__file__, florence2_release.__file__, sep="\\n")
print(*onnxruntime.get_available_providers())
print(cuda_version)
"""
    *files, providers, cuda = run(environment, tmp_path, "python", "-c", script).splitlines()
    assert all(file.startswith(str(environment)) for file in files)
    assert "CUDAExecutionProvider" in providers.split()
    assert cuda.split(".")[0] == "13"  # the image's


def test_the_wheel_in_the_image_holds_the_models(environment: Path) -> None:
    (models,) = environment.glob("lib/*/site-packages/florence2_release/model_repository")
    wanted = {path.relative_to(ROOT / "model_repository") for path in (ROOT / "model_repository").rglob("*.pbtxt")}
    assert {path.relative_to(models) for path in models.rglob("*.pbtxt")} == wanted


def test_the_lock_holds_what_pyproject_asks_for() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    locked = dict(re.findall(r"^([a-z0-9-]+)==(\S+)", LOCK, re.MULTILINE))
    for wanted in map(Requirement, project["dependencies"] + project["optional-dependencies"]["gpu"]):
        assert wanted.specifier.contains(locked[wanted.name]), wanted
    assert "onnxruntime" not in locked  # it would install over onnxruntime-gpu's files


def test_the_image_serves_as_a_user_who_may_write_what_it_mounts() -> None:
    assert last("USER") == "1000:1000"
    made = next(rest for keyword, rest in reversed(list(instructions())) if keyword == "RUN")
    assert set(json.loads(last("VOLUME"))) < set(made.split())
    assert "--owner=1000 --group=1000" in made


def test_ports_are_those_of_serve() -> None:
    parser = argparse.ArgumentParser()
    serve.add_arguments(parser)
    # As the image starts it, or an option of CMD would be unknown.
    args = parser.parse_args(json.loads(last("CMD"))[2:])
    ports = [args.http_port, args.grpc_port, args.metrics_port, args.health_port]
    assert [int(port) for port in last("EXPOSE").split()] == ports
    assert COMPOSE["services"]["server"]["ports"] == [f"127.0.0.1:{port}:{port}" for port in ports]
    assert f"http://127.0.0.1:{args.health_port}/ready" in last("HEALTHCHECK")
    assert SCRAPE["scrape_configs"][0]["static_configs"] == [{"targets": [f"server:{args.metrics_port}"]}]


def test_images_are_pinned() -> None:
    assert re.fullmatch(r"TRITON=\d\d\.\d\d-py3", last("ARG"))
    assert {rest.split()[0] for keyword, rest in instructions() if keyword == "FROM"} == {
        "nvcr.io/nvidia/tritonserver:${TRITON}"
    }
    pulled = [service["image"] for service in COMPOSE["services"].values() if "build" not in service]
    assert len(pulled) == 2
    assert all(re.fullmatch(r"\S+:v?\d+\.\d+\.\d+", image) for image in pulled)


def test_the_page_names_the_versions_that_are_pinned() -> None:
    page = (ROOT / "docs" / "docker.md").read_text()
    image = last("ARG").removeprefix("TRITON=").removesuffix("-py3")
    (onnxruntime,) = re.findall(r"^onnxruntime-gpu==(\S+)", LOCK, re.MULTILINE)
    assert f"| the image | {image}:" in page
    assert f"| onnxruntime-gpu | {onnxruntime}," in page
    assert shlex.join(json.loads(last("CMD"))) in page


def test_what_compose_mounts_is_there() -> None:
    mounts = [mount for service in COMPOSE["services"].values() for mount in service["volumes"]]
    sources = [mount.split(":")[0] for mount in mounts if isinstance(mount, str)]
    files = [source for source in sources if source.startswith("./")]
    assert len(files) == 3
    assert all((ROOT / file).exists() for file in files)
    assert set(sources) - set(files) == set(COMPOSE["volumes"])
    (repository,) = (mount for mount in mounts if not isinstance(mount, str))
    assert repository["target"] in json.loads(last("VOLUME"))


def test_compose_waits_until_the_server_has_drained() -> None:
    drain = signature(TritonServer).parameters["drain_seconds"].default
    grace = COMPOSE["services"]["server"]["stop_grace_period"]
    assert int(grace.removesuffix("s")) > drain + 25  # TritonServer.stop and kill


def test_grafana_finds_prometheus_and_the_dashboard() -> None:
    provisioning = ROOT / "docker" / "grafana" / "provisioning"
    (source,) = yaml.safe_load((provisioning / "datasources" / "prometheus.yaml").read_text())["datasources"]
    assert source["url"] == "http://prometheus:9090"
    assert source["jsonData"]["timeInterval"] == SCRAPE["global"]["scrape_interval"]
    assert {panel["datasource"]["uid"] for panel in DASHBOARD["panels"]} == {source["uid"]}
    (provider,) = yaml.safe_load((provisioning / "dashboards" / "florence2.yaml").read_text())["providers"]
    grafana = COMPOSE["services"]["grafana"]
    assert f"./docker/grafana/dashboards:{provider['options']['path']}:ro" in grafana["volumes"]
    assert grafana["environment"]["GF_DASHBOARDS_DEFAULT_HOME_DASHBOARD_PATH"].startswith(provider["options"]["path"])


def test_the_dashboard_shows_metrics_that_exist_and_all_of_ours() -> None:
    shown = {name for expression in EXPRESSIONS for name in metrics(expression)}
    ours = {*COUNTERS, *GAUGES}
    assert shown - ours == TRITON_METRICS
    assert ours <= shown


def metrics(expression: str) -> list[str]:
    """The names in PromQL that are neither functions nor labels nor in a range."""
    return re.findall(r"\b[a-z_]\w*\b(?! *\()", re.sub(r"by \([^)]*\)|\[[^]]*\]", "", expression))


def test_counters_are_shown_as_rates() -> None:
    counters = {*COUNTERS, *(name for name in TRITON_METRICS if name.startswith(("nv_inference_request", "nv_cache")))}
    for expression in EXPRESSIONS:
        for name in counters.intersection(metrics(expression)):
            assert expression.count(name) == expression.count(f"rate({name}[$__rate_interval])")


def test_panels_do_not_overlap() -> None:
    places = [panel["gridPos"] for panel in DASHBOARD["panels"]]
    cells = [
        (x, y)
        for place in places
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells))
    assert max(x for x, _ in cells) < 24
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(places)
