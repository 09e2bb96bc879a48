"""One run: a server, senders, honest clients, a watch; bounded in inputs and in time."""

import contextlib
import itertools
import multiprocessing
import queue
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

from florence2_release.install import install
from serving import PICTURES, PROMPTS, figures, transformers_answers

from fuzz.honest import CLIENTS, Asked, Question, ask, ask_all, client
from fuzz.kinds import KINDS, chosen, make, schedule
from fuzz.report import BACK, Run
from fuzz.send import Ending, Sender, ending, send_all
from fuzz.watch import EVERY, SIGNALS, End, Served, Watch, hit, make_fault, roles

Answers = list[tuple[Question, list[int]]]
SENDERS = 4
"""Processes."""
ALONE = 5
"""Seconds in which the honest ask alone, before all others."""
HANGS = 130
"""Seconds without an honest answer after which the server is started anew: longer than an honest request waits."""
FAULTS_EVERY, ENDS_EVERY = 10, 40
"""Seconds from one recovery to the next fault, and after one that ended the whole server: `serve` starts one that ends
again within half a minute after longer and longer pauses."""
ROUNDS = 2
"""In which every process is hit."""
CRASHES = 5
"""Inputs in a round that Triton may crash of."""
ENDING = 150
"""Seconds that those on their way may take at the end."""


def questions(count: int, seed: int) -> list[Question]:
    """Of all tasks and pictures in turn, with settings of their own."""
    rng = Random(f"honest {seed}")
    return [
        (
            PICTURES[number % len(PICTURES)],
            PROMPTS[number % len(PROMPTS)],
            {
                "num_beams": rng.randint(1, 5),
                "max_new_tokens": rng.choice([1, 5, 20, 60]),
                "no_repeat_ngram_size": rng.choice([0, 3]),
                "length_penalty": rng.choice([0.0, 1.0, 2.0]),
                "early_stopping": rng.choice([True, False]),
            },
        )
        for number in range(count)
    ]


class Harness:
    """A server on an export, and the answers that are right there."""

    def __init__(self, export: Path, folder: Path, count: int, seed: int, say: Callable[[str], None] = print) -> None:
        """`count`: of different honest questions."""
        self.say, self._used = say, False
        install(export, folder / "repository")
        self.served = Served(folder / "repository", folder / "serve.log")
        self.served.start()
        asked = questions(count, seed)
        self.answers: Answers = list(zip(asked, transformers_answers(self.served, asked), strict=True))  # type: ignore[arg-type]

    def close(self) -> None:
        self.served.stop()

    def run(
        self,
        name: str,
        order: Sequence[tuple[str, int]],
        seed: int,
        minutes: float,
        faults: bool = False,
        clients: int = CLIENTS,
        senders: int = SENDERS,
        alone: float = ALONE,
    ) -> Run:
        """Sends the inputs of `order`. With `faults`, processes are killed and stopped meanwhile, and the
        run is over when all were."""
        if self._used:
            # The most memory of a process is that of its whole life.
            self.served.stop()
            self.served.start()
        self._used = True
        return _Running(self, Run(name, seed), minutes).run(order, faults, clients, senders, alone)

    def again(self, ones: Sequence[tuple[str, int, int]]) -> None:
        """Sends each (kind, seed, number) alone, one after the other, and tells what came of it."""
        told: queue.SimpleQueue[End] = queue.SimpleQueue()
        up, stop = threading.Event(), threading.Event()
        up.set()
        watch = Watch(self.served, up, told.put)
        watch.start()
        sender = Sender(*self.served.ports)
        for kind, seed, number in ones:
            found = ending(sender, kind, seed, number, up, stop)
            time.sleep(2 * EVERY)
            largest = max(watch.peaks, key=lambda role: watch.peaks[role])
            self.say(
                f"{kind}:{seed}:{number} {len(make(kind, seed, number).data)} bytes: {found.outcome} {found.status} "
                f"{found.seconds:.2f} s, {largest} {watch.peaks[largest]:.0f} MB, {found.detail!r}"
            )
            while not told.empty():
                end = told.get()
                self.say(f"  {end.role} ended by itself; the server's log:\n{end.detail}")
        sender.close()
        watch.close()


