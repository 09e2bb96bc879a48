"""The way of a release: looked at beside the running one, judged, switched to, watched; and the way back."""

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

from florence2.manifest import Manifest
from florence2_release.gate import Compared, Gate, compare_scores, data_sha256, refusal
from florence2_release.gate_report import write_reports
from florence2_release.make_export import Prepared
from florence2_release.model_control import LoadError, Requests, Triton
from florence2_release.repository import NEXT, Release, Repository

WARM_UP = ("<OD>", "<CAPTION>", "<OCR_WITH_REGION>")
Say = Callable[[str], None]


class Refused(RuntimeError):
    """The new release is not live; clients get the one that ran before."""


class Rollout:
    """One release on its way. Each step can be done again: what a killed command had done is found on the disk and in
    the server."""

    def __init__(
        self, repository: Repository, triton: Triton, gate: Gate, say: Say, metrics_url: str | None = None
    ) -> None:
        """Raises ValueError for a gate that can't be asked."""
        self.repository, self.triton, self.gate, self.say = repository, triton, gate, say
        self.metrics_url = metrics_url
        self.asked = _questions(gate) if gate.data is not None else []
        if gate.memory_gb is not None:
            memory_gb(metrics_url)
        self.compared: list[Compared] = []

    def run(self, prepared: Prepared, name: str, force: bool = False) -> Release:
        """Raises Refused; RuntimeError or ValueError where something else than the release is in the way: the same
        command goes on when that is mended."""
        with self.repository.locked():
            self.repository.check_up_to_date()
            self.repository.sweep()
            release = self._begun(prepared, name)
            if release is None:
                release = self.repository.add(prepared.export, name, prepared.training)
                self.say(f"release {release.number} of {name}: {_shared(release)}")
            if self.repository.live(name) != release.number:
                try:
                    self._look_at(release, force)
                except LoadError as error:
                    if release.models.get(error.model) == release.number or error.model == name + NEXT:
                        raise self._refuse(release, str(error)) from error
                    self._withdraw(release)
                    raise
                except Refused:
                    raise
                except Exception:
                    self._withdraw(release)
                    raise
            self._switch(release)
        # Others may go back, or release something else, while it is watched.
        self._watch(release)
        return release

    def _begun(self, prepared: Prepared, name: str) -> Release | None:
        """The same export's release, if a command was killed on its way; others that were are given up."""
        found = None
        for release in self.repository.releases():
            if release.name != name:
                continue
            is_live = self.repository.live(name) == release.number
            same = release.manifest["files"] == Manifest.read(prepared.export).files
            if same and (is_live and release.before is not None and not _done(release, "watch")):
                found = release
            elif release.outcome is None and not is_live:
                if same:
                    found = release
                else:
                    self._give_up(release, "given up: another was released before it went live")
        if found:
            self.say(f"going on with release {found.number}")
        return found

    # --- before the switch ---

    def _look_at(self, release: Release, force: bool) -> None:
        if damaged := self.repository.damage(release):
            raise self._refuse(release, f"{damaged} is not the file that was installed; release the export again")
        if not release.manifest["parity"]:
            raise self._refuse(release, "its export was never compared with its checkpoint; export it again")
        with self._step(release, "load"):
            self.repository.offer(release)
            self.triton.follow(self.repository)
        first = self._running(release)
        with self._step(release, "warm-up"):
            self._warm_up(release)
        with self._step(release, "score"):
            self._score(release)
        with self._step(release, "latency and memory"):
            self._measure(release)
        if self.gate.canary_requests:
            with self._step(release, "canary"):
                self._canary(release)
        before = self._running(release).since(first)
        release.before = before.answered, before.failed, before.seconds
        if reason := refusal(self.compared):
            if not force:
                raise self._refuse(release, f"its gate: {reason}")
            release.forced = True
            self.say(f"--force: goes live although {reason}")
        write_reports(self.repository, release, self.compared)

    def _running(self, release: Release) -> Requests:
        number = self.repository.live(release.name)
        return Requests() if number is None else self.triton.requests(release.name, number)

    @contextmanager
    def _asking(self, release: Release) -> Iterator[None]:
        """What it answers to us with an error is a reason against it, unless it has no room for the question."""
        try:
            yield
        except ServerRefused as error:
            self.triton.check()
            if error.status in ("UNAVAILABLE", "DEADLINE_EXCEEDED"):
                raise RuntimeError(f"{error}; give the same command again when the server is less busy") from error
            raise self._refuse(release, str(error)) from error

    def _warm_up(self, release: Release) -> None:
        with self._asking(release), self._client(release.name + NEXT) as client:
            for prompt in WARM_UP:
                answer = client.run(prompt, _drawing())
                if answer.model_version != str(release.number):
                    raise self._refuse(release, f"version {answer.model_version} answered in its place")

    def _score(self, release: Release) -> None:
        if self.gate.data is None:
            self.say("  not scored: the gate has no data")
            return
        from florence2_evaluation.group import groups
        from florence2_evaluation.report import write_report
        from florence2_evaluation.score import score_group

        sha256 = data_sha256(self.asked)
        with self._asking(release):
            predictions = self._predictions(release.name + NEXT)
        by_task = groups(predictions, 0.5)
        new = [one for group in by_task for one in score_group(group)]
        report = self.repository.file_of(release.number, "scores.html")
        write_report(report, by_task, new, f"{release.name} {release.number}")
        release.scores, release.scored_on = {one.name: one.value for one in new}, sha256
        self.repository.write(release)
        higher = {one.name: one.higher_is_better for one in new}
        before = self._scores_of_running(release.name, sha256)
        if unknown := (set(self.gate.margins) | set(self.gate.minimum)) - set(release.scores) - set(before):
            raise ValueError(
                f"the gate has bounds of {', '.join(sorted(unknown))}, which the data don't give; they give "
                f"{', '.join(release.scores)}"
            )
        compared = compare_scores(self.gate, before, release.scores, higher)
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
        from florence2_evaluation.models import ServedModel

        return list(ServedModel(self.triton.url, model, in_flight=self.gate.in_flight).predict(self.asked))

    def _measure(self, release: Release) -> None:
        if self.gate.latency_requests:
            names = [release.name + NEXT]
            if self.repository.live(release.name) is not None:
                names.append(release.name)
            now, before = self._latencies(release, names)
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

    def _latencies(self, release: Release, names: list[str]) -> tuple[float, float | None]:
        """Medians of the new and the running release, asked in turns."""
        times: dict[str, list[float]] = {name: [] for name in names}
        with ExitStack() as stack:
            stack.enter_context(self._asking(release))
            clients = {name: stack.enter_context(self._client(name)) for name in names}
            for turn in range(self.gate.latency_requests):
                for name in names if turn % 2 else reversed(names):
                    # Another picture each time: the two may share a vision encoder, and it remembers.
                    picture = _drawing(time.time_ns())
                    started = time.monotonic()
                    clients[name].run("<CAPTION>", picture)
                    times[name].append(time.monotonic() - started)
        before = median(times[release.name]) if release.name in times else None
        return median(times[release.name + NEXT]), before

    def _canary(self, release: Release) -> None:
        """Waits for requests that clients send to the new release (`Florence2Client(next_share=…)`), and compares."""
        number = self.repository.live(release.name)
        if number is None:
            return
        first = self._both(release, number)
        until = time.monotonic() + self.gate.canary_seconds
        while True:
            new, running = (now.since(then) for now, then in zip(self._both(release, number), first, strict=True))
            if new.count >= self.gate.canary_requests:
                break
            if time.monotonic() > until:
                raise self._refuse(
                    release,
                    f"clients sent it {new.count} of {self.gate.canary_requests} requests in "
                    f"{self.gate.canary_seconds:g} s; set their next_share, or canary_requests to 0",
                )
            time.sleep(0.1)
        self._compare_requests("canary", running, new)

    def _both(self, release: Release, number: int) -> tuple[Requests, Requests]:
        return (
            self.triton.requests(release.name + NEXT, release.number),
            self.triton.requests(release.name, number),
        )

    def _compare_requests(self, when: str, running: Requests, new: Requests) -> None:
        name, bound = f"{when}: share of failed requests", f"at most {self.gate.watch_failed:g} more"
        holds = not self._fails_more(running, new)
        self.compared.append(Compared(name, running.failed_share, new.failed_share, bound, holds))
        before, now = running.mean_seconds, new.mean_seconds
        if before is not None and now is not None:
            name, bound = f"{when}: mean seconds of a request", f"at most {self.gate.watch_latency_ratio:g} times"
            holds = now <= self.gate.watch_latency_ratio * before
            self.compared.append(Compared(name, before, now, bound, holds))

    def _fails_more(self, before: Requests, now: Requests) -> bool:
        """By more than chance makes of few requests: clients' own mistakes are failures, too."""
        expected = (before.failed_share + self.gate.watch_failed) * now.count
        return now.failed > expected + 2 * expected**0.5 + 2

    # --- the switch, and after it ---

    def _switch(self, release: Release) -> None:
        number = self.repository.live(release.name)
        try:
            if number != release.number:
                has_record = any(one.number == number for one in self.repository.releases())
                with self._step(release, "switch"):
                    self.repository.make_live(release, number if has_record else None)
                    self.triton.follow(self.repository)
            with self._step(release, "retire"):
                self.repository.withdraw(release.name)
                self.triton.follow(self.repository)
        except LoadError as error:
            self._back(release, str(error))
        release.outcome = "live"
        self.repository.write(release)
        self.say(f"release {release.number} of {release.name} is live")

    def _watch(self, release: Release) -> None:
        with self._step(release, "watch"):
            until = time.monotonic() + self.gate.watch_seconds
            first = self.triton.requests(release.name, release.number)
            while True:
                if self.repository.live(release.name) != release.number:
                    raise Refused(f"release {release.number} is not live any more: another command saw to that")
                now = self.triton.requests(release.name, release.number).since(first)
                if reason := self._trouble(release, now):
                    with self.repository.locked():
                        self._back(release, reason)
                if time.monotonic() >= until:
                    break
                time.sleep(min(0.5, max(until - time.monotonic(), 0)))

    def _trouble(self, release: Release, now: Requests) -> str | None:
        before = Requests(*(release.before or ()))
        if self._fails_more(before, now):
            return f"{now.failed} of {now.count} requests failed"
        mean, mean_before = now.mean_seconds, before.mean_seconds
        if mean is None or mean_before is None or min(now.answered, before.answered) < ENOUGH:
            return None
        if mean > self.gate.watch_latency_ratio * mean_before:
            return f"requests take {mean:.3g} s, {mean_before:.3g} s before"
        return None

    def _back(self, release: Release, reason: str) -> None:
        if release.standby is None:
            raise Refused(f"release {release.number}: {reason}; there is no release to go back to")
        back = roll_back(self.repository, self.triton, release.name, reason=reason)
        raise Refused(f"release {release.number} was live, and {reason}; release {back.number} is live again")

    # --- how ---

    @contextmanager
    def _step(self, release: Release, name: str) -> Iterator[None]:
        self.say(f"{name} ...")
        started = time.monotonic()
        yield
        seconds = round(time.monotonic() - started, 3)
        release.steps.append({"step": name, "seconds": seconds, "at": time.strftime("%Y-%m-%dT%H:%M:%S%z")})
        self.repository.write(release)
        self.say(f"{name}: {seconds:.2f} s")

    def _refuse(self, release: Release, reason: str) -> Refused:
        write_reports(self.repository, release, self.compared)
        self._give_up(release, f"refused: {reason}")
        return Refused(
            f"release {release.number} is refused: {reason}. What ran before goes on running; the record is "
            f"{self.repository.file_of(release.number, 'json')}"
        )

    def _give_up(self, release: Release, outcome: str) -> None:
        self._withdraw(release)
        self.triton.forget(self.repository, release)
        release.outcome = outcome
        self.repository.write(release)
        self.repository.remove_models(release)

    def _withdraw(self, release: Release) -> None:
        self.repository.withdraw(release.name)
        self.triton.follow(self.repository)

    def _client(self, model: str) -> Florence2Client:
        return Florence2Client(self.triton.url, model=model)


