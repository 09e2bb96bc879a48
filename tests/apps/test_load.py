"""florence2 bench without a server: its input, what it makes of metrics, its report."""

import base64
import csv
import json
import struct
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_CHECKPOINT, ROOT
from florence2_apps.load import analyzer, inputs, measurements, server_counters
from florence2_apps.load.analyzer import Figures, Level, Outcome, Windows, levels
from florence2_apps.load.load_levels import STAGE_NAMES, Run
from florence2_apps.load.server_counters import Served
from florence2_cli import main

PICTURES = DEMO_CHECKPOINT.parent / "pictures"
SCENE = PICTURES / "scene-1.png"


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("4", [4]),
        ("1:3", [1, 2, 3]),
        ("1:16:5", [1, 6, 11, 16]),
        ("1:15:5", [1, 6, 11]),
        ("1,4,36", [1, 4, 36]),
    ],
)
def test_levels(text: str, values: list[float]) -> None:
    assert levels("concurrency", text) == [Level("concurrency", value) for value in values]


def test_rates_may_be_fractions() -> None:
    found = [level.value for level in levels("request-rate", "0.1:0.5:0.1")]
    assert found == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5])


@pytest.mark.parametrize("text", ["", "many", "0:4", "-1", "4:1", "1:4:0", "1:4:1:1", "1.5", "nan", "1:inf", "1,,2"])
def test_what_is_no_range(text: str) -> None:
    with pytest.raises(ValueError, match="is no range: write START:END:STEP"):
        levels("concurrency", text)


