"""The rooms: who imports whom, and where a module's test is."""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from conftest import ROOT

ROOMS = ("cli", "apps", "release", "demo", "training", "evaluation", "export", "data", "client")
IMPORTS = {
    "florence2": set(),
    "client": {"florence2"},
    "data": {"florence2"},
    "export": {"florence2"},
    "evaluation": {"florence2", "client", "data", "export"},
    "training": {"florence2", "data", "export", "evaluation"},
    "apps": {"florence2", "client"},
    "release": {"florence2", "client", "data", "evaluation"},
    "demo": {"florence2", "data", "export", "evaluation", "training"},
    "cli": {"florence2", "client", "data", "export", "evaluation", "training", "apps", "release"},
}
HEAVY = {"torch", "transformers", "peft", "accelerate"}

LONG = 60
"""Lines from which on a module has a test of its own name, or a line here."""
TESTS = {
    "apps/test_label": "cli.label apps.label.job apps.label.journal apps.label.writers",
    "apps/test_load": "apps.load.inputs apps.load.measurements apps.load.server_counters",
    "backend/test_models": """florence2.backend.beam_search florence2.backend.metric_names florence2.backend.metrics
        florence2.backend.postprocess florence2.backend.preprocess florence2.backend.tensors
        florence2.backend.vision_encoder florence2.backend.worker""",
    "cli/test_cli": "cli.__init__",
    "client/test_client": "client.async_client client.pictures client.task_methods",
    "client/test_results": "florence2.coco_writer",
    "data/test_check": """cli.data data.findings data.parsing data.picture_check data.picture_files
        data.rounding data.sample_page""",
    "data/test_formats": """data.chats data.coco data.markup data.objects data.record
        data.rows data.voc data.yolo""",
    "demo/test_build": """demo.__main__ demo.evaluate demo.lessons demo.model demo.pages demo.picture_store
        demo.samples demo.stamps demo.tower demo.words""",
    "differential/test_evaluation_models": """evaluation.model_io evaluation.onnx_model evaluation.served_model
        evaluation.torch_model""",
    "differential/test_generation": """export.graphs export.text_graphs
        florence2.generation.runner""",
    "differential/test_prompts": "florence2.tasks",
    "evaluation/test_report": "cli.eval evaluation.gallery",
    "evaluation/test_score": "evaluation.captions evaluation.detection evaluation.group",
    "export/test_checkpoint": """export.checkpoint_settings export.layouts export.native_model export.source
        export.tokenizer export.weights""",
    "export/test_export": "cli.export export.onnx_files export.parity export.vision_graph florence2.manifest",
    "export/test_hostile_checkpoint": "florence2.fields",
    "export/test_hostile_files": "florence2.tokenizer_file",
    "export/test_javascript": "export.javascript_parity export.javascript_graphs",
    "florence2/test_images": "florence2.image_headers",
    "generation/test_beam_search": "florence2.generation.search_state",
    "release/test_health": "release.processes release.watchdog",
    "release/test_repository": "cli.releases release.startup",
    "server/test_label_server": "apps.label.labelling",
    "server/test_perf_analyzer": "apps.load.analyzer apps.load.load_levels cli.bench",
    "server/test_rollout": """cli.release release.candidate release.gate release.make_export
        release.model_control""",
    "server/test_server": "cli.serve release.reaper release.tritonserver",
    "server/test_serving": "cli.ask",
    "server/test_ui": """apps.page.answer apps.page.app apps.page.form apps.page.layout
        apps.page.page_server""",
    "training/test_corpus": "training.sampler",
    "training/test_loop": """training.features training.objective training.progress training.run_state training.train
        training.trainable training.validation""",
    "training/test_merge": "training.adapters training.saving",
    "training/test_recipe": "training.dry_run training.run_folder",
}
"""Where the others are tested."""


def folder(room: str) -> Path:
    return ROOT / room if room == "florence2" else ROOT / room / f"florence2_{room}"


def modules(room: str) -> Iterator[tuple[str, Path]]:
    for path in sorted(folder(room).rglob("*.py")):
        yield ".".join(path.relative_to(folder(room)).with_suffix("").parts), path


