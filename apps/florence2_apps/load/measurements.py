"""What was measured: CSV, JSON, a table in Markdown, and one page of HTML that needs nothing else."""

import csv
import io
import json
import os
import platform
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from florence2.prompts import task_of
from florence2_apps.load.analyzer import Windows
from florence2_apps.load.load_levels import STAGE_NAMES, Run

_TEMPLATE = "report.html.jinja"


@dataclass(frozen=True)
class Setting:
    """Of all runs."""

    command: str
    perf_analyzer: str
    """Its version."""
    server: Mapping[str, Any]
    """What it tells of itself: `name`, `version`."""
    model: str
    requests: int
    """Distinct, in the input."""
    validated: bool
    windows: Windows
    load_before: float
    """The machine's load average, of one minute, where the measuring ran."""
    machine: str
    date: str

    @property
    def notes(self) -> list[str]:
        answers = "compared with the answers to single requests" if self.validated else "not compared with anything"
        server = f"{self.server['name']} {self.server['version']}"
        return [
            f"{server}, model {self.model}; perf_analyzer {self.perf_analyzer}, florence2-triton "
            f"{version('florence2-triton')}; {self.machine}, load average before {self.load_before:.1f}; {self.date}.",
            f"{self.requests} distinct requests, taken in turns; every answer {answers}. Measured until throughput and "
            f"mean latency of three windows in a row, of {self.windows.requests} requests or more, differed by less "
            f"than {self.windows.stability:g} %, for {self.windows.trials} windows at most; otherwise it is marked "
            "unstable.",
            f"`{self.command}`",
        ]


def machine() -> str:
    """Where perf_analyzer runs; the server may be elsewhere."""
    cpu = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{cpu}, {len(os.sched_getaffinity(0))} cores, {memory:.0f} GiB"


def today() -> str:
    return datetime.now(UTC).date().isoformat()


def write(folder: Path, runs: Sequence[Run], setting: Setting) -> None:
    """results.csv, results.json, report.html, and table.md."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [run.row() for run in runs]
    with (folder / "results.csv").open("w", newline="") as file:
        table = csv.DictWriter(file, rows[0])
        table.writeheader()
        table.writerows(rows)
    whole = {"setting": asdict(setting), "runs": rows}
    (folder / "results.json").write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    (folder / "table.md").write_text(f"{markdown(runs)}\n" + "\n\n".join(setting.notes) + "\n", "utf-8")
    (folder / "report.html").write_text(page(runs, setting), "utf-8")


COLUMNS: tuple[tuple[str, str], ...] = (
    ("infer/s", "per_second"),
    ("average, ms", "average_ms"),
    ("p50", "p50_ms"),
    ("p95", "p95_ms"),
    ("p99", "p99_ms"),
    ("tokens per answer", "tokens_per_answer"),
    ("tokens per step", "tokens_per_step"),
    ("failed", "failed"),
)
"""Title, and name in Run.row."""


def cells(run: Run) -> list[str]:
    """Of a line of the table: what was asked and how, COLUMNS, and the state if it isn't stable."""
    row = run.row()
    names = [run.prompt] if run.prompt else []
    numbers = [_shown(row[name]) for _, name in COLUMNS]
    return [*names, run.protocol, str(run.level), *numbers, "" if run.state == "stable" else run.state]


def head(runs: Sequence[Run]) -> list[str]:
    names = ["task"] if runs[0].prompt else []
    return [*names, "protocol", "load", *(title for title, _ in COLUMNS), ""]


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    return f"{value:g}" if isinstance(value, int) else f"{value:.{1 if abs(value) >= 10 else 2}f}"


