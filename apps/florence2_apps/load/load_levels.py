"""Runs of perf_analyzer, one per protocol and level of load, or per task, each between two looks at the metrics."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from florence2_apps.load import inputs
from florence2_apps.load.analyzer import Analyzer, Figures, Level, Outcome, Windows
from florence2_apps.load.server_counters import STAGES, Served, served, settled


@dataclass(frozen=True)
class Target:
    urls: Mapping[str, str]
    """HOST:PORT by protocol, "grpc" and "http"."""
    metrics_url: str
    model: str


@dataclass(frozen=True)
class Run:
    prompt: str | None
    """None: all that the input has."""
    protocol: str
    level: Level
    outcome: Outcome
    served: Served

    @property
    def failed(self) -> int:
        """Requests. The server does not know of answers that were wrong, perf_analyzer not of all requests."""
        return max(self.served.failed, len(self.outcome.errors))

    @property
    def state(self) -> str:
        if self.failed:
            return "failed"
        return "stable" if self.outcome.stable else "unstable"

    def row(self) -> dict[str, Any]:
        """Flat, in the order of the columns of results.csv; what there is none of is None."""
        level, figures = self.level, self.outcome.figures
        numbers = asdict(figures) if figures else dict.fromkeys(Figures.__dataclass_fields__)
        numbers |= {name: value for name, value in asdict(self.served).items() if name not in ("failed", "stages")}
        stages = {f"{name.replace(' ', '_')}_ms": self.served.stages.get(name) for name in STAGE_NAMES}
        return {
            "prompt": self.prompt or "",
            "protocol": self.protocol,
            level.kind.replace("-", "_"): level.value,
            "state": self.state,
            "failed": self.failed,
            **{name: value if value is None else round(value, 3) for name, value in (numbers | stages).items()},
            "error": self.outcome.errors[0] if self.outcome.errors else "",
        }


STAGE_NAMES = (*(name for stage in STAGES for name in (f"{stage} waiting", stage)), "between")


def sweep(
    analyzer: Analyzer,
    target: Target,
    made: Mapping[str, Any],
    runs: Sequence[tuple[str | None, str, Level]],
    windows: Windows,
    progress: Callable[[str], None],
) -> Iterator[Run]:
    """`runs`: prompt (None for all of `made`), protocol and level of each, one after the other."""
    for number, (prompt, protocol, level) in enumerate(runs, 1):
        progress(f"{number}/{len(runs)}  {' '.join(filter(None, (prompt, protocol, str(level))))}")
        asked = made if prompt is None else inputs.only(made, prompt)
        before = settled(target.metrics_url)
        outcome = analyzer.measure(asked, level, windows, protocol, target.urls[protocol], target.model)
        run = Run(prompt, protocol, level, outcome, served(before, settled(target.metrics_url), target.model))
        progress(_told(run))
        yield run


def _told(run: Run) -> str:
    if run.outcome.figures is None:
        return f"     {run.failed} requests failed: {next(iter(run.outcome.errors), 'perf_analyzer gave no figures')}"
    figures = run.outcome.figures
    unstable = "" if run.outcome.stable else ", unstable"
    return (
        f"     {figures.per_second:.2f} per second, p50 {figures.p50_ms:.0f} ms, p99 {figures.p99_ms:.0f} ms{unstable}"
    )
