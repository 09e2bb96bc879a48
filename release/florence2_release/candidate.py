"""A candidate: a release that is loaded beside the running one, asked the same, and compared with it by the gate."""

import io
import re
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from florence2_client import Florence2Client, ServerRefused
from PIL import Image

from florence2_release.ensemble import NEXT
from florence2_release.gate import Compared, Gate, compare_scores, data_sha256
from florence2_release.model_control import Requests, Triton
from florence2_release.release_record import Release
from florence2_release.repository import Repository

WARM_UP = ("<OD>", "<CAPTION>", "<OCR_WITH_REGION>")
Say = Callable[[str], None]


class NotGood(Exception):
    """Why a candidate is not to go live, whatever the gate says."""


class Candidate:
    """One that answers. Its methods raise NotGood, RuntimeError where the server has no room to answer, and ValueError
    for bounds that can't be held."""

    def __init__(
        self,
        release: Release,
        repository: Repository,
        triton: Triton,
        gate: Gate,
        questions: list[Any],
        say: Say,
        metrics_url: str | None,
    ) -> None:
        self.release, self.repository, self.triton = release, repository, triton
        self.gate, self.questions, self.say, self.metrics_url = gate, questions, say, metrics_url
        self.compared: list[Compared] = []

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """What it answers to us with an error is a reason against it, unless it has no room for the question."""
        try:
            yield
        except ServerRefused as error:
            self.triton.check()
            if error.status in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                raise RuntimeError(f"{error}; give the same command again when the server is less busy") from error
            raise NotGood(str(error)) from error

    def warm_up(self) -> None:
        with self._asking(), self._client(self.release.name + NEXT) as client:
            for prompt in WARM_UP:
                answer = client.run(prompt, _drawing())
                if answer.model_version != str(self.release.number):
                    raise NotGood(f"version {answer.model_version} answered in its place")

    def score(self) -> None:
        if self.gate.data is None:
            self.say("  not scored: the gate has no data")
            return
        from florence2_evaluation.group import groups
        from florence2_evaluation.report import write_report
        from florence2_evaluation.score import score_group

        sha256 = data_sha256(self.questions)
        with self._asking():
            predictions = self._predictions(self.release.name + NEXT)
        by_task = groups(predictions, 0.5)
        new = [one for group in by_task for one in score_group(group)]
        report = self.repository.file_of(self.release.number, "scores.html")
        write_report(report, by_task, new, f"{self.release.name} {self.release.number}")
        self.release.scores, self.release.scored_on = {one.name: one.value for one in new}, sha256
        self.repository.write(self.release)
        higher = {one.name: one.higher_is_better for one in new}
        before = self._scores_of_running(self.release.name, sha256)
        if unknown := (set(self.gate.margins) | set(self.gate.minimum)) - set(self.release.scores) - set(before):
            raise ValueError(
                f"the gate has bounds of {', '.join(sorted(unknown))}, which the data don't give; they give "
                f"{', '.join(self.release.scores)}"
            )
        compared = compare_scores(self.gate, before, self.release.scores, higher)
        self.compared += compared
        for one in compared:
            self.say(f"  {one.name}: {_value(one.running)} -> {_value(one.new)}{'' if one.holds else '  REFUSED'}")

    def _scores_of_running(self, name: str, sha256: str) -> dict[str, float]:
        """From its record, where it was scored on the same data."""
        from florence2_evaluation.score import score

        number = self.repository.live(name)
        if number is None:
            return {}
        running = next((one for one in self.repository.releases() if one.number == number), None)
        if running and running.scored_on == sha256:
            return running.scores
        found = {one.name: one.value for one in score(self._predictions(name))}
        if running:
            running.scores, running.scored_on = found, sha256
            self.repository.write(running)
        return found

    def _predictions(self, model: str) -> list[Any]:
        from florence2_evaluation.served_model import ServedModel

        return list(ServedModel(self.triton.url, model, in_flight=self.gate.in_flight).predict(self.questions))

    def measure(self) -> None:
        if self.gate.latency_requests:
            names = [self.release.name + NEXT]
            if self.repository.live(self.release.name) is not None:
                names.append(self.release.name)
            now, before = self._latencies(names)
            bounds = [f"at most {self.gate.latency_ms:g} ms"] if self.gate.latency_ms is not None else []
            holds = self.gate.latency_ms is None or now * 1000 <= self.gate.latency_ms
            if before is not None:
                bounds.append(f"at most {self.gate.latency_ratio:g} times the running release's")
                holds = holds and now <= self.gate.latency_ratio * before
            name = "median seconds of <CAPTION>"
            self.compared.append(Compared(name, before, now, ", ".join(bounds) or "no bound", holds))
            self.say(f"  {name}: {_value(before)} -> {_value(now)}{'' if holds else '  REFUSED'}")
        if self.gate.memory_gb is not None:
            used = memory_gb(self.metrics_url)
            holds = used <= self.gate.memory_gb
            self.compared.append(Compared("GB in use", None, used, f"at most {self.gate.memory_gb:g}", holds))
            self.say(f"  {used:.1f} GB in use with both loaded{'' if holds else '  REFUSED'}")

    def _latencies(self, names: list[str]) -> tuple[float, float | None]:
        """Medians of the new and the running release, asked in turns."""
        times: dict[str, list[float]] = {name: [] for name in names}
        with ExitStack() as stack:
            stack.enter_context(self._asking())
            clients = {name: stack.enter_context(self._client(name)) for name in names}
            for turn in range(self.gate.latency_requests):
                for name in names if turn % 2 else reversed(names):
                    # Another picture each time: the two may share a vision encoder, and it remembers.
                    picture = _drawing(time.time_ns())
                    started = time.monotonic()
                    clients[name].run("<CAPTION>", picture)
                    times[name].append(time.monotonic() - started)
        before = median(times[self.release.name]) if self.release.name in times else None
        return median(times[self.release.name + NEXT]), before

    def wait_for_canary(self) -> None:
        """Waits for requests that clients send to the new release (`Florence2Client(next_share=…)`), and compares."""
        number = self.repository.live(self.release.name)
        if number is None:
            return
        first = self._both(number)
        until = time.monotonic() + self.gate.canary_seconds
        while True:
            new, running = (now.since(then) for now, then in zip(self._both(number), first, strict=True))
            if new.count >= self.gate.canary_requests:
                break
            if time.monotonic() > until:
                raise NotGood(
                    f"clients sent it {new.count} of {self.gate.canary_requests} requests in "
                    f"{self.gate.canary_seconds:g} s; set their next_share, or canary_requests to 0",
                )
            time.sleep(0.1)
        self._compare_requests("canary", running, new)

    def _both(self, number: int) -> tuple[Requests, Requests]:
        return (
            self.triton.requests(self.release.name + NEXT, self.release.number),
            self.triton.requests(self.release.name, number),
        )

    def _compare_requests(self, when: str, running: Requests, new: Requests) -> None:
        name, bound = f"{when}: share of failed requests", f"at most {self.gate.watch_failed:g} more"
        holds = not fails_more(self.gate, running, new)
        self.compared.append(Compared(name, running.failed_share, new.failed_share, bound, holds))
        before, now = running.mean_seconds, new.mean_seconds
        if before is not None and now is not None:
            name, bound = f"{when}: mean seconds of a request", f"at most {self.gate.watch_latency_ratio:g} times"
            holds = now <= self.gate.watch_latency_ratio * before
            self.compared.append(Compared(name, before, now, bound, holds))

    def _client(self, model: str) -> Florence2Client:
        return Florence2Client(self.triton.url, model=model)


