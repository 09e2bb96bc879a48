"""A repository that was made at bb97b87 is served, takes a release and goes back.

tests/fixtures/repository-bb97b87.tar.xz holds tiny random checkpoints: release 1, to go back to, release 2, which is
live, and release 3, a second fine-tune called `stamps`, with what that commit answered. Every change of models,
graphs, configs and records has to serve it.
"""

import json
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from conftest import DEMO_CHECKPOINT, ROOT
from florence2_cli import main
from florence2_client import Florence2Client
from florence2_release import startup
from florence2_release.gate import Gate
from florence2_release.make_export import Prepared
from florence2_release.model_control import Triton
from florence2_release.repository import Repository
from florence2_release.rollback import roll_back
from florence2_release.rollout import Rollout
from florence2_release.server import TritonServer
from serving import running

ARCHIVE = ROOT / "tests" / "fixtures" / "repository-bb97b87.tar.xz"
PICTURES = DEMO_CHECKPOINT.parent / "pictures"

pytestmark = pytest.mark.server


@pytest.fixture
def old(tmp_path: Path) -> Path:
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@contextmanager
def served(repository: Repository, response_cache: bool = False) -> Iterator[TritonServer]:
    startup.prepare(repository, response_cache=response_cache)
    with running(repository.folder, cache_size=2**26 if response_cache else None) as server:
        yield server


def ask(server: TritonServer, question: dict[str, Any]) -> tuple[str, list[int]]:
    with Florence2Client(server.grpc_url, model=question["model"]) as client:
        answer = client.run(question["prompt"], PICTURES / question["picture"], **question["settings"])
        return answer.model_version, answer.token_ids.tolist()


def test_it_is_served_takes_a_release_and_goes_back(old: Path, demo_export: Path) -> None:
    repository = Repository(old / "repository")
    questions = json.loads((old / "answers.json").read_text())
    with served(repository) as server:
        for question in questions:
            assert ask(server, question) == (question["version"], question["token_ids"])
        assert startup.outdated(repository) == []
        assert [repository.damage(release) for release in repository.releases()] == [None] * 3
        triton = Triton(server.grpc_url)
        gate = Gate(latency_requests=0, watch_seconds=0)
        release = Rollout(repository, triton, gate, lambda line: None).run(Prepared(demo_export, None), "florence2")
        assert release.number == 4
        assert ask(server, questions[0])[0] == "4"
        assert roll_back(repository, triton, "florence2").number == 2
        assert roll_back(repository, triton, "florence2", 1).number == 1
        assert ask(server, questions[0])[0] == "1"
        assert roll_back(repository, triton, "florence2", 2).number == 2
        for question in questions:
            assert ask(server, question) == (question["version"], question["token_ids"])


def test_it_is_served_with_a_response_cache(old: Path) -> None:
    questions = json.loads((old / "answers.json").read_text())
    with served(Repository(old / "repository"), response_cache=True) as server:
        for question in questions * 2:
            assert ask(server, question) == (question["version"], question["token_ids"])


def test_nothing_is_begun_under_a_server_of_the_commit_before(old: Path, capsys: pytest.CaptureFixture[str]) -> None:
    repository = Repository(old / "repository")
    with pytest.raises(ValueError, match=r"are those of another release of florence2-triton: stop and start"):
        startup.check_up_to_date(repository)
    before = repository.live("florence2")
    assert main(["rollback", "--repository", str(repository.folder), "--url", "127.0.0.1:1"]) == 1
    assert "are those of another release of florence2-triton: stop and start" in capsys.readouterr().err
    assert repository.live("florence2") == before