def imported(path: Path) -> set[str]:
    """Top-level names, those that are imported inside of functions, too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("room", IMPORTS)
def test_a_room_imports_what_lies_below_it(room: str) -> None:
    assert set(ROOMS) | {"florence2"} == set(IMPORTS)
    found = set().union(*(imported(path) for _, path in modules(room)))
    rooms = {name.removeprefix("florence2_") for name in found if name.startswith("florence2")} - {room}
    assert rooms <= IMPORTS[room]
    assert rooms == IMPORTS[room], "the table allows what nobody needs"


def test_the_table_has_no_circle() -> None:
    below = dict(IMPORTS)
    while free := [room for room, others in below.items() if not others & below.keys()]:
        for room in free:
            del below[room]
    assert not below


def test_no_two_modules_import_each_other() -> None:
    names = {
        f"florence2{'' if room == 'florence2' else '_' + room}.{name}".removesuffix(".__init__"): path
        for room in IMPORTS
        for name, path in modules(room)
    }
    graph = {}
    for module, path in names.items():
        found = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
        named = [(node.module, f"{node.module}.{one.name}") for node in found for one in node.names]
        graph[module] = {whole if whole in names else part for part, whole in named if part in names} - {module}
    with_all = TopologicalSorter(graph)
    assert len(list(with_all.static_order())) == len(names)


def test_the_readme_has_the_same_table() -> None:
    lines = re.findall(r"^\| \[(\w+)/\]\(\w+\) \|.*\|(.*?)\|$", (ROOT / "README.md").read_text(), re.MULTILINE)
    found = {room: set(re.findall(r"\w+", others)) & set(IMPORTS) for room, others in lines if room in IMPORTS}
    assert found == IMPORTS


def test_what_serves_or_judges_a_server_imports_no_torch() -> None:
    for room in ("florence2", "client", "apps", "data", "release", "evaluation"):
        heavy = {name for name, path in modules(room) if imported(path) & HEAVY}
        assert heavy == ({"torch_model"} if room == "evaluation" else set())


def test_a_server_is_judged_without_torch() -> None:
    code = f"""import sys
for name in {sorted(HEAVY)}:
    sys.modules[name] = None
import florence2_evaluation.served_model, florence2_evaluation.score, florence2_evaluation.report
import florence2_data.check, florence2_data.convert, florence2_release.rollout
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_model_file_imports_the_backend_alone() -> None:
    files = list((ROOT / "model_repository").glob("*/*/model.py"))
    assert len(files) == 4
    assert all(imported(path) == {"florence2"} for path in files)


LONG_FUNCTIONS = {
    "forward": "a graph's steps, in the order of transformers' code",
    "_microsoft_config": "one file's fields",
    "fit": "the loop of steps, every line of it a step's",
    "label_on_ray": "one chain of Ray's calls",
}
"""More than 40 lines, and why."""


def test_nothing_is_too_long_without_a_reason() -> None:
    files = [path for room in IMPORTS for _, path in modules(room)] + list((ROOT / "benchmarks").glob("*.py"))
    long_files, long_functions = set(), set()
    for path in files:
        lines = path.read_text().splitlines()
        if len(lines) > 300:
            long_files.add(str(path.relative_to(ROOT)))
        if path.parent.name == "benchmarks":
            continue
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= 40:
                long_functions.add(node.name)
    assert long_files == set()
    assert long_functions == LONG_FUNCTIONS.keys()


def test_the_wheel_has_every_room_but_the_demo() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]
    assert {ROOT / name for name in project["targets"]["wheel"]["packages"]} == {
        folder(r) for r in {*IMPORTS} - {"demo"}
    }
    assert {ROOT / name for name in project["dev-mode-dirs"]} == {folder(room).parent for room in IMPORTS}


def test_files_that_the_architecture_names_are_there() -> None:
    named = re.findall(r"`([\w/]+\.(?:py|pbtxt))`", (ROOT / "docs" / "architecture.md").read_text())
    names = {path.name for room in (*IMPORTS, "model_repository") for path in (ROOT / room).rglob("*.*")}
    assert len(named) > 50
    assert [one for one in named if not ((ROOT / one).is_file() if "/" in one else one in names)] == []


def test_a_room_says_what_it_is_for() -> None:
    for room in IMPORTS:
        said = ast.get_docstring(ast.parse((folder(room) / "__init__.py").read_text())) or ""
        assert "import" in said, room


def test_a_module_has_a_test_of_its_name() -> None:
    tests = {str(path.relative_to(ROOT / "tests").with_suffix("")) for path in (ROOT / "tests").rglob("test_*.py")}
    without = set()
    for room in IMPORTS:
        for name, path in modules(room):
            *parents, own = f"{room}.{name}".split(".")
            folders = {parents[-1], room, "server", "differential"}
            if len(path.read_text().splitlines()) > LONG and not tests & {f"{one}/test_{own}" for one in folders}:
                without.add(f"{room}.{name}")
    assert without == set(" ".join(TESTS.values()).split())
    assert tests >= TESTS.keys()


def test_a_proof_has_a_slice_in_ci_and_a_last_whole_run() -> None:
    rows = re.findall(
        r"^\| `make (\w+)` \|.*\[(.*?)\]\(.*?\) \| `(.*?)::(\w+)` \|$",
        (ROOT / "benchmarks" / "README.md").read_text(),
        re.M,
    )
    assert len(rows) > 1
    for target, report, file, test in rows:
        assert f"\n{target}: " in (ROOT / "Makefile").read_text()
        assert re.search(r"; commit [0-9a-f]{7,}; \d{4}-\d\d-\d\d", (ROOT / "benchmarks" / report).read_text())
        assert f"\ndef {test}(" in (ROOT / file).read_text()
