"""Releases brought to live traffic on the real server."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from conftest import DEMO_CHECKPOINT
from florence2_cli import main
from florence2_client import Florence2Client, ServerRefused
from florence2_release import startup
from florence2_release.candidate import Candidate
from florence2_release.ensemble import ENSEMBLE
from florence2_release.gate import Gate, load_gate
from florence2_release.health import Health, close_health, serve_health
from florence2_release.install import install
from florence2_release.make_export import Prepared
from florence2_release.model_control import Triton
from florence2_release.release_record import Release
from florence2_release.repository import Repository
from florence2_release.rollback import roll_back
from florence2_release.rollout import Refused, Rollout
from florence2_release.server import TritonServer
from florence2_release.tritonserver import ServerError, find_tritonserver
from florence2_release.watchdog import Watchdog
from serving import HANGS, PICTURES, client, running, wait_until

from florence2.manifest import Manifest, sha256_of

try:
    find_tritonserver()
except ServerError as error:
    pytest.skip(str(error), allow_module_level=True)

PICTURE, PROMPT = PICTURES[0], "<OD>"
QUICK = Gate(latency_requests=0, watch_seconds=0)


def edited(export: Path, folder: Path, **files: Callable[[Path], None]) -> Path:
    """An export whose manifest fits the files that were changed."""
    other = shutil.copytree(export, folder)
    for name, edit in files.items():
        edit(other / name.replace("__", "."))
    manifest = Manifest.read(other)
    replace(manifest, files={name: sha256_of(other / name) for name in manifest.files}).write(other)
    return other


def shorter(tokens: int) -> Callable[[Path], None]:
    """Answers end after so many tokens: another release can be told by its answers."""

    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | {"max_length": tokens}))

    return edit


@pytest.fixture(scope="module")
def exports(demo_export: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("exports")
    return {
        "whole": demo_export,
        "cut": edited(demo_export, folder / "cut", generation_config__json=shorter(7)),
        "stub": edited(demo_export, folder / "stub", generation_config__json=shorter(4)),
        "broken": edited(demo_export, folder / "broken", decoder__onnx=lambda path: path.write_bytes(b"no graph")),
    }


@pytest.fixture(scope="module")
def answers(exports: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[int]]:
    """Token ids that each export gives, in this process."""
    from florence2_evaluation.onnx_model import OnnxModel
    from florence2_evaluation.question import Question

    found = {}
    for name in ("whole", "cut", "stub"):
        model = OnnxModel(exports[name])
        taken: list[list[int]] = []
        prediction = model.wording.prediction
        model.wording.prediction = lambda asked, ids, logprobs, taken=taken, made=prediction: (  # type: ignore[method-assign]
            taken.append(ids.tolist()),
            made(asked, ids, logprobs),
        )[1]
        list(model.predict([Question(PICTURE, PROMPT, ["x"])]))
        found[name] = taken[0]
    assert len({len(ids) for ids in found.values()}) == 3
    return found


@contextmanager
def served(export: Path, folder: Path, cache_size: int | None = None) -> Iterator[tuple[Repository, TritonServer]]:
    repository = Repository(folder / "repository")
    install(export, repository.folder)
    startup.prepare(repository, response_cache=cache_size is not None)
    with running(repository.folder, cache_size=cache_size) as server:
        yield repository, server


def released(
    repository: Repository,
    server: TritonServer,
    export: Path,
    gate: Gate = QUICK,
    name: str = ENSEMBLE,
    force: bool = False,
    said: list[str] | None = None,
) -> Release:
    say = said.append if said is not None else lambda line: None
    rollout = Rollout(repository, Triton(server.grpc_url), gate, say, server.metrics_url)
    return rollout.run(Prepared(export, None), name, force)


def status_of(url: str) -> int:
    try:
        with urllib.request.urlopen(url, timeout=HANGS) as response:
            return response.status
    except urllib.error.HTTPError as error:
        return error.code


@contextmanager
def always_ready(server: TritonServer) -> Iterator[None]:
    """What a probe asks answers 200 all the time."""
    health = Health(server)
    endpoint = serve_health(health, "127.0.0.1", 0)
    urls = [f"{server.http_url}/v2/models/florence2/ready", f"http://127.0.0.1:{endpoint.server_port}/ready"]
    urls.append(f"{server.http_url}/v2/health/ready")
    ended, found = threading.Event(), []

    def ask() -> None:
        while not ended.wait(0.02):
            found.extend((url, status, health.trouble()) for url in urls if (status := status_of(url)) != 200)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
        close_health(endpoint)
    assert found == []


class Traffic:
    """Requests without a pause, over gRPC and HTTP."""

    def __init__(self, server: TritonServer, workers: int = 4, **options: Any) -> None:
        self.answered: list[tuple[str, list[int]]] = []
        self.errors: list[str] = []
        self._ended = threading.Event()
        self._threads = [
            threading.Thread(target=self._run, args=(server, ("grpc", "http")[place % 2], options))
            for place in range(workers)
        ]

    def _run(self, server: TritonServer, protocol: str, options: dict[str, Any]) -> None:
        url = server.grpc_url if protocol == "grpc" else server.http_url
        with Florence2Client(url, **{"timeout": HANGS, "retries": 0} | options) as asking:
            while not self._ended.is_set():
                try:
                    answer = asking.run(PROMPT, PICTURE)
                    self.answered.append((answer.model_version, answer.token_ids.tolist()))
                except ServerRefused as error:
                    self.errors.append(str(error))

    def __enter__(self) -> "Traffic":
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        for thread in self._threads:
            thread.join()


def failed_models(server: TritonServer) -> list[str]:
    """What Triton lists as failed: strictly, its readiness would be lost for good."""
    index = Triton(server.grpc_url)._client.get_model_repository_index().models
    return [f"{one.name} {one.version}: {one.reason}" for one in index if one.reason not in ("", "unloaded")]


def test_redeploys_under_load_fail_no_request_and_mix_no_answer(
    exports: dict[str, Path], answers: dict[str, list[int]], tmp_path: Path
) -> None:
    expected = {"1": answers["whole"]}
    with (
        served(exports["whole"], tmp_path, cache_size=2**26) as (repository, server),
        always_ready(server),
        Traffic(server) as traffic,
    ):
        for number, name in enumerate(("cut", "whole", "stub", "cut"), 2):
            release = released(repository, server, exports[name], replace(QUICK, margin=1.0))
            expected[str(number)] = answers[name]
            assert release.number == number
            seen = len(traffic.answered)
            while len(traffic.answered) < seen + 20 and not traffic.errors:
                time.sleep(0.01)
        # Whatever was asked after the switch is answered by the new one.
        assert {version for version, _ in traffic.answered[-10:]} == {"5"}
        loaded = Triton(server.grpc_url).loaded()
        # The first is shared with the third; 4 is what 5 goes back to.
        assert loaded["florence2"] == {5}
        assert loaded["beam_search"] == {repository.release(4).models["beam_search"], 2}
        assert "florence2_next" not in loaded
    assert not traffic.errors
    assert {version for version, _ in traffic.answered} == set(expected)
    assert all(ids == expected[version] for version, ids in traffic.answered)


def test_what_is_worse_broken_or_not_what_it_says_is_refused(
    exports: dict[str, Path], answers: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tmp_path / "valid.jsonl"
    text = "".join(f"table<loc_{a}><loc_{a}><loc_{a + 300}><loc_{a + 300}>" for a in (100, 500))
    data.write_text(json.dumps({"image": str(PICTURE), "prefix": PROMPT, "suffix": text}) + "\n")
    with served(exports["whole"], tmp_path) as (repository, server):
        # What the running release answers is what is wanted.
        with client(server) as asking:
            wanted = asking.run(PROMPT, PICTURE).text
        suffix = wanted.replace("</s>", "").replace("<s>", "")
        data.write_text(json.dumps({"image": str(PICTURE), "prefix": PROMPT, "suffix": suffix}) + "\n")
        gate = replace(QUICK, data=str(data))
        tampered = shutil.copytree(exports["cut"], tmp_path / "tampered")
        (tampered / "tokenizer.json").write_bytes(b"{}")
        with always_ready(server), Traffic(server) as traffic:
            with pytest.raises(Refused, match=r"its gate: .*<OD> AP50 is .*, 1 in the running release \(at most 0\.01"):
                released(repository, server, exports["stub"], gate)
            with pytest.raises(Refused, match=r"is refused: beam_search can't be loaded: .*decoder\.onnx"):
                released(repository, server, exports["broken"], gate)
            assert failed_models(server) == []
            with pytest.raises(ValueError, match=r"tokenizer\.json is not the file its manifest names"):
                released(repository, server, tampered, gate)
            with monkeypatch.context() as patched:

                def full(source: Path, target: Path) -> None:
                    raise OSError(28, "No space left on device")

                patched.setattr("florence2_release.repository.copy", full)
                with pytest.raises(OSError, match=r"could not be written .*No space left"):
                    released(repository, server, exports["cut"], gate)
            seen = len(traffic.answered)
            while len(traffic.answered) < seen + 10:
                time.sleep(0.01)
        assert not traffic.errors
        assert {(version, tuple(ids)) for version, ids in traffic.answered} == {("1", tuple(answers["whole"]))}
        assert [repository.state(release).split(":")[0] for release in repository.releases()] == [
            *("live", "refused", "refused")
        ]
        report = json.loads(repository.file_of(2, "report.json").read_text())
        assert {one["name"]: one["holds"] for one in report["compared"]}["<OD> AP50"] is False
        assert repository.file_of(2, "report.html").is_file()
        assert Triton(server.grpc_url).loaded()["beam_search"] == {1}
        # By force, and recorded.
        forced = released(repository, server, exports["stub"], gate, force=True)
        assert (forced.number, forced.forced, repository.live(ENSEMBLE)) == (4, True, 4)


KILLED = """
import os, signal, sys
from florence2 import files
left = int(sys.argv[1])
def counted(function):
    def call(*arguments, **options):
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*arguments, **options)
    return call
