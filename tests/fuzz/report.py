"""What a run has shown: counts, times, memory, what went wrong, as a table and as a list."""

import re
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from tables import Table

from fuzz.honest import Asked
from fuzz.kinds import KINDS
from fuzz.send import ANSWERED, LOST, OUTCOMES, SILENT, UNREACHED, Ending
from fuzz.watch import End, Fault

SOON = 1.0
"""Seconds within which a request that is over a limit is refused once Triton has it."""
TRANSFER = 50e6
"""Bytes that Triton is given a second for."""
LATE_SHARE = 0.01
"""Of those requests may be refused later: the machine is busy."""
BACK = 15.0
"""Seconds within which a question is answered again after a process was killed or stopped."""
MOST_MB = 2000
"""Of any one process."""
INTERNAL = ("500", "INTERNAL", "UNKNOWN")
"""Statuses of a server that blames itself for an input."""


@dataclass
class OfKind:
    outcomes: Counter[str] = field(default_factory=Counter)
    internal: int = 0
    seconds: list[float] = field(default_factory=list)
    slowest: Ending | None = None
    late: int = 0

    def add(self, ending: Ending) -> None:
        self.outcomes[ending.outcome] += 1
        self.internal += ending.status in INTERNAL
        self.seconds.append(ending.seconds)
        if self.slowest is None or ending.seconds > self.slowest.seconds:
            self.slowest = ending
        self.late += ending.seconds > SOON + ending.size / TRANSFER


