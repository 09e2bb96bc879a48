"""What a check found: findings by kind, counted, with the first few of each in words."""

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

SHOWN = 10
"""Messages of each kind that are kept, unless all are."""
LABELS = 10_000
"""Distinct labels and prompts counted; the rest is counted together."""
REST = "(others)"

KINDS: dict[str, tuple[str, str]] = {
    "unusable": ("error", "samples that can't be used"),
    "picture": ("error", "pictures that are broken"),
    "prompt": ("error", "prompts that can't be asked"),
    "outside": ("error", "boxes outside their picture; correct them, the model would learn its edge"),
    "degenerate": ("error", "boxes without width or height (x1 >= x2 or y1 >= y2); correct or remove them"),
    "no token": ("error", "locations that are no token; the model has <loc_0> to <loc_999>"),
    "label": (
        "error",
        "labels that don't come back from the answer's parser; write them on one line, not empty, and without <",
    ),
    "answer": (
        "error",
        "answers with locations that don't come back as boxes; write LABEL<loc_x1><loc_y1><loc_x2><loc_y2>",
    ),
    "length": ("error", "answers longer than the decoder; shorten or split them"),
    "loose text": ("warning", "answers with text that belongs to no box and is dropped"),
    "leak": ("warning", "pictures that are in several splits"),
    "rounding": ("warning", "coordinates that another rule than Florence-2's floor made"),
    "empty": ("note", "answers that are empty: there is nothing, or what there is was not found"),
    "same bin": ("note", "boxes so thin that both edges fall into one bin"),
    "letters": (
        "note",
        "labels with letters outside ASCII; transformers' parser drops these letters, this project's keeps them",
    ),
    "repeated": (
        "warning",
        "answers that the checkpoint's no_repeat_ngram_size can't write; train with no_repeat_ngram_size=0",
    ),
}
"""Kind -> how bad it is, and what it says."""


@dataclass
class Report:
    splits: dict[str, int] = field(default_factory=dict)
    """Samples that can be used, by split."""
    tasks: dict[str, Counter[str]] = field(default_factory=dict)
    """By split: samples by what `parsing.name_of` calls their prompt."""
    labels: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    messages: dict[str, list[str]] = field(default_factory=dict)
    every_message: bool = False
    pictures: int = 0
    pictures_checked: bool = True
    lengths: Counter[int] | None = None
    """Answers by their number of tokens, `<s>` and `</s>` included; None: not measured."""
    limit: int | None = None

    def add(self, kind: str, message: str) -> None:
        self.counts[kind] += 1
        kept = self.messages.setdefault(kind, [])
        if self.every_message or len(kept) < SHOWN:
            kept.append(message)

    def add_label(self, label: str) -> None:
        self.labels[label if label in self.labels or len(self.labels) < LABELS else REST] += 1

    def total(self, severity: str) -> int:
        return sum(count for kind, count in self.counts.items() if KINDS[kind][0] == severity)

    def length_at(self, share: float) -> int:
        """The answer length that `share` of the answers don't exceed; 0 without answers."""
        assert self.lengths is not None
        left = share * self.lengths.total()
        for length in sorted(self.lengths):
            left -= self.lengths[length]
            if left <= 0:
                return length
        return 0

    def as_json(self) -> dict[str, Any]:
        findings = {
            kind: {"severity": KINDS[kind][0], "count": self.counts[kind], "messages": self.messages[kind]}
            for kind in KINDS
            if self.counts[kind]
        }
        lengths = self.lengths and {
            "limit": self.limit,
            "median": self.length_at(0.5),
            "p95": self.length_at(0.95),
            "max": max(self.lengths),
        }
        return {
            "splits": {name: {"samples": self.splits[name], "tasks": dict(self.tasks[name])} for name in self.splits},
            "pictures": self.pictures,
            "pictures_checked": self.pictures_checked,
            "labels": dict(self.labels.most_common()),
            "answer_tokens": lengths or None,
            "errors": self.total("error"),
            "warnings": self.total("warning"),
            "findings": findings,
        }

    def as_text(self) -> str:
        lines = []
        for name, count in self.splits.items():
            tasks = ", ".join(f"{task} {n}" for task, n in self.tasks[name].most_common())
            lines.append(f"{name}: {count} samples" + (f" ({tasks})" if tasks else ""))
        checked = "all decoded" if self.pictures_checked else "not decoded (--no-images)"
        lines.append(f"{self.pictures} pictures, {checked}")
        if self.labels:
            lines.append("boxes: " + ", ".join(f"{label} {n}" for label, n in self.labels.most_common(20)))
            if len(self.labels) > 20:
                lines[-1] += f", and {len(self.labels) - 20} more labels"
        if self.lengths is None:
            lines.append("answer lengths: not checked; --checkpoint FOLDER counts tokens")
        elif self.lengths:
            lines.append(
                f"answer tokens: median {self.length_at(0.5)}, 95 % up to {self.length_at(0.95)}, "
                f"longest {max(self.lengths)}, limit {self.limit}"
            )
        for kind, (severity, words) in KINDS.items():
            if self.counts[kind]:
                lines.append(f"{severity}: {self.counts[kind]} {words}")
                lines += [f"  {message}" for message in self.messages[kind][:SHOWN]]
                if self.counts[kind] > SHOWN:
                    lines.append(f"  and {self.counts[kind] - SHOWN} more")
        lines.append(f"{self.total('error')} errors, {self.total('warning')} warnings, {self.total('note')} notes")
        return "\n".join(lines)
