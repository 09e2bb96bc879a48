"""Counters of the server's metrics endpoint, before and after a load, and what they say of its requests."""

import json
import re
import time
import urllib.request
from collections import defaultdict
from dataclasses import dataclass
from typing import Any

STAGES = ("preprocess", "vision_encoder", "beam_search", "postprocess")
"""The models of the ensemble, in the order that a request meets them."""
_LINE = re.compile(r"^(?P<name>\w+)\{(?P<labels>[^}]*)\} (?P<value>\S+)$", re.MULTILINE)
_MODEL = re.compile(r'\bmodel="([^"]*)"')
_TIMEOUT = 30.0
_BETWEEN_REPORTS = 0.3
"""Seconds, a little more than florence2.backend.metrics.Metrics.EVERY."""
_SETTLED_BY = 10.0

Counters = dict[tuple[str, str], float]
"""By metric and model, over all versions and reasons."""


def scrape(url: str) -> Counters:
    """OSError when the endpoint can't be reached."""
    return parse(_get(url, "metrics endpoint with --metrics-url"))


def server_metadata(http_url: str) -> dict[str, Any]:
    """What Triton says of itself: `name`, `version`, `extensions`. OSError when it can't be reached."""
    return json.loads(_get(f"{http_url}/v2", "HTTP endpoint with --http-url"))


def _get(url: str, what: str) -> str:
    if "://" not in url:
        url = f"http://{url}"
    try:
        with urllib.request.urlopen(url, timeout=_TIMEOUT) as response:
            return response.read().decode()
    except OSError as error:
        raise OSError(f"{url}: {error}; is the server running? Name its {what}") from error


def parse(text: str) -> Counters:
    """Prometheus' text format."""
    found: Counters = defaultdict(float)
    for line in _LINE.finditer(text):
        if model := _MODEL.search(line["labels"]):
            found[line["name"], model[1]] += float(line["value"])
    return dict(found)


def settled(url: str) -> Counters:
    """Once they stand still, as when all that was asked is answered and reported; after ten seconds as they are."""
    give_up, before = time.monotonic() + _SETTLED_BY, scrape(url)
    while time.monotonic() < give_up:
        time.sleep(_BETWEEN_REPORTS)
        now = scrape(url)
        if now == before:
            break
        before = now
    return before


@dataclass(frozen=True)
class Served:
    """What the server did between two scrapes. Milliseconds are means per request that it answered."""

    requests: int
    failed: int
    tokens_per_answer: float | None
    tokens_per_step: float | None
    first_token_ms: float | None
    """From a request's arrival in beam_search to its first token."""
    stages: dict[str, float]
    """Milliseconds, "MODEL waiting" and "MODEL" in its order, and "between" for what is left of the ensemble's time."""


def served(before: Counters, after: Counters, model: str) -> Served:
    """`model`: the ensemble's name. Other requests that the server had at the time are in it, too."""

    def grown(metric: str, of: str) -> float:
        return after.get((metric, of), 0.0) - before.get((metric, of), 0.0)

    requests = round(grown("nv_inference_request_success", model))
    stages: dict[str, float] = {}
    for stage in STAGES:
        # Where the python backend answers later, Triton's own times end when it has taken the request.
        waiting = grown("nv_inference_queue_duration_us", stage) / 1e6
        if ("florence2_running_seconds_total", stage) in after:
            waiting += grown("florence2_waiting_seconds_total", stage)
            running = grown("florence2_running_seconds_total", stage)
        else:
            steps = ("input", "infer", "output")
            running = sum(grown(f"nv_inference_compute_{step}_duration_us", stage) for step in steps) / 1e6
        stages |= {f"{stage} waiting": waiting, stage: running}
    whole = grown("nv_inference_request_duration_us", model) / 1e6
    stages["between"] = max(0.0, whole - sum(stages.values()))

    def each(metric: str, per: float) -> float | None:
        return grown(metric, "beam_search") / per if per else None

    first = each("florence2_first_token_seconds_total", grown("florence2_first_tokens_total", "beam_search"))
    return Served(
        requests=requests,
        failed=round(grown("nv_inference_request_failure", model)),
        tokens_per_answer=each("florence2_tokens_total", grown("florence2_first_tokens_total", "beam_search")),
        tokens_per_step=each("florence2_tokens_total", grown("florence2_steps_total", "beam_search")),
        first_token_ms=first and 1e3 * first,
        stages={name: 1e3 * seconds / requests for name, seconds in stages.items()} if requests else {},
    )