@dataclass
class Run:
    """Of one server, with one seed."""

    name: str
    seed: int
    kinds: dict[str, OfKind] = field(default_factory=lambda: defaultdict(OfKind))
    honest: Counter[str] = field(default_factory=Counter)
    alone: list[float] = field(default_factory=list)
    """Seconds of honest requests, before there were others."""
    beside: list[float] = field(default_factory=list)
    ends: list[tuple[End, list[tuple[str, int]]]] = field(default_factory=list)
    """With what was on its way."""
    backs: list[float] = field(default_factory=list)
    """Seconds from each end of tritonserver by itself until it was ready again."""
    faults: list[Fault] = field(default_factory=list)
    peaks: dict[str, float] = field(default_factory=dict)
    most: float = 0.0
    minutes: float = 0.0
    wrong: list[str] = field(default_factory=list)
    """What else fails the run, in words."""
    examples: dict[tuple[str, str], Ending] = field(default_factory=dict)
    """Of each kind and outcome that should not be."""
    internal: dict[tuple[str, str], list[Ending]] = field(default_factory=dict)
    """By kind and what was said."""
    attacked: float = float("inf")
    """When the first input was sent."""

    _on_way: dict[tuple[str, int], None] = field(default_factory=dict)
    _recent: deque[tuple[str, int]] = field(default_factory=lambda: deque(maxlen=48))

    def sent(self, kind: str, number: int) -> None:
        self._on_way[kind, number] = None

    def add(self, ending: Ending) -> None:
        self._on_way.pop((ending.kind, ending.number), None)
        if ending.outcome == UNREACHED:
            return
        self._recent.append((ending.kind, ending.number))
        self.kinds[ending.kind].add(ending)
        if ending.outcome in (LOST, SILENT):
            self.examples.setdefault((ending.kind, ending.outcome), ending)
        if ending.status in INTERNAL:
            # One of each wording.
            self.internal.setdefault((ending.kind, re.sub(r"\W+|\d+", " ", ending.detail)[:60]), []).append(ending)
        if KINDS[ending.kind].over_limit and ending.outcome == ANSWERED:
            self.examples.setdefault((ending.kind, "not refused"), ending)

    def add_honest(self, asked: Asked) -> None:
        self.honest[asked.outcome] += 1
        if asked.outcome == "answered":
            (self.beside if asked.began >= self.attacked else self.alone).append(asked.seconds)
        elif self.honest[asked.outcome] <= 3:
            self.wrong.append(f"an honest request was {asked.outcome} after {asked.seconds:.1f} s: {asked.detail}")

    def add_end(self, end: End) -> None:
        self.ends.append((end, [*self.on_way, *reversed(self._recent)]))

    @property
    def on_way(self) -> list[tuple[str, int]]:
        return list(self._on_way)

    @property
    def may_end(self) -> set[str]:
        """Roles that inputs of this run crash, by a bug of Triton's that is known."""
        return {KINDS[kind].ends for kind in self.kinds} - {""}

    @property
    def total(self) -> int:
        return sum(one.outcomes.total() for one in self.kinds.values())

    def failures(self) -> list[str]:
        """One line each, the most serious first; none of a run that went well."""
        found = [
            f"{end.role} ended by itself; resend with --again {_ids(self.seed, around[:24])}"
            for end, around in self.ends
            if end.role not in self.may_end
        ]
        found += [f"not ready again within {BACK:.0f} s, but {back:.1f} s" for back in self.backs if back > BACK]
        found += self.wrong
        for outcome in ("lost", "wrong"):
            if self.honest[outcome] > 3:
                found.append(f"{self.honest[outcome]} honest requests were {outcome} in all")
        found += [
            f"{fault.role}: no answer again within {BACK:.0f} s after {fault.what}"
            for fault in self.faults
            if fault.back is None or fault.back > BACK
        ]
        found += [
            f"{role} took {peak:.0f} MB; {MOST_MB} are allowed" for role, peak in self.peaks.items() if peak > MOST_MB
        ]
        for name, kind in self.kinds.items():
            # Connections end with a server that was killed on purpose, or that has crashed.
            for outcome in (SILENT,) if self.faults or self.backs else (SILENT, LOST):
                if kind.outcomes[outcome]:
                    found.append(f"{name}: {kind.outcomes[outcome]} {outcome}, first {self._example(name, outcome)}")
            if not KINDS[name].over_limit:
                continue
            if kind.outcomes[ANSWERED]:
                found.append(
                    f"{name}: {kind.outcomes[ANSWERED]} not refused, first {self._example(name, 'not refused')}"
                )
            if not self.faults and kind.late > LATE_SHARE * kind.outcomes.total() and kind.slowest:
                found.append(
                    f"{name}: {kind.late} refused more than {SOON:.0f} s after it was read, the slowest after "
                    f"{kind.slowest.seconds:.1f} s: --again {_ids(self.seed, [(name, kind.slowest.number)])}"
                )
        return found

    def _example(self, kind: str, reason: str) -> str:
        return self._resend(self.examples[kind, reason])

    def _resend(self, one: Ending) -> str:
        resend = _ids(self.seed, [(one.kind, one.number)])
        return f"--again {resend} ({one.status} after {one.seconds:.1f} s) {one.detail[:120]!r}"

    def blamed(self) -> list[str]:
        """Inputs that the server took for a mistake of its own; no failure, as Triton itself says so of bad JSON."""
        return [
            f"{kind}: {len(ones)} internal, first {self._resend(ones[0])}" for (kind, _), ones in self.internal.items()
        ]

    def markdown(self) -> str:
        alone, beside = self.alone or [0.0], self.beside or [0.0]
        honest = self.honest
        lines = [
            f"## {self.name}",
            f"{self.total:,} inputs of {len(self.kinds)} kinds, seed {self.seed}, in {self.minutes:.1f} minutes. "
            f"Beside them {honest.total():,} honest requests: {honest['answered']:,} had transformers' token ids, "
            f"{honest['lost']} were lost, {honest['wrong']} wrong; they took {_ms(alone, 0.5)} ms alone (p99 "
            f"{_ms(alone, 0.99)}) and {_ms(beside, 0.5)} beside the inputs (p99 {_ms(beside, 0.99)}, at most "
            f"{_ms(beside, 1)}).",
            str(self._kinds()),
            str(self._roles()),
        ]
        if self.backs:
            lines.append(
                f"tritonserver ended {len(self.backs)} times, and was ready again after {max(self.backs):.1f} s at "
                "most."
            )
        if self.faults:
            lines.append(str(self._faults()))
        failures = self.failures()
        lines.append(
            "Nothing failed."
            if not failures
            else "Failed:\n\n" + "".join(f"- {one}\n" for one in map(_plain, failures))
        )
        return "\n\n".join(line.rstrip("\n") for line in lines) + "\n"

    def _kinds(self) -> Table:
        table = Table("kind", "inputs", *OUTCOMES, "internal", "ms p50", "p99", "slowest", "number")
        for name, kind in sorted(self.kinds.items(), key=lambda item: list(KINDS).index(item[0])):
            assert kind.slowest
            table.add(
                name + (" \\*" if KINDS[name].over_limit else ""),
                f"{kind.outcomes.total():,}",
                *(f"{kind.outcomes[outcome]:,}" for outcome in OUTCOMES),
                str(kind.internal),
                *(_ms(kind.seconds, share) for share in (0.5, 0.99, 1)),
                str(kind.slowest.number),
            )
        return table

    def _roles(self) -> Table:
        table = Table("process", "peak MB", "ended by itself")
        ended = Counter(end.role for end, _ in self.ends)
        for role in sorted(self.peaks.keys() | ended.keys()):
            table.add(role, f"{self.peaks.get(role, 0):.0f}", str(ended[role]))
        table.add("all at once", f"{self.most:.0f}", "")
        return table

    def _faults(self) -> Table:
        table = Table("fault", "process", "times", "answers again after s, at most")
        grouped: dict[tuple[str, str], list[float | None]] = defaultdict(list)
        for fault in self.faults:
            grouped[fault.what, fault.role].append(fault.back)
        for (what, role), backs in sorted(grouped.items()):
            worst = "never" if None in backs else f"{max(back for back in backs if back is not None):.1f}"
            table.add(what, role, str(len(backs)), worst)
        return table


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def _ms(seconds: Sequence[float], share: float) -> str:
    return f"{percentile(seconds, share) * 1e3:,.0f}"


def _ids(seed: int, ones: Iterable[tuple[str, int]]) -> str:
    return ",".join(dict.fromkeys(f"{kind}:{seed}:{number}" for kind, number in ones))


def _plain(line: str) -> str:
    """In one line of a list in Markdown."""
    return " ".join(line.split())[:600].replace("<", "\\<")
