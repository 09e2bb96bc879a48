# ruff: noqa: RUF009 (`setting` is dataclasses.field)
"""What a new release has to reach before clients get it, and while they first do."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from florence2.settings_file import read_settings, setting


@dataclass
class Gate:
    """A YAML file of these settings."""

    data: str | None = setting(None, "validation data, in any format that `florence2 data check` reads")
    format: str | None = setting(None, "its format, where it is not recognised")
    images: str | None = setting(None, "the folder that relative picture paths start from")
    split: str | None = setting(None, "the split to take, where the data has several")
    samples: int | None = setting(None, "how many questions of it are asked (default: all)")
    in_flight: int = setting(2, "requests that scoring has on their way: clients' own go on beside them")
    margin: float = setting(0.01, "how much worse than the running release a metric may be")
    margins: dict[str, float] = setting({}, 'for metrics that have another, such as {"<OCR> CER": 0.002}')
    minimum: dict[str, float] = setting({}, "what a metric has to reach whatever the running release does")
    latency_requests: int = setting(20, "requests by which latency is compared, in turns; 0 compares none")
    latency_ratio: float = setting(1.5, "how many times the running release's median a request may take")
    latency_ms: float | None = setting(None, "and how many milliseconds the median may be")
    memory_gb: float | None = setting(None, "what the machine, or the fullest GPU, may have in use with both loaded")
    canary_requests: int = setting(0, "requests that clients send to the new release before the switch")
    canary_seconds: float = setting(600, "how long they are waited for")
    watch_seconds: float = setting(60, "how long the new release is watched after the switch")
    watch_failed: float = setting(0.01, "by how much its share of failed requests may exceed the one before")
    watch_latency_ratio: float = setting(2.0, "how many times the mean latency before its own may be")

    def check(self) -> None:
        for name in ("samples", "in_flight"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is a whole number from 1 on, not {value}")
        counted = ("margin", "latency_requests", "canary_requests", "canary_seconds", "watch_seconds", "watch_failed")
        for name in (*counted, "latency_ratio", "watch_latency_ratio"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name} is from 0 on, not {getattr(self, name)}")
        if (self.minimum or self.margins) and not self.data:
            raise ValueError("the gate has bounds of metrics but no data to measure them on")
        if self.latency_ms is not None and not self.latency_requests:
            raise ValueError("latency_ms says nothing with latency_requests 0")


def load_gate(path: Path | None) -> Gate:
    """Raises ValueError that says what is wrong. Paths in the file start from its folder."""
    if path is None:
        return Gate()
    gate = read_settings(Gate, path, f"the settings are {', '.join(entry.name for entry in fields(Gate))}")
    for name in ("data", "images"):
        value = getattr(gate, name)
        if value is not None and not Path(value).is_absolute():
            setattr(gate, name, str(path.parent / value))
    gate.check()
    return gate


@dataclass(frozen=True)
class Compared:
    """One figure of two releases."""

    name: str
    running: float | None
    new: float | None
    bound: str
    """What was asked, in words."""
    holds: bool


def compare_scores(
    gate: Gate, running: dict[str, float], new: dict[str, float], higher_is_better: dict[str, bool]
) -> list[Compared]:
    """Every metric that either has. One that the new release leaves undefined is worse."""
    found = []
    for name in sorted(set(running) | set(new) | set(gate.minimum)):
        before, now = running.get(name), new.get(name)
        margin, higher = gate.margins.get(name, gate.margin), higher_is_better.get(name, True)
        bounds, holds = [], True
        if before is not None:
            bounds.append(f"at most {margin:g} {'below' if higher else 'above'} the running release")
            holds = now is not None and (now >= before - margin if higher else now <= before + margin)
        if name in gate.minimum:
            least = gate.minimum[name]
            bounds.append(f"at {'least' if higher else 'most'} {least:g}")
            holds = holds and now is not None and (now >= least if higher else now <= least)
        found.append(Compared(name, before, now, ", ".join(bounds) or "new", holds))
    return found


def refusal(compared: Sequence[Compared]) -> str | None:
    """Why not, in one line."""
    failed = [
        f"{one.name} is {_figure(one.new)}, {_figure(one.running)} in the running release ({one.bound})"
        for one in compared
        if not one.holds
    ]
    return "; ".join(failed) or None


def _figure(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4g}"


def data_sha256(questions: Sequence[Any]) -> str:
    """Of what is asked: prompts, pictures' bytes and references."""
    total = hashlib.sha256()
    for question in questions:
        total.update(repr((question.prompt, question.references)).encode())
        with open(question.image, "rb") as file:
            total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()
