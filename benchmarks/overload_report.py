"""What overload.py measures, and its tables."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean

import numpy as np
from load_generator import CONNECTIONS, GIVE_UP, KINDS, LATE, NEW_TOKENS, PICTURES, PROMPT
from numpy.typing import NDArray
from tables import Table

IN_FLIGHT = 32
"""At saturation."""
GONE = 500
"""Clients that go."""


@dataclass(frozen=True)
class Recovery:
    """An honest request, again and again from a moment on until it takes no more than twice its usual time: what became
    of the first, and seconds until one was answered and until one came that was as fast as usual; None for never."""

    first: str
    answered: float | None
    usual: float | None

    def cells(self) -> tuple[str, ...]:
        return self.first, *("never" if one is None else f"{one:.2f}" for one in (self.answered, self.usual))


@dataclass(frozen=True)
class Phase:
    """A load and what came of it; times in seconds since the measured time began, one of each per request."""

    name: str
    rate: float
    seconds: float
    due: NDArray[np.float64]
    sent: NDArray[np.float64]
    ended: NDArray[np.float64]
    kinds: NDArray[np.int64]
    said: dict[str, int]
    server_cpu: float
    generator_cpu: float
    memory: list[dict[str, float]]
    """Resident MB of each process, before, sixty times under load, and after."""
    recovery: Recovery

    def per_second(self, kind: str, bins: int) -> NDArray[np.float64]:
        """How many ended so, in equal parts of the measured time."""
        ended = self.ended[self.kinds == KINDS.index(kind)]
        return np.histogram(ended, bins, (0, self.seconds))[0] * bins / self.seconds

    @property
    def answers(self) -> float:
        """Per second."""
        return float(self.per_second("answered", 1)[0])

    @property
    def answers_per_cpu_second(self) -> float:
        return self.answers * self.seconds / self.server_cpu

    def milliseconds(self, kind: str) -> tuple[str, str]:
        """Median and p99 from when they were due."""
        chosen = (self.kinds == KINDS.index(kind)) & (self.due >= 0)
        if not chosen.any():
            return "-", "-"
        p50, p99 = np.percentile((self.ended - self.due)[chosen], (50, 99))
        return f"{1000 * p50:,.0f}", f"{1000 * p99:,.0f}"


@dataclass(frozen=True)
class Flood:
    """Clients that went: what became of how many, the server's CPU seconds, an honest request after them."""

    protocol: str
    seen: Counter[str]
    server_cpu: float
    recovery: Recovery


def report(phases: Sequence[Phase], floods: Sequence[Flood], usual: float) -> str:
    return (
        f"{PROMPT}, {NEW_TOKENS} tokens at most, over HTTP; {PICTURES:,} different pictures, then the same again;\n"
        f"{CONNECTIONS:,} connections at most, clients that wait {GIVE_UP:.0f} s. Rates are those of the measured "
        f"time: {', '.join(f'{phase.seconds:.0f} s' for phase in phases)}.\n"
        f"On time: sent within {1000 * LATE:.0f} ms of its moment, from which on it is timed.\n\n{rates(phases)}\n"
        f"All requests, those of the warm-ups among them:\n\n{outcomes(phases)}\n{said(phases)}\n"
        f"Per second, in each tenth of the measured time:\n\n{tenths(phases)}\n"
        f"Alone, a request takes {1000 * usual:.0f} ms. When the load has stopped, whose clients still wait, and when "
        f"those of a flood have gone:\n\n{recoveries(phases, floods)}\n"
        f"Resident MB; shared memory counts in every process that has it mapped:\n\n{memory(phases)}"
    )


def rates(phases: Sequence[Phase]) -> Table:
    """Each overload against the mean of the saturations before and after it: the machine's speed may drift."""
    rows = Table(
        *("", "come/s", "on time", "answered/s", "of saturation's", "server's CPU, cores", "answered per CPU-second"),
        *("of saturation's", "generator's CPU, cores"),
    )
    for number, phase in enumerate(phases):
        on_time = (phase.sent - phase.due <= LATE).mean()
        beside = phases[number - 1 : number + 2 : 2] if phase.rate else []
        answers, per_cpu_second = phase.answers, phase.answers_per_cpu_second
        rows.add(
            phase.name,
            *((f"{phase.rate:.2f}", f"{on_time:.1%}") if phase.rate else (f"{IN_FLIGHT} in flight", "-")),
            f"{answers:.2f}",
            f"{answers / mean(one.answers for one in beside):.0%}" if beside else "",
            f"{phase.server_cpu / phase.seconds:.2f}",
            f"{per_cpu_second:.2f}",
            f"{per_cpu_second / mean(one.answers_per_cpu_second for one in beside):.0%}" if beside else "",
            f"{phase.generator_cpu / phase.seconds:.2f}",
        )
    return rows


def outcomes(phases: Sequence[Phase]) -> Table:
    rows = Table("requests", *KINDS, "answered: p50, ms", "p99", "refused: p50, ms", "p99")
    for phase in phases:
        counts = np.bincount(phase.kinds, minlength=len(KINDS))
        times = (*phase.milliseconds("answered"), *phase.milliseconds("refused"))
        rows.add(phase.name, *(f"{number:,}" for number in counts), *times)
    return rows


def said(phases: Sequence[Phase]) -> str:
    """What came in place of answers, the most frequent first."""
    lines = (
        f"- {phase.name}: {number:,} x `{text}`\n"
        for phase in phases
        for text, number in Counter(phase.said).most_common(4)
        if text
    )
    return "".join(lines)


def tenths(phases: Sequence[Phase]) -> Table:
    rows = Table("", *map(str, range(1, 11)))
    for phase in phases:
        for kind in KINDS[:4]:
            numbers = phase.per_second(kind, 10)
            if numbers.any():
                rows.add(f"{phase.name}, {kind}", *(f"{number:.1f}" for number in numbers))
    return rows


def recoveries(phases: Sequence[Phase], floods: Sequence[Flood]) -> Table:
    rows = Table("after", "the first honest request", "one is answered after, s", "as fast as usual after, s")
    for phase in phases:
        rows.add(phase.name, *phase.recovery.cells())
    for flood in floods:
        became = ", ".join(f"{number} {kind}" for kind, number in flood.seen.items())
        what = f"{GONE} clients over {flood.protocol} ({became}; {flood.server_cpu:.1f} s of the server's CPU)"
        rows.add(what, *flood.recovery.cells())
    return rows


def memory(phases: Sequence[Phase]) -> Table:
    rows = Table("", "process", "before", "after a tenth", "half", "all", "most", "afterwards")
    for phase in (phase for phase in phases if phase.rate):
        loaded = phase.memory[1:-1]
        for name in phase.memory[0]:
            at = [phase.memory[0], *(loaded[round(share * len(loaded)) - 1] for share in (0.1, 0.5, 1))]
            most = max(one[name] for one in loaded)
            figures = (*(one[name] for one in at), most, phase.memory[-1][name])
            rows.add(phase.name, name, *(f"{figure:.0f}" for figure in figures))
    return rows
