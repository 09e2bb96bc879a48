"""The job on a local Ray cluster: the lines of the single process, through a kill, from and to Ray's own formats."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from florence2_apps.label import Job, label, open_source
from florence2_release.server import TritonServer
from label_pictures import make_pictures
from serving import client, serve, wait_until
from test_label import JOB, FakeClient

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'florence2-triton[ray]'")

pytestmark = pytest.mark.server

PICTURES = 300
SETTINGS = {"max_new_tokens": 20, "num_beams": 1}


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """Its address."""
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # Otherwise it leaves a token in the home folder.
        environment.setenv("RAY_AUTH_MODE", "disabled")
        # What the driver has on its path, the workers have.
        environment.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
        yield ray.get_runtime_context().gcs_address
        ray.shutdown()


@pytest.fixture(scope="module")
def server(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with serve(demo_export, tmp_path_factory.mktemp("ray")) as running:
        yield running


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pictures(tmp_path_factory.mktemp("pictures"), PICTURES)


@pytest.fixture(scope="module")
def lines(server: TritonServer, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The single process's."""
    output = tmp_path_factory.mktemp("single") / "out.jsonl"
    with client(server) as asked:
        label(open_source(str(folder)), Job("<OD>", SETTINGS), output, asked)
    return output.read_text().splitlines()


def written(output: Path) -> list[str]:
    return [line for file in output.glob("*.jsonl") for line in file.read_text().splitlines()]


def test_the_same_lines_through_a_kill(
    cluster: str, server: TritonServer, folder: Path, lines: list[str], tmp_path: Path
) -> None:
    output = tmp_path / "out.jsonl"
    command = [sys.executable, "-m", "florence2_cli", "label", str(folder), "<OD>", "-o", str(output)]
    command += ["--url", server.grpc_url, "--max-new-tokens", "20", "--num-beams", "1", "--ray", cluster]
    with subprocess.Popen([*command, "--workers", "1"], stderr=subprocess.PIPE) as running:
        committed = Path(f"{output}.done", "keys")
        wait_until(lambda: list(committed.glob("*_??????.parquet")) or running.poll() is not None)
        running.kill()
    assert running.returncode == -9
    assert 0 < len(written(output)) < PICTURES
    done = subprocess.run([*command, "--workers", "2"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert sorted(written(output)) == sorted(lines)
    other = subprocess.run([*command, "--min-score", "0.5"], capture_output=True, text=True)
    assert "was made with prompt <OD>, max_new_tokens 20, num_beams 1, not with" in other.stderr
    assert other.stderr.count("\n") == 1


def test_from_parquet_to_parquet(cluster: str, server: TritonServer, folder: Path, tmp_path: Path) -> None:
    from florence2_apps.label.ray import label_on_ray
    from pyarrow import Table, parquet

    files = sorted(folder.rglob("*.png"))[:30]
    rows = [{"image": {"bytes": path.read_bytes(), "path": path.name}} for path in files]
    parquet.write_table(Table.from_pylist(rows), tmp_path / "pictures.parquet", row_group_size=4)
    source = open_source(str(tmp_path / "pictures.parquet"))
    asked = {"url": server.grpc_url, "model": "florence2", "in_flight": 8, "workers": 1}
    found = label_on_ray(source, Job("<OD>", SETTINGS), str(tmp_path / "ray.parquet"), **asked)
    with client(server) as single:
        assert label(source, Job("<OD>", SETTINGS), tmp_path / "single.parquet", single) == found
    tables = [parquet.read_table(tmp_path / name).sort_by("image") for name in ("ray.parquet", "single.parquet")]
    assert tables[0].equals(tables[1])
    with pytest.raises(
        RuntimeError, match=r"^127\.0\.0\.1:\d+: .* num_beams must be from 1 to 8, not 99; what is done"
    ):
        label_on_ray(source, Job("<OD>", {"num_beams": 99}), str(tmp_path / "refused.jsonl"), **asked)


def test_a_data_set_of_ones_own(
    cluster: str, server: TritonServer, folder: Path, lines: list[str], tmp_path: Path
) -> None:
    from florence2_apps.label.ray import Labeller
    from pyarrow import parquet

    class Noting(Labeller):
        """Says which process has answered."""

        def __call__(self, batch):
            table = super().__call__(batch)
            return table.append_column("process", [[os.getpid()] * len(table)])

    found = ray.data.read_binary_files(str(folder), include_paths=True, override_num_blocks=6).map_batches(
        Noting,
        fn_constructor_args=("<OD>",),
        fn_constructor_kwargs={"column": "bytes", "url": server.grpc_url, **SETTINGS},
        concurrency=2,
        num_cpus=0,
    )
    found.drop_columns(["bytes"]).write_parquet(str(tmp_path / "labels"))
    rows = parquet.read_table(tmp_path / "labels").to_pylist()
    assert len({row.pop("process") for row in rows}) == 2
    named = {os.path.relpath(row.pop("path"), folder): row for row in rows}
    expected = {row.pop("image"): row for row in map(json.loads, lines)}
    assert named == expected


@pytest.mark.parametrize("batch_format", ["numpy", "pyarrow"])
def test_columns_that_hold_pictures(
    batch_format: str, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from florence2_apps.label.ray import Labeller
    from ray.data.block import BlockAccessor

    monkeypatch.setattr("florence2_apps.label.ray.Florence2Client", lambda *_, **__: FakeClient())
    paths = sorted(str(path) for path in folder.rglob("*.png"))[:2]
    data = [Path(path).read_bytes() for path in paths]
    columns: dict[str, list[Any]] = {
        "path": [*paths, str(tmp_path)],
        "bytes": [*data, b"<html>"],
        "struct": [{"bytes": data[0], "path": None}, {"bytes": None, "path": paths[1]}, {"bytes": None, "path": None}],
        "pixels": [np.zeros((96, 96, 3), np.uint8), np.ones((96, 96), np.uint8), np.zeros((2, 2), np.float32)],
    }
    for name, values in columns.items():
        column = np.empty(3, object)
        column[:] = values
        batch = BlockAccessor.batch_to_block({"number": np.arange(3), name: column})
        labeller = Labeller(JOB.prompt, column=name, **JOB.settings)
        rows = labeller(BlockAccessor.for_block(batch).to_batch_format(batch_format)).to_pylist()
        assert [(row["number"], row["width"], row["error"] is None) for row in rows] == [
            *((0, 96, True), (1, 96, True), (2, None, False))
        ]
    with pytest.raises(ValueError, match="a column error, width already"):
        labeller(BlockAccessor.batch_to_block({name: column, "width": np.arange(3), "error": np.arange(3)}))
