"""Triton's perf_analyzer: found, run once per level of load, read."""

import csv
import json
import math
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NEEDS = "it needs Debian's libb64-0d, and the libcudart.so.12 of nvidia-cuda-runtime-cu12 on LD_LIBRARY_PATH"
HOW_TO_GET_IT = f"""\
perf_analyzer is not on the PATH. `make perf_analyzer` in this project's repository gets it, for --perf-analyzer
var/perf_analyzer/perf_analyzer; it is in NVIDIA's image nvcr.io/nvidia/tritonserver:24.10-py3-sdk, and in a wheel:
  pip download --no-deps --only-binary=:all: --platform manylinux1_x86_64 tritonclient==2.51.0
  unzip -j tritonclient-2.51.0-*.whl '*/data/bin/perf_analyzer'
{NEEDS}"""
ANY = 1e9
"""Percent of variation that counts as stable when any does."""
# perf_analyzer 2.51 never sets whether a model's output is optional and reads it all the same: by luck it asks for
# validation data of every output, and those whose length varies can't have any. Memory that glibc fills with ones
# makes all of them optional. (Fixed the other way in 2025, by a default of false: then nothing can be validated.)
_OPTIONAL_OUTPUTS = "glibc.malloc.tcache_count=0:glibc.malloc.perturb=254"
_UNSTABLE = "Failed to obtain stable measurement"
_CANNOT_VALIDATE = re.compile(r"init manager inputs: (missing tensor|The variable-sized tensor)")
_ERROR = re.compile(r"^(?:Thread \[\d+\] had error|error): (.+)$", re.MULTILINE)


@dataclass(frozen=True)
class Level:
    """Requests in flight at any time, or requests sent per second."""

    kind: str
    """"concurrency" or "request-rate", as in perf_analyzer's options."""
    value: float

    def __str__(self) -> str:
        return f"{self.value:g} {'in flight' if self.kind == 'concurrency' else 'per second'}"


@dataclass(frozen=True)
class Windows:
    """How long each level is measured: until three windows in a row differ by little."""

    requests: int = 50
    """In each window, at least."""
    stability: float = 10.0
    """Percent that throughput and mean latency of three windows in a row may differ by."""
    trials: int = 10
    """Windows, at most."""
    distribution: str = "constant"
    """Or "poisson": of the times between requests, at a request rate."""


@dataclass(frozen=True)
class Figures:
    """Of perf_analyzer, as its clients saw the last three windows. Milliseconds."""

    per_second: float
    average_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float


@dataclass(frozen=True)
class Outcome:
    """`figures` are None where requests failed: perf_analyzer ends with the first."""

    figures: Figures | None
    stable: bool
    errors: tuple[str, ...] = ()
    """One per request that failed or was answered wrongly, of those that perf_analyzer tells of."""


@dataclass(frozen=True)
class Analyzer:
    binary: Path
    version: str

    @classmethod
    def find(cls, path: Path | None) -> "Analyzer":
        """`path`, or what the PATH has. RuntimeError with what to do when there is none or it does not start."""
        found = path or shutil.which("perf_analyzer")
        if found is None:
            raise RuntimeError(HOW_TO_GET_IT)
        try:
            done = subprocess.run([found, "--version"], capture_output=True, text=True)
        except OSError as error:
            raise RuntimeError(f"{found} can't be run: {error.strerror}") from error
        if done.returncode:
            # ld.so names the library.
            raise RuntimeError(f"{found} does not start: {(done.stderr or done.stdout).strip()}; {NEEDS}")
        version = re.search(r"[Vv]ersion (\S+)", done.stdout + done.stderr)
        return cls(Path(found).absolute(), version[1] if version else "unknown")

    def measure(
        self, made: Mapping[str, Any], level: Level, windows: Windows, protocol: str, url: str, model: str
    ) -> Outcome:
        """`made`: an input document, without validation data for a request rate; `protocol`: "grpc" or "http", of
        `url`. RuntimeError when nothing was measured for another reason than a request that failed."""
        with tempfile.TemporaryDirectory(prefix="florence2-bench-") as folder:
            inputs = Path(folder) / "inputs.json"
            inputs.write_text(json.dumps(made), "utf-8")
            command = [self.binary, *("-m", model), *("-i", protocol), *("-u", url)]
            command += ["--input-data", inputs, f"--{level.kind}-range", f"{level.value:g}"]
            if level.kind == "concurrency":
                # A thread per request: several of one thread would share what their answers are compared with.
                command.append("--sync")
            else:
                command += ["--async", "--request-distribution", windows.distribution]
            env = {**os.environ, **({"GLIBC_TUNABLES": _OPTIONAL_OUTPUTS} if "validation_data" in made else {})}
            outcome = _run(command, windows.stability, windows.trials, windows.requests, Path(folder), env)
            if not outcome.stable and not outcome.errors:
                # perf_analyzer gives no percentiles then: three windows more, whatever they are.
                again = _run(command, ANY, 3, windows.requests, Path(folder), env)
                outcome = Outcome(again.figures, False, again.errors)
            return outcome


def _run(
    command: list[Any], stability: float, trials: int, requests: int, folder: Path, env: dict[str, str]
) -> Outcome:
    table = folder / "figures.csv"
    windows = ["--measurement-mode", "count_windows", "--measurement-request-count", str(requests)]
    limits = ["--stability-percentage", f"{stability:g}", "--max-trials", str(trials)]
    # In the folder: it writes a file per model of the ensemble, too.
    done = subprocess.run(
        [*map(str, command), *windows, *limits, "--verbose-csv", "-f", table.name],
        cwd=folder,
        env=env,
        capture_output=True,
        text=True,
        errors="replace",
    )
    log = done.stdout + done.stderr
    if done.returncode == 0:
        with table.open(newline="") as file:
            (row,) = csv.DictReader(file)
        return Outcome(_figures(row), True)
    if _UNSTABLE in log:
        return Outcome(None, False)
    errors = tuple(_ERROR.findall(log))
    if _CANNOT_VALIDATE.search(log):
        raise RuntimeError(
            f"this perf_analyzer can't validate answers ({errors[0]}): take version 2.51.0, or --no-validation"
        )
    if "had error:" not in log:
        raise RuntimeError(f"perf_analyzer ended with code {done.returncode}: {errors[0] if errors else log.strip()}")
    return Outcome(None, False, errors)


def _figures(row: Mapping[str, str]) -> Figures:
    """Of microseconds."""
    milliseconds = (float(row[name]) / 1e3 for name in ("Avg latency", *(f"p{n} latency" for n in (50, 95, 99))))
    return Figures(float(row["Inferences/Second"]), *milliseconds)


def levels(kind: str, text: str) -> list[Level]:
    """START:END:STEP as perf_analyzer has it, END and STEP optional, or values with commas. ValueError."""
    try:
        if "," in text:
            values = [float(one) for one in text.split(",")]
        else:
            given = [float(one) for one in text.split(":")]
            start, end, step = given + [given[0], 1.0][len(given) - 1 :]
            values = [start + place * step for place in range(int((end - start) / step + 1e-9) + 1)]
    except (ValueError, ArithmeticError):
        values = []
    whole = kind != "concurrency" or all(value.is_integer() for value in values)
    if not values or not 0 < min(values) <= max(values) < math.inf or not whole:
        raise ValueError(f"{text!r} is no range: write START:END:STEP, as 1:16:5, or values, as 1,4,16, above 0")
    return [Level(kind, int(value) if kind == "concurrency" else value) for value in values]
