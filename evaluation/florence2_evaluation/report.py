"""Scores, curves and single answers on one page of HTML that needs nothing else."""

import io
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
from jinja2 import Environment, PackageLoader
from markupsafe import Markup
from matplotlib.figure import Figure

from florence2_evaluation.gallery import exhibits
from florence2_evaluation.group import Group, Kind
from florence2_evaluation.score import Score, metric_of, notes

CURVES = 10
"""Labels that get a curve: those with the most boxes."""


@dataclass(frozen=True)
class Curve:
    label: str
    colour: str
    average: float
    """The label's AP50."""


def write_report(path: Path, groups: Sequence[Group], scores: Sequence[Score], title: str) -> None:
    """`scores` are those of `groups`, by `score_group`."""
    environment = Environment(
        loader=PackageLoader("florence2_evaluation", "."),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page = environment.get_template("report.html.jinja").render(
        title=title,
        scores=[(one, metric_of(one).source) for one in scores],
        notes=notes(groups, scores),
        groups=[
            {"name": group.name, "count": len(group.cases), "curves": _curves(group), "exhibits": exhibits(group)}
            for group in groups
        ],
    )
    path.write_text(page, encoding="utf-8")


def _curves(group: Group) -> tuple[Markup, list[Curve], int] | None:
    """The plot, its legend, and how many labels there are."""
    if group.kind is not Kind.DETECTION or group.detection.precisions is None:
        return None
    labels = group.detection.labels
    wanted = Counter(instance.label for case in group.cases for instance in case.expected)
    chosen = sorted(labels, key=lambda label: (-wanted[label], label))[:CURVES]
    # COCO's precision at the recalls 0, 0.01, ... 1, for IoU 0.5.
    at_50 = group.detection.precisions[0]
    recalls = [step / (len(at_50) - 1) for step in range(len(at_50))]
    figure = Figure(figsize=(5, 3.2), layout="constrained")
    axes = figure.subplots()
    legend = []
    for number, label in enumerate(chosen):
        precision, colour = at_50[:, labels.index(label)], f"C{number}"
        axes.plot(recalls, precision, color=colour)
        legend.append(Curve(label, matplotlib.colors.to_hex(colour), float(precision.mean())))
    axes.set(xlabel="recall", ylabel="precision at IoU 0.5", xlim=(0, 1), ylim=(0, 1.02))
    axes.grid(alpha=0.3)
    drawing = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        figure.savefig(drawing, format="svg", metadata={"Date": None})
    svg = drawing.getvalue()
    return Markup(svg[svg.index("<svg") :]), legend, len(labels)