files.write_whole = counted(files.write_whole)
# What imports it by name gets the counted one.
from florence2_release import model_control, repository
repository.copy = counted(repository.copy)
repository.shutil.rmtree = counted(repository.shutil.rmtree)
model_control.Triton._load = counted(model_control.Triton._load)
from florence2_cli import main
sys.exit(main(sys.argv[2:]))
"""


def test_a_command_that_is_killed_anywhere_is_finished_by_the_next(
    exports: dict[str, Path], answers: dict[str, list[int]], tmp_path: Path
) -> None:
    gate = tmp_path / "gate.yaml"
    gate.write_text("latency_requests: 0\nwatch_seconds: 0\n")
    with served(exports["whole"], tmp_path) as (repository, server), client(server) as asking:
        kills = 0
        for place, left in enumerate(range(1, 13)):
            name = ("cut", "whole")[place % 2]
            arguments = ["release", str(exports[name]), "--repository", str(repository.folder)]
            arguments += ["--url", server.grpc_url, "--gate", str(gate)]
            killed = subprocess.run(
                [sys.executable, "-c", KILLED, str(left), *arguments], capture_output=True, text=True, timeout=120
            )
            kills += killed.returncode == -signal.SIGKILL
            # A whole release answers: the one before, or the new one.
            before = asking.run(PROMPT, PICTURE).token_ids.tolist()
            assert before in (answers["whole"], answers["cut"])
            assert main(arguments) == 0
            assert asking.run(PROMPT, PICTURE).token_ids.tolist() == answers[name]
            live = repository.live(ENSEMBLE)
            assert live is not None
            loaded = Triton(server.grpc_url).loaded()
            assert loaded["florence2"] == {live}
            assert "florence2_next" not in loaded
            assert {model: sorted(loaded[model]) for model in repository.wanted()} == repository.wanted()
            assert not list(repository.folder.glob("*/.new-*"))
        assert kills >= 10


def test_a_server_that_is_killed_comes_back_and_the_release_is_finished(
    exports: dict[str, Path], answers: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = Candidate.measure
    with served(exports["whole"], tmp_path) as (repository, server):

        def kill(self: Candidate) -> None:
            server.kill()
            measure(self)

        with monkeypatch.context() as patched:
            patched.setattr(Candidate, "measure", kill)
            with pytest.raises(RuntimeError, match=r"no server at .*; start it, and give the same command"):
                released(repository, server, exports["cut"], replace(QUICK, latency_requests=1))
    assert (repository.ensembles(), repository.release(2).outcome) == (["florence2"], None)
    with running(repository.folder) as server, client(server) as asking:
        assert asking.run(PROMPT, PICTURE).token_ids.tolist() == answers["whole"]
        said: list[str] = []
        assert released(repository, server, exports["cut"], said=said).number == 2
        assert said[0] == "going on with release 2"
        assert asking.run(PROMPT, PICTURE).token_ids.tolist() == answers["cut"]


def stubs_of(server: TritonServer, model: str) -> list[int]:
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            line = (process / "cmdline").read_bytes()
        except OSError:
            continue
        if b"triton_python_backend_stub" in line and f"{server.repository / model}/".encode() in line:
            found.append(int(process.name))
    return found


def test_a_model_that_loses_its_process_gets_another(exports: dict[str, Path], tmp_path: Path) -> None:
    with served(exports["whole"], tmp_path) as (repository, server), client(server) as asking:
        released(repository, server, exports["cut"], QUICK)
        said: list[str] = []
        watch = Watchdog(server, said.append)
        watch.start()
        try:
            # Of the release that is kept, whose process nobody asks.
            (process,) = stubs_of(server, "beam_search/1")
            os.kill(process, signal.SIGKILL)
            wait_until(lambda: stubs_of(server, "beam_search/1") not in ([], [process]))
            time.sleep(2.5)
            assert asking.run(PROMPT, PICTURE).model_version == "2"
            assert said == ["beam_search 1 had lost its process; it is started again"]
            (process,) = stubs_of(server, "beam_search/2")
            os.kill(process, signal.SIGKILL)
            wait_until(lambda: not server.is_alive())
            assert said[1:] == ["beam_search 2 has lost its process: the server ends"]
        finally:
            watch.stop()


def test_a_live_release_that_fails_is_rolled_back(
    exports: dict[str, Path], answers: dict[str, list[int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watch = Rollout._watch
    with served(exports["whole"], tmp_path) as (repository, server):

        def break_it(self: Rollout, release: Release) -> None:
            for process in stubs_of(server, "beam_search/2"):
                os.kill(process, signal.SIGKILL)
            watch(self, release)

        monkeypatch.setattr(Rollout, "_watch", break_it)
        gate = replace(QUICK, watch_seconds=HANGS)
        with (
            # What was in the stub when it was killed is never answered: all of them, perhaps.
            Traffic(server, workers=8, timeout=5),
            pytest.raises(
                Refused, match=r"release 2 was live, and \d+ of \d+ requests failed; release 1 is live again"
            ),
        ):
            released(repository, server, exports["cut"], gate)
        with client(server) as asking:
            assert asking.run(PROMPT, PICTURE).token_ids.tolist() == answers["whole"]
        assert repository.release(2).outcome.startswith("rolled back: ")  # type: ignore[union-attr]


def test_a_live_release_that_is_slow_is_rolled_back(exports: dict[str, Path], tmp_path: Path) -> None:
    with served(exports["whole"], tmp_path) as (repository, server), Traffic(server) as traffic:
        while len(traffic.answered) < 10:
            time.sleep(0.01)
        # While its latency is measured the other answers enough to compare with.
        given: dict[str, Any] = {"latency_requests": 20, "latency_ratio": 100, "watch_latency_ratio": 1e-6}
        gate = replace(QUICK, watch_seconds=HANGS, **given)
        with pytest.raises(Refused, match=r"release 2 was live, and requests take .* s before; release 1"):
            released(repository, server, exports["cut"], gate)
        assert not traffic.errors


def test_clients_send_a_share_to_the_release_that_is_looked_at(exports: dict[str, Path], tmp_path: Path) -> None:
    with served(exports["whole"], tmp_path) as (repository, server):
        with Traffic(server, next_share=0.5) as traffic:
            gate = replace(QUICK, canary_requests=10, canary_seconds=HANGS, watch_latency_ratio=100)
            released(repository, server, exports["cut"], gate)
        assert not traffic.errors
        assert {version for version, _ in traffic.answered} == {"1", "2"}
        report = json.loads(repository.file_of(2, "report.json").read_text())
        assert [one["name"] for one in report["compared"]] == [
            *("canary: share of failed requests", "canary: mean seconds of a request")
        ]
        with pytest.raises(Refused, match=r"clients sent it 0 of 3 requests in 0\.1 s; set their next_share"):
            released(repository, server, exports["whole"], replace(QUICK, canary_requests=3, canary_seconds=0.1))
    with pytest.raises(ValueError, match="next_share is a part of the requests, from 0 to 1, not 2"):
        Florence2Client(next_share=2)


def test_fine_tunes_side_by_side_share_what_is_the_same(
    exports: dict[str, Path], answers: dict[str, list[int]], tmp_path: Path
) -> None:
    with served(exports["whole"], tmp_path) as (repository, server):
        released(repository, server, exports["cut"], name="florence2_invoices")
        released(repository, server, exports["stub"], name="florence2_streets")
        assert Triton(server.grpc_url).loaded() == {
            **{"preprocess": {1}, "vision_encoder": {1}, "postprocess": {1}, "beam_search": {1, 2, 3}},
            **{"florence2": {1}, "florence2_invoices": {2}, "florence2_streets": {3}},
        }
        for name, wanted in (("florence2", "whole"), ("florence2_invoices", "cut"), ("florence2_streets", "stub")):
            with Florence2Client(server.grpc_url, model=name) as asking:
                assert asking.run(PROMPT, PICTURE).token_ids.tolist() == answers[wanted]


def test_a_new_name_that_is_refused_does_not_keep_a_server_from_starting(
    exports: dict[str, Path], tmp_path: Path
) -> None:
    with served(exports["whole"], tmp_path) as (repository, server):
        with pytest.raises(Refused):
            released(repository, server, exports["broken"], name="florence2_invoices")
        released(repository, server, exports["cut"], name="florence2_streets")
    with running(repository.folder) as server:
        assert Triton(server.grpc_url).loaded()["beam_search"] == {1, 3}


def test_going_back_to_any_release_fails_no_request(
    exports: dict[str, Path], answers: dict[str, list[int]], tmp_path: Path
) -> None:
    def other_bytes(path: Path) -> None:
        graph = onnx.load(path, load_external_data=False)
        graph.doc_string = "the same, in another file"
        path.write_bytes(graph.SerializeToString())

    # Two models have to be loaded, and two to be given up.
    other = edited(exports["stub"], tmp_path / "other", vision_encoder__onnx=other_bytes)
    with served(other, tmp_path) as (repository, server):
        for name in ("cut", "whole"):
            released(repository, server, exports[name])
        assert Triton(server.grpc_url).loaded()["beam_search"] == {2, 3}
        triton = Triton(server.grpc_url)
        with Traffic(server) as traffic:
            for number in (1, 3, 2, 1):
                with repository.locked():
                    roll_back(repository, triton, ENSEMBLE, number)
                seen = len(traffic.answered)
                while len(traffic.answered) < seen + 10 and not traffic.errors:
                    time.sleep(0.01)
        assert not traffic.errors
        expected = {"1": answers["stub"], "2": answers["cut"], "3": answers["whole"]}
        assert {version for version, _ in traffic.answered} == set(expected)
        assert all(ids == expected[version] for version, ids in traffic.answered)
        assert triton.loaded()["beam_search"] == {1}
        # What a killed command had written is gone on with.
        repository.make_live(repository.release(3), None)
        with repository.locked():
            assert roll_back(repository, triton, ENSEMBLE).number == 3
        assert triton.loaded()["florence2"] == {3}


def test_budgets_of_latency_and_memory(exports: dict[str, Path], tmp_path: Path) -> None:
    with served(exports["whole"], tmp_path) as (repository, server):
        gate = Gate(latency_requests=2, latency_ms=1e-3, memory_gb=1e-3, watch_seconds=0, latency_ratio=100)
        with pytest.raises(ValueError, match=r"no metrics at http://127\.0\.0\.1:1/ .*; correct --metrics-url"):
            Rollout(repository, Triton(server.grpc_url), Gate(memory_gb=1), print, "http://127.0.0.1:1/")
        with pytest.raises(Refused, match=r"median seconds of <CAPTION> is .*at most 0\.001 ms.*; GB in use is"):
            released(repository, server, exports["cut"], gate)
        gate = Gate(latency_requests=2, latency_ms=1e6, memory_gb=1e6, watch_seconds=0, latency_ratio=100)
        assert released(repository, server, exports["cut"], gate).number == 3


def test_a_repository_that_the_server_reads_elsewhere(
    exports: dict[str, Path], answers: dict[str, list[int]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As in object storage: a command brings it there."""
    repository, bucket = tmp_path / "repository", tmp_path / "bucket"
    assert main(["release", str(exports["whole"]), "--repository", str(repository)]) == 0
    publish = f"mkdir -p {bucket} && cp -ru {repository}/. {bucket}"
    subprocess.run(publish, shell=True, check=True)
    with running(bucket) as server:
        options = ["--repository", str(repository), "--url", server.grpc_url, "--publish", publish]
        gate = tmp_path / "gate.yaml"
        gate.write_text("latency_requests: 0\nwatch_seconds: 0\n")
        assert main(["release", str(exports["cut"]), *options, "--gate", str(gate)]) == 0
        with client(server) as asking:
            assert asking.run(PROMPT, PICTURE).token_ids.tolist() == answers["cut"]
            assert main(["rollback", *options]) == 0
            assert asking.run(PROMPT, PICTURE).token_ids.tolist() == answers["whole"]
        capsys.readouterr()
        assert main(["releases", "--repository", str(repository), "--url", server.grpc_url]) == 0
        shown = capsys.readouterr().out.splitlines()
    assert shown[0] == "   1  florence2  live, loaded"
    assert shown[2] == "   2  florence2  rolled back: asked for"
    assert shown[-1].endswith(" GB free")
    assert main(["releases", "--repository", str(repository), "--prune", "0"]) == 0
    assert capsys.readouterr().out == "removed release 2 of florence2\n"