def test_some_pictures_of_many(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("a.png", "b.txt", "c.JPG", "d.webp", "more/e.png", "more/f.tiff"):
        (tmp_path / name).touch()
    assert [path.name for path in inputs.pictures_in(tmp_path, 9)] == ["a.png", "c.JPG", "d.webp", "e.png", "f.tiff"]
    assert [path.name for path in inputs.pictures_in(tmp_path, 2)] == ["a.png", "d.webp"]
    with pytest.raises(ValueError, match=r"there is no picture in .*/none: name a folder of JPEG, PNG"):
        inputs.pictures_in(tmp_path / "none", 9)


def test_a_mix() -> None:
    mix = inputs.read_mix(["<OD>=3", "<CAPTION_TO_PHRASE_GROUNDING>", "<REGION_TO_OCR>", "a = b"], "a star")
    region = "<REGION_TO_OCR><loc_250><loc_250><loc_749><loc_749>"
    assert mix == {"<OD>": 3, "<CAPTION_TO_PHRASE_GROUNDING>a star": 1, region: 1, "a = b": 1}


@pytest.mark.parametrize(
    ("tasks", "reason"),
    [(["<CAPTIN>"], "did you mean <CAPTION>"), (["<OD>x"], "takes no text"), (["<OD>", "<OD>"], "<OD>=2")],
)
def test_a_mix_that_cannot_be_asked(tasks: list[str], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        inputs.read_mix(tasks, "a star")


def test_requests_are_distinct_have_their_shares_and_are_spread() -> None:
    pictures = [Path(f"{number}.png") for number in range(40)]
    asked = inputs.requests(pictures, {"<OD>": 4, "<CAPTION>": 2, "<OCR>": 1})
    assert len(set(asked)) == len(asked)
    prompts = [one.prompt for one in asked]
    assert [prompts.count(prompt) for prompt in ("<OD>", "<CAPTION>", "<OCR>")] == [40, 20, 10]
    # Every part of the load has the mix of the whole, and no picture comes back soon.
    assert [prompts[:14].count(prompt) for prompt in ("<OD>", "<CAPTION>", "<OCR>")] == [8, 4, 2]
    for place in range(len(asked) - inputs.REMEMBERED):
        nearby = [one.picture for one in asked[place : place + inputs.REMEMBERED]]
        assert len(set(nearby)) == inputs.REMEMBERED


def test_the_format() -> None:
    made = inputs.document([inputs.Asked(SCENE, "<OD>")], ["</s><s>star</s>"], {"num_beams": 1})
    (entry,) = made["data"]
    sent = base64.b64decode(entry["image"]["content"]["b64"])
    assert sent == struct.pack("<I", len(SCENE.read_bytes())) + SCENE.read_bytes()
    del entry["image"]
    assert made == {
        "data": [{"prompt": {"content": ["<OD>"], "shape": [1]}, "num_beams": {"content": [1], "shape": [1]}}],
        "validation_data": [{"text": {"content": ["</s><s>star</s>"], "shape": [1]}}],
    }


def test_the_requests_of_one_task_keep_their_answers() -> None:
    asked = [inputs.Asked(SCENE, prompt) for prompt in ("<OD>", "<OCR>", "<OD>")]
    kept = inputs.only(inputs.document(asked, ["a", "b", "c"], {}), "<OD>")
    assert inputs.prompts(kept) == ["<OD>", "<OD>"]
    assert [one["text"]["content"] for one in kept["validation_data"]] == [["a"], ["c"]]


@pytest.mark.parametrize("text", ["[]", "{}", "no", '{"data": [{"image": 1}]}'])
def test_a_file_that_is_none_of_ours(tmp_path: Path, text: str) -> None:
    (tmp_path / "in.json").write_text(text)
    with pytest.raises(ValueError, match="is not what `florence2 bench prepare` writes"):
        inputs.read(tmp_path / "in.json")


BEFORE = """# TYPE nv_inference_request_success counter
nv_inference_request_success{model="florence2",version="1"} 10
nv_inference_request_duration_us{model="florence2",version="1"} 500000
nv_inference_request_failure{model="florence2",reason="OTHER",version="1"} 1
nv_inference_queue_duration_us{model="vision_encoder",version="1"} 0
florence2_running_seconds_total{model="beam_search",version="1"} 1.5
nv_cpu_utilization 0.7
"""
AFTER = """nv_inference_request_success{model="florence2",version="1"} 12
nv_inference_request_success{model="florence2",version="2"} 2
nv_inference_request_duration_us{model="florence2",version="1"} 2.5e+06
nv_inference_request_failure{model="florence2",reason="OTHER",version="1"} 3
nv_inference_request_failure{model="florence2",reason="REJECTED",version="1"} 4
nv_inference_queue_duration_us{model="vision_encoder",version="1"} 40000
nv_inference_compute_input_duration_us{model="vision_encoder",version="1"} 1000
nv_inference_compute_infer_duration_us{model="vision_encoder",version="1"} 120000
nv_inference_compute_output_duration_us{model="vision_encoder",version="1"} 3000
nv_inference_queue_duration_us{model="beam_search",version="1"} 4000
nv_inference_compute_infer_duration_us{model="beam_search",version="1"} 999999
florence2_waiting_seconds_total{model="beam_search",version="1"} 0.076
florence2_running_seconds_total{model="beam_search",version="1"} 2.7
florence2_tokens_total{model="beam_search",version="1"} 60
florence2_steps_total{model="beam_search",version="1"} 20
florence2_first_tokens_total{model="beam_search",version="1"} 5
florence2_first_token_seconds_total{model="beam_search",version="1"} 0.25
"""


def test_what_the_server_did_between_two_scrapes() -> None:
    found = server_counters.served(server_counters.parse(BEFORE), server_counters.parse(AFTER), "florence2")
    assert (found.requests, found.failed) == (4, 6)
    assert (found.tokens_per_answer, found.tokens_per_step, found.first_token_ms) == (12, 3, 50)
    # Triton's own of a model that answers at once; of one that answers later what the model counts itself.
    assert {name: value for name, value in found.stages.items() if value} == pytest.approx(
        {
            "vision_encoder waiting": 10,
            "vision_encoder": 31,
            "beam_search waiting": 20,
            "beam_search": 300,
            "between": 500 - 361,
        }
    )


def test_a_server_that_answered_nothing() -> None:
    found = server_counters.served(server_counters.parse(BEFORE), server_counters.parse(BEFORE), "florence2")
    assert found == Served(0, 0, None, None, None, {})


def run_of(level: float = 4, protocol: str = "grpc", prompt: str | None = None, **outcome: Any) -> Run:
    given = {"figures": Figures(12.3456, 81.0, 80.5, 99.25, 120.125), "stable": True} | outcome
    stages = {name: float(place) for place, name in enumerate(STAGE_NAMES)}
    return Run(prompt, protocol, Level("concurrency", level), Outcome(**given), Served(50, 0, 11.5, 2.5, 9.0, stages))


SETTING = measurements.Setting(
    "florence2 bench run",
    "2.51.0",
    {"name": "triton", "version": "2.51.0"},
    "florence2",
    8,
    True,
    Windows(),
    0.1,
    "",
    "",
)


def test_the_report_has_the_figures_of_the_csv(tmp_path: Path) -> None:
    wrong = {"figures": None, "stable": False, "errors": ("Output doesn't match expected output",) * 2}
    runs = [run_of(1), run_of(4, stable=False), run_of(1, "http"), run_of(4, "http", **wrong)]
    measurements.write(tmp_path, runs, SETTING)
    with (tmp_path / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["protocol"], row["concurrency"], row["state"], row["failed"]) for row in rows] == [
        *(("grpc", "1", "stable", "0"), ("grpc", "4", "unstable", "0")),
        *(("http", "1", "stable", "0"), ("http", "4", "failed", "2")),
    ]
    assert [rows[0][name] for name in ("per_second", "average_ms", "p50_ms", "p95_ms", "p99_ms")] == [
        *("12.346", "81.0", "80.5", "99.25", "120.125")
    ]
    assert (rows[0]["beam_search_waiting_ms"], rows[0]["between_ms"]) == ("4.0", "8.0")
    assert (rows[3]["per_second"], rows[3]["error"]) == ("", "Output doesn't match expected output")
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[2] == "| grpc | 1 in flight | 12.3 | 81.0 | 80.5 | 99.2 | 120.1 | 11.5 | 2.50 | 0 |  |"
    assert lines[3].endswith("| 0 | unstable |")
    assert lines[5] == "| http | 4 in flight |  |  |  |  |  | 11.5 | 2.50 | 2 | failed |"
    page = (tmp_path / "report.html").read_text()
    for line in lines[2:6]:
        assert "<td>" + "<td>".join(line.strip("| ").split(" | ")) in page.replace("\n", "")
    assert page.count("<svg") == 4
    assert "Output doesn&#39;t match expected output" in page
    assert "http://" not in page.replace("http://www.w3.org", "").replace("http://purl.org", "")
    whole = json.loads((tmp_path / "results.json").read_text())
    assert [{name: _text(value) for name, value in run.items()} for run in whole["runs"]] == rows
    assert whole["setting"]["perf_analyzer"] == "2.51.0"


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def test_a_table_of_tasks_names_them(tmp_path: Path) -> None:
    measurements.write(tmp_path, [run_of(36, prompt="<OD>"), run_of(36, prompt="<OCR>")], SETTING)
    lines = (tmp_path / "table.md").read_text().splitlines()
    assert lines[0].startswith("| task | protocol | load | infer/s | average, ms |")
    assert lines[3].startswith("| `<OCR>` | grpc | 36 in flight | 12.3 |")
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 1
    assert "&lt;OCR&gt; grpc<" in page


def test_without_perf_analyzer_it_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    # Before it asks for anything at the server.
    arguments = ["bench", "tasks", str(PICTURES), "--url", "127.0.0.1:9", "-o", str(tmp_path / "out")]
    assert main(arguments) == 1
    error = capsys.readouterr().err
    for words in ("pip download", "tritonclient==2.51.0", "libb64-0d", "libcudart.so.12", "py3-sdk", "make perf_an"):
        assert words in error
    # Found on the PATH, and one that lacks a library.
    (tmp_path / "perf_analyzer").write_text(
        "#!/bin/sh\necho cannot open shared object file: libb64.so.0d >&2\nexit 127"
    )
    (tmp_path / "perf_analyzer").chmod(0o755)
    assert main(arguments) == 1
    error = capsys.readouterr().err
    assert "does not start: cannot open shared object file: libb64.so.0d; it needs Debian's libb64-0d" in error
    assert main([*arguments, "--perf-analyzer", str(tmp_path / "none")]) == 1
    assert "none can't be run: No such file or directory" in capsys.readouterr().err


def test_the_words_are_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert "var/perf_analyzer/perf_analyzer:" in makefile
    assert "tritonclient==2.51.0 nvidia-cuda-runtime-cu12==" in makefile
    assert "var/perf_analyzer/perf_analyzer" in analyzer.HOW_TO_GET_IT


@pytest.mark.parametrize("option", ["--limit=0", "--concurrency=0", "--num-beams=-1", "--stability-percentage=0"])
def test_numbers_are_above_zero(option: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["bench", "tasks", str(PICTURES), "-o", str(tmp_path), option])
    assert "must be more than 0" in capsys.readouterr().err