def fails_more(gate: Gate, before: Requests, now: Requests) -> bool:
    """By more than chance makes of few requests: clients' own mistakes are failures, too."""
    expected = (before.failed_share + gate.watch_failed) * now.count
    return now.failed > expected + 2 * expected**0.5 + 2


def memory_gb(metrics_url: str | None) -> float:
    """What the machine, or the fullest of its GPUs, has in use, from Triton's metrics. Raises ValueError."""
    if metrics_url is None:
        raise ValueError("the gate has memory_gb: give --metrics-url")
    try:
        with urllib.request.urlopen(metrics_url, timeout=10) as response:
            text = response.read().decode()
    except (OSError, ValueError) as error:
        raise ValueError(f"no metrics at {metrics_url} ({error}); correct --metrics-url") from None
    for name in ("nv_gpu_memory_used_bytes", "nv_cpu_memory_used_bytes"):
        if values := re.findall(rf"^{name}(?:{{.*}})? (\S+)$", text, re.MULTILINE):
            return max(map(float, values)) / 1e9
    raise ValueError(f"{metrics_url} tells no memory; start the server with its CPU or GPU metrics")


def questions_of(gate: Gate) -> list[Any]:
    from florence2_data.formats import examples, open_split
    from florence2_data.record import Problem
    from florence2_evaluation.question import questions

    assert gate.data is not None
    images = Path(gate.images) if gate.images else None
    split = open_split(Path(gate.data), gate.format, images, gate.split, "split")
    found = list(examples(split))
    for one in found:
        if isinstance(one, Problem):
            raise ValueError(f"the gate's data can't be used: {one}")
    asked = list(questions((one for one in found if not isinstance(one, Problem)), gate.samples))
    if not asked:
        raise ValueError(f"{gate.data} holds no questions")
    return asked


def _drawing(seed: int = 0) -> bytes:
    """A PNG with something in it."""
    rng = np.random.default_rng(seed)
    pixels = np.repeat(np.repeat(rng.integers(0, 256, (6, 8, 3), np.uint8), 40, axis=0), 40, axis=1)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