class _Running:
    """What a run has going."""

    def __init__(self, harness: Harness, run: Run, minutes: float) -> None:
        self.harness, self.served, self.found = harness, harness.served, run
        self.until = time.monotonic() + 60 * minutes
        context = multiprocessing.get_context("spawn")
        self.process = context.Process
        self.endings: Any = context.Queue()
        self.up, self.stop, self.stop_honest = context.Event(), context.Event(), context.Event()
        self.watch = Watch(self.served, self.up, self.endings.put)
        self.fault: threading.Thread | None = None
        self.last_answer = self.told = time.monotonic()

    def run(self, order: Sequence[tuple[str, int]], faults: bool, clients: int, senders: int, alone: float) -> Run:
        began = time.monotonic()
        self.up.set()
        self.watch.start()
        honest = self.process(
            target=ask_all, args=(self.served.ports, self.harness.answers, clients, self.endings, self.stop_honest)
        )
        honest.start()
        self._drain(lambda: self.found.honest["answered"] >= clients and time.monotonic() - began > alone, began + 60)
        self.found.attacked = time.monotonic()
        shares = [order[number::senders] for number in range(senders)]
        rest = (self.endings, self.up, self.stop)
        sending = [
            self.process(target=send_all, args=(self.served.ports, self.found.seed, share, *rest)) for share in shares
        ]
        for one in sending:
            one.start()
        if faults:
            self.fault = threading.Thread(target=self._make_faults, daemon=True)
            self.fault.start()
        self._drain(lambda: self._is_over(sending), self.until)
        self.stop.set()
        if self.fault:
            self.fault.join(3 * BACK)
        self.stop_honest.set()
        self._drain(lambda: not any(one.is_alive() for one in (honest, *sending)), time.monotonic() + ENDING)
        for one in (honest, *sending):
            if one.is_alive():
                one.kill()
            one.join()
        self._drain(self.endings.empty, time.monotonic() + 5)
        self._finish(order, began)
        return self.found

    def _is_over(self, sending: list[Any]) -> bool:
        faults_are = self.fault is not None and not self.fault.is_alive()
        return faults_are or bool(self.watch.gave_up) or not any(one.is_alive() for one in sending)

    def _finish(self, order: Sequence[tuple[str, int]], began: float) -> None:
        found = self.found
        if self.watch.gave_up:
            found.wrong.insert(0, f"ended early: {self.watch.gave_up}")
        elif not self.fault and found.total < len(order):
            found.wrong.append(f"{found.total} of {len(order)} inputs were sent in the time given")
        if not self.watch.gave_up:
            found.wrong += [f"{kind}: number {number} had no end" for kind, number in found.on_way]
            found.wrong += self._at_the_end()
        self.watch.close()
        if found.ends:
            self.harness.say(f"what serve said:\n{self.served.log_path.read_text()[-4000:]}")
        found.peaks, found.most, found.backs = dict(self.watch.peaks), self.watch.most, self.watch.backs
        found.minutes = (time.monotonic() - began) / 60

    def _at_the_end(self) -> list[str]:
        """What does not answer as it did at first, over each protocol."""
        wrong = []
        for number in range(2):
            with client(self.served.ports, number, timeout=30) as asking:
                for question, expected in self.harness.answers[:15]:
                    asked = ask(asking, question, expected)
                    if asked.outcome != "answered":
                        wrong.append(f"at the end a request to {asking.url} is {asked.outcome}: {asked.detail}")
                        break
        url = f"http://127.0.0.1:{self.served.metrics_port}/metrics"
        give_up = time.monotonic() + BACK
        try:
            while used := figures(url).get("florence2_rows_used", 0):
                if time.monotonic() > give_up:
                    wrong.append(f"{used:.0f} rows of the caches are in use when nobody asks")
                    break
                time.sleep(0.5)
        except OSError as error:
            wrong.append(f"the metrics can't be read at the end: {error!r}")
        return wrong

    def _drain(self, done: Callable[[], bool], until: float) -> None:
        """Takes in what comes until `done`."""
        while not done() and time.monotonic() < until:
            with contextlib.suppress(queue.Empty):
                self._take(self.endings.get(timeout=0.2))
            self._look_after()

    def _take(self, one: Any) -> None:
        match one:
            case Ending():
                self.found.add(one)
            case Asked():
                self.found.add_honest(one)
                if one.outcome == "answered":
                    self.last_answer = time.monotonic()
            case End():
                self.found.add_end(one)
                self.harness.say(f"{one.role} has ended by itself; the server's log:\n{one.detail}")
            case (kind, number):
                self.found.sent(kind, number)

    def _look_after(self) -> None:
        now = time.monotonic()
        if now - self.last_answer > HANGS and not self.watch.gave_up:
            self.last_answer = now
            self.watch.hung.set()
        if now - self.told > 30:
            self.told = now
            honest, most = dict(self.found.honest), self.watch.most
            self.harness.say(f"{self.found.name}: {self.found.total} inputs, honest {honest}, {most:.0f} MB at most")

    def _make_faults(self) -> None:
        rng = Random(f"faults {self.found.seed}")
        question, expected = self.harness.answers[0]

        def answers() -> bool:
            with client(self.served.ports, 0, timeout=5) as asking:
                return ask(asking, question, expected).outcome == "answered"

        hits = [
            (what, role, partial(hit, self.watch, what, role, rng))
            for what, role in itertools.product(SIGNALS, roles(self.served))
        ]
        sender = Sender(*self.served.ports)
        crashes = [
            (kind, KINDS[kind].ends, partial(sender.send, make(kind, self.found.seed, number)))
            for kind, number in schedule(chosen("*", "crashes"), self.found.seed, CRASHES)
        ]
        wait = FAULTS_EVERY
        for what, role, make_it in (hits + crashes) * ROUNDS:
            if self.stop.wait(wait):
                break
            self.found.faults.append(make_fault(self.watch, what, role, make_it, answers, 4 * BACK))
            self.harness.say(str(self.found.faults[-1]))
            wait = ENDS_EVERY if role == "tritonserver" and what != "stop" else FAULTS_EVERY
        sender.close()