def markdown(runs: Sequence[Run]) -> str:
    lines = [head(runs), ["---"] * len(head(runs)), *map(cells, runs)]
    if runs[0].prompt:
        # Not to be taken for tags.
        lines[2:] = [[f"`{prompt}`", *rest] for prompt, *rest in lines[2:]]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def page(runs: Sequence[Run], setting: Setting) -> str:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("florence2_apps.load", "."),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(_TEMPLATE).render(
        notes=[note.strip("`") for note in setting.notes],
        head=head(runs),
        lines=list(map(cells, runs)),
        errors=[(str(run.level), run.protocol, error) for run in runs for error in run.outcome.errors[:1]],
        plots=[plot(runs) for plot in ((_stages,) if runs[0].prompt else (_throughput, _latency, _stages, _tokens))],
    )


def _drawing(title: str, draw: Callable[[Axes], None], height: float = 3.6) -> tuple[str, Markup]:
    """`height` in inches."""
    figure = Figure(figsize=(6.4, height), layout="constrained")
    axes = figure.subplots()
    draw(axes)
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside right upper", fontsize="small", frameon=False)
    drawn = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": title}):
        figure.savefig(drawn, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    svg = drawn.getvalue()
    return title, Markup(svg[svg.index("<svg") :])


def _series(runs: Iterable[Run], protocol: str, name: str) -> tuple[list[float], list[float]]:
    points = [(run.level.value, run.row()[name]) for run in runs if run.protocol == protocol]
    return tuple(zip(*[(x, y) for x, y in points if y is not None], strict=True)) or ([], [])  # type: ignore[return-value]


def _protocols(runs: Iterable[Run]) -> list[str]:
    return list(dict.fromkeys(run.protocol for run in runs))


def _against_load(axes: Axes, runs: Sequence[Run], what: str) -> None:
    unit = "requests in flight" if runs[0].level.kind == "concurrency" else "requests sent per second"
    axes.set(xlabel=unit, ylabel=what)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _throughput(runs: Sequence[Run]) -> tuple[str, Markup]:
    def draw(axes: Axes) -> None:
        for protocol in _protocols(runs):
            axes.plot(*_series(runs, protocol, "per_second"), marker="o", label=protocol)
        _against_load(axes, runs, "answers per second")

    return _drawing("Throughput", draw)


def _latency(runs: Sequence[Run]) -> tuple[str, Markup]:
    def draw(axes: Axes) -> None:
        for protocol, line in zip(_protocols(runs), ("-", "--"), strict=False):
            for number, name in enumerate(("p50", "p95", "p99")):
                x, y = _series(runs, protocol, f"{name}_ms")
                axes.plot(x, y, line, color=f"C{number}", marker="o", label=f"{name} {protocol}")
        _against_load(axes, runs, "latency, ms")

    return _drawing("Latency", draw)


def _tokens(runs: Sequence[Run]) -> tuple[str, Markup]:
    def draw(axes: Axes) -> None:
        for protocol in _protocols(runs):
            axes.plot(*_series(runs, protocol, "tokens_per_step"), marker="o", label=protocol)
        _against_load(axes, runs, "tokens per step")

    return _drawing("Tokens per step of the decoder", draw)


def _bar_name(run: Run) -> str:
    if not run.prompt:
        return f"{run.protocol}, {run.level}"
    task = task_of(run.prompt)
    return f"{task.token if task else textwrap.shorten(run.prompt, 24)} {run.protocol}"


def _stages(runs: Sequence[Run]) -> tuple[str, Markup]:
    """Stacked bars, one per run."""
    shown = [run for run in runs if run.served.stages]

    def draw(axes: Axes) -> None:
        places = range(len(shown))
        axes.set_yticks(places, [_bar_name(run) for run in shown], size="small")
        left = [0.0] * len(shown)
        for number, stage in enumerate(STAGE_NAMES):
            values = [run.served.stages[stage] for run in shown]
            colour = "0.8" if stage == "between" else f"C{number // 2}"
            axes.barh(places, values, left=left, color=colour, alpha=0.4 if "waiting" in stage else 1, label=stage)
            left = [sum(pair) for pair in zip(left, values, strict=True)]
        axes.invert_yaxis()
        axes.set(xlabel="ms per request, mean")

    return _drawing("Time per stage", draw, height=max(2.6, 1.0 + 0.25 * len(shown)))