ENOUGH = 10
"""Requests on either side before their latency says something."""


def roll_back(
    repository: Repository, triton: Triton | None, name: str, number: int | None = None, reason: str = "asked for"
) -> Release:
    """The release before, or `number`, is live again; the one that was is not loaded any more. Goes on with what a
    killed command began. Raises ValueError where there is none to go back to."""
    live = repository.live(name)
    if live is None:
        raise ValueError(f"{repository.folder} has no release of {name}; `florence2 releases` lists them")
    running = repository.release(live)
    if number is None and running.standby is None and triton and triton.loaded().get(name, set()) != {live}:
        # The disk is there already.
        number = live
    number = running.standby if number is None else number
    if number is None:
        raise ValueError(f"release {live} of {name} has none before it that is kept; name one with --to")
    back = repository.release(number)
    if back.name != name:
        raise ValueError(f"release {number} is of {back.name}, not of {name}")
    if number != live:
        if damaged := repository.damage(back):
            raise ValueError(f"release {number} is not whole any more: {damaged} is missing or changed")
        running.outcome = f"rolled back: {reason}"
        repository.write(running)
        repository.make_live(back, None)
    repository.withdraw(name)
    if triton:
        triton.follow(repository)
    repository.settle()
    return back


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


def _questions(gate: Gate) -> list[Any]:
    from florence2_datasets.formats import examples, open_data
    from florence2_datasets.record import Problem
    from florence2_evaluation.question import questions

    assert gate.data is not None
    images = Path(gate.images) if gate.images else None
    splits = {split.name: split for split in open_data(Path(gate.data), gate.format, images)}
    name = gate.split or next(iter(splits))
    if name not in splits or (gate.split is None and len(splits) > 1):
        raise ValueError(f"{gate.data} has the splits {', '.join(splits)}; say which with split")
    found = list(examples(splits[name]))
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


def _shared(release: Release) -> str:
    own = [model for model, version in release.models.items() if version == release.number]
    others = [f"{model} of {version}" for model, version in release.models.items() if version != release.number]
    return f"its own {', '.join(own) or 'nothing'}" + (f"; shares {', '.join(others)}" if others else "")


def _done(release: Release, step: str) -> bool:
    return any(entry["step"] == step for entry in release.steps)


def _value(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
