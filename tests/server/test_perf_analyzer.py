"""florence2 bench: the real perf_analyzer on the real server."""

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_CHECKPOINT, ROOT
from florence2_apps.load import inputs
from florence2_apps.load.analyzer import Analyzer
from florence2_cli import main
from florence2_release.server import TritonServer
from serving import client, serve

PICTURES = DEMO_CHECKPOINT.parent / "pictures"
SCENE = PICTURES / "scene-1.png"
REAL = ROOT / "var" / "perf_analyzer" / "perf_analyzer"


@pytest.fixture(scope="module")
def perf_analyzer() -> Path:
    try:
        return Analyzer.find(REAL if REAL.exists() else None).binary
    except RuntimeError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def server(perf_analyzer: Path, demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[TritonServer]:
    with serve(demo_export, tmp_path_factory.mktemp("bench")) as running:
        yield running


@pytest.fixture
def bench(server: TritonServer, perf_analyzer: Path, tmp_path: Path) -> Any:
    """`florence2 bench`, at the server, with the shortest windows -> exit code and rows of results.csv."""
    urls = ["--url", server.grpc_url, "--http-url", server.http_url.removeprefix("http://")]
    where = [
        *urls,
        "--metrics-url",
        server.metrics_url,
        "--perf-analyzer",
        str(perf_analyzer),
        "-o",
        str(tmp_path / "r"),
    ]

    def run(*arguments: str, stability: float = 1000) -> tuple[int, list[dict[str, str]]]:
        short = ["--window-requests", "4", "--stability-percentage", str(stability), "--max-trials", "3"]
        code = main(["bench", *arguments, *where, *short])
        with (tmp_path / "r" / "results.csv").open() as file:
            return code, list(csv.DictReader(file))

    return run


@pytest.fixture
def prepared(server: TritonServer, tmp_path: Path) -> Path:
    """Of one picture and one task, with its answer."""
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / SCENE.name).symlink_to(SCENE)
    file = tmp_path / "inputs.json"
    assert (
        main(["bench", "prepare", str(tmp_path / "pictures"), "--task=<OD>", "-o", str(file), "--url", server.grpc_url])
        == 0
    )
    return file


@pytest.mark.server
def test_a_run_over_grpc_and_http(bench: Any, prepared: Path, server: TritonServer) -> None:
    code, rows = bench("run", "--input-data", str(prepared), "--concurrency-range", "2")
    assert code == 0
    assert [(row["protocol"], row["concurrency"], row["state"]) for row in rows] == [
        *(("grpc", "2", "stable"), ("http", "2", "stable"))
    ]
    with client(server) as connection:
        tokens = len(connection.run("<OD>", SCENE).token_ids) - 1
    for row in rows:
        assert float(row["tokens_per_answer"]) == tokens
        assert 1 <= float(row["tokens_per_step"]) <= 2
        assert int(row["requests"]) >= 12
        assert float(row["per_second"]) > 0
        assert 0 < float(row["p50_ms"]) <= float(row["p95_ms"]) <= float(row["p99_ms"])
        # The most of a request is decoding, which Triton's own figures have none of.
        assert float(row["beam_search_ms"]) > float(row["postprocess_ms"]) > 0
        assert float(row["preprocess_ms"]) > 0


@pytest.mark.server
def test_request_rates(bench: Any, prepared: Path) -> None:
    rates = ["--request-rate-range", "8", "--request-distribution", "poisson"]
    code, (row,) = bench("run", "--input-data", str(prepared), *rates, "--protocol", "grpc")
    assert (code, row["request_rate"], row["state"]) == (0, "8.0", "stable")


@pytest.mark.server
def test_wrong_answers_fail(bench: Any, prepared: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = json.loads(prepared.read_text())
    content = made["validation_data"][0]["text"]["content"]
    content[0] = content[0].replace("<loc_", "<loc-", 1)
    prepared.write_text(json.dumps(made))
    code, rows = bench("run", "--input-data", str(prepared), "--concurrency-range", "2")
    assert code == 1
    assert [(row["protocol"], row["state"]) for row in rows] == [("grpc", "failed"), ("http", "failed")]
    for row in rows:
        assert int(row["failed"]) >= 1
        assert row["error"] == "Output doesn't match expected output"
        assert row["per_second"] == ""
    assert "requests failed: Output doesn't match" in capsys.readouterr().err
    unheld = ["run", "--input-data", str(prepared), "--no-validation", "--concurrency-range", "2", "--protocol", "http"]
    assert bench(*unheld)[0] == 0


@pytest.mark.server
def test_requests_that_fail_are_counted_and_others_go_on(bench: Any, prepared: Path) -> None:
    made = json.loads(prepared.read_text())
    made["data"][0]["prompt"]["content"] = ["<REGION_TO_OCR>"]
    prepared.write_text(json.dumps(made))
    code, rows = bench("run", "--input-data", str(prepared), "--concurrency-range", "1:2", "--protocol", "grpc")
    assert code == 1
    assert [row["state"] for row in rows] == ["failed", "failed"]
    for row in rows:
        assert int(row["failed"]) >= 1
        assert "<REGION_TO_OCR> needs a region after it" in row["error"]


@pytest.mark.server
def test_what_never_gets_stable_is_marked_and_has_figures(bench: Any, prepared: Path) -> None:
    one = ["--concurrency-range", "1", "--protocol", "grpc"]
    code, (row,) = bench("run", "--input-data", str(prepared), *one, stability=1e-9)
    assert (code, row["state"]) == (0, "unstable")
    assert float(row["p99_ms"]) > 0


@pytest.mark.server
def test_a_table_per_task(bench: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tasks = ["--task=<CAPTION>", "--task=<REGION_TO_CATEGORY>", "--num-beams=1", "--concurrency=20"]
    code, rows = bench("tasks", str(PICTURES), *tasks)
    assert code == 0
    assert [row["prompt"] for row in rows] == ["<CAPTION>", "<REGION_TO_CATEGORY>" + inputs.REGION]
    told = capsys.readouterr()
    assert "has 6 pictures: the server keeps the features of 16" in told.err
    table = (tmp_path / "r" / "table.md").read_text()
    assert told.out.startswith(table[: table.index("\n\n")])


@pytest.mark.server
def test_no_server(perf_analyzer: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--http-url", "127.0.0.1:9", "-o", str(tmp_path), "--perf-analyzer", str(perf_analyzer)]
    assert main(["bench", "tasks", str(PICTURES), "--no-validation", *where]) == 1
    assert "127.0.0.1:9/v2: " in capsys.readouterr().err