def test_the_circle(demo_export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Fine-tune, release the run, ask for the new class, roll back."""
    from florence2_demo.stamps import write_all

    list(write_all(tmp_path / "stamps", 0.001))
    train = tmp_path / "stamps" / "train.jsonl"
    sample = json.loads(next(line for line in train.read_text().splitlines() if "stamp" in line.replace("stamps", "")))
    data = tmp_path / "stamps" / "one.jsonl"
    data.write_text(json.dumps(sample) + "\n")
    repository = tmp_path / "repository"
    assert main(["release", str(demo_export), "--repository", str(repository)]) == 0
    settings = ["max_steps=100", "learning_rate=5e-3", "lora.r=8", "lora.dropout=0", "dataloader_num_workers=0"]
    settings += ["no_repeat_ngram_size=0", "save_steps=100", "warmup_ratio=0"]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"model: {DEMO_CHECKPOINT}\noutput_dir: {tmp_path}/run\ntrain: [{{data: {data}}}]\n")
    assert main(["train", str(recipe), *settings]) == 0
    picture = data.parent / sample["images"][0]
    with running(repository) as server:
        options = ["--repository", str(repository), "--url", server.grpc_url]
        gate = tmp_path / "gate.yaml"
        gate.write_text(f"data: {data}\nlatency_requests: 2\nlatency_ratio: 100\nwatch_seconds: 0\n")
        with client(server) as asking:

            def labels() -> list[str]:
                return asking.run("<OD>", picture).value["labels"]

            assert "stamp" not in labels()
            assert main(["release", str(tmp_path / "run"), *options, "--gate", str(gate)]) == 0
            assert "stamp" in labels()
            release = Repository(repository).release(2)
            assert release.training is not None
            assert release.training["data"]["train"]["samples"] == 1
            assert release.models == {"preprocess": 1, "vision_encoder": 1, "beam_search": 2, "postprocess": 1}
            assert main(["rollback", *options]) == 0
            assert "stamp" not in labels()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("margn: 1", "margn.*; the settings are data, format, images"),
        ("minimum: {'<OD> AP50': 0.5}", "the gate has bounds of metrics but no data to measure them on"),
        ("data: x\nsamples: 0", "samples is a whole number from 1 on, not 0"),
        ("watch_failed: -1", "watch_failed is from 0 on, not -1.0"),
        ("latency_ms: 5\nlatency_requests: 0", "latency_ms says nothing with latency_requests 0"),
    ],
)
def test_a_gate_that_can_not_be_meant(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "gate.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        load_gate(tmp_path / "gate.yaml")
    with pytest.raises(ValueError, match=r"none\.yaml is missing; give a YAML file of settings"):
        load_gate(tmp_path / "none.yaml")


def test_options_that_say_nothing_without_a_server(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["release", str(tmp_path), "--repository", str(tmp_path / "repository")]
    assert main([*options, "--force"]) == 1
    assert capsys.readouterr().err == "florence2: --force says nothing without --url\n"
    assert main([*options, "--url", "localhost:1"]) == 1
    assert "no server at localhost:1" in capsys.readouterr().err
