"""The way of a release: a candidate beside the running one, judged, switched to, watched; or the way back."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

from florence2.manifest import Manifest
from florence2_release import startup
from florence2_release.candidate import Candidate, NotGood, Say, fails_more, memory_gb, questions_of
from florence2_release.ensemble import NEXT
from florence2_release.gate import Compared, Gate, refusal
from florence2_release.gate_report import write_reports
from florence2_release.make_export import Prepared
from florence2_release.model_control import LoadError, Requests, Triton
from florence2_release.release_record import Release
from florence2_release.repository import Repository
from florence2_release.rollback import roll_back

ENOUGH = 10
"""Requests on either side before their latency says something."""


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
        self.questions = questions_of(gate) if gate.data is not None else []
        if gate.memory_gb is not None:
            memory_gb(metrics_url)
        self.compared: list[Compared] = []

    def run(self, prepared: Prepared, name: str, force: bool = False) -> Release:
        """Raises Refused; RuntimeError or ValueError where something else than the release is in the way: the same
        command goes on when that is mended."""
        with self.repository.locked():
            startup.check_up_to_date(self.repository)
            self.repository.remove_leftovers()
            release = self._begun(prepared, name)
            if release is None:
                release = self.repository.add(prepared.export, name, prepared.training)
                self.say(f"release {release.number} of {name}: {_shared(release)}")
            if self.repository.live(name) != release.number:
                try:
                    self._judge(release, force)
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

    def _judge(self, release: Release, force: bool) -> None:
        try:
            self._compare(release, force)
        except NotGood as error:
            raise self._refuse(release, str(error)) from error

    def _compare(self, release: Release, force: bool) -> None:
        if damaged := self.repository.damage(release):
            raise NotGood(f"{damaged} is not the file that was installed; release the export again")
        if not release.manifest["parity"]:
            raise NotGood("its export was never compared with its checkpoint; export it again")
        with self._step(release, "load"):
            self.repository.add_candidate(release)
            self.triton.reconcile(self.repository)
        candidate = Candidate(
            release, self.repository, self.triton, self.gate, self.questions, self.say, self.metrics_url
        )
        self.compared = candidate.compared
        first = self._running(release)
        with self._step(release, "warm-up"):
            candidate.warm_up()
        with self._step(release, "score"):
            candidate.score()
        with self._step(release, "latency and memory"):
            candidate.measure()
        if self.gate.canary_requests:
            with self._step(release, "canary"):
                candidate.wait_for_canary()
        before = self._running(release).since(first)
        release.before = before.answered, before.failed, before.seconds
        if reason := refusal(self.compared):
            if not force:
                raise NotGood(f"its gate: {reason}")
            release.forced = True
            self.say(f"--force: goes live although {reason}")
        write_reports(self.repository, release, self.compared)

    def _running(self, release: Release) -> Requests:
        number = self.repository.live(release.name)
        return Requests() if number is None else self.triton.requests(release.name, number)

    # --- the switch, and after it ---

    def _switch(self, release: Release) -> None:
        number = self.repository.live(release.name)
        try:
            if number != release.number:
                has_record = any(one.number == number for one in self.repository.releases())
                with self._step(release, "switch"):
                    self.repository.make_live(release, number if has_record else None)
                    self.triton.reconcile(self.repository)
            with self._step(release, "retire"):
                self.repository.remove_candidate(release.name)
                self.triton.reconcile(self.repository)
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
        if fails_more(self.gate, before, now):
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
        self.repository.remove_candidate(release.name)
        self.triton.reconcile(self.repository)


def _shared(release: Release) -> str:
    own = [model for model, version in release.models.items() if version == release.number]
    others = [f"{model} of {version}" for model, version in release.models.items() if version != release.number]
    return f"its own {', '.join(own) or 'nothing'}" + (f"; shares {', '.join(others)}" if others else "")


def _done(release: Release, step: str) -> bool:
    return any(entry["step"] == step for entry in release.steps)
