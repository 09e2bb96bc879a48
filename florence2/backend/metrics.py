"""Figures on the server's metrics endpoint."""

import time
from collections.abc import Mapping
from threading import Lock
from typing import Any

import triton_python_backend_utils as pb_utils

from florence2.backend.metric_names import FAILED
from florence2.backend.tensors import REASONS, reason

LABELS = {"model": "name", "version": "version", "model_instance": "instance_name"}
"""By the name of the label, what Triton calls it. `instance` is Prometheus' own."""


class Metrics:
    """Labelled with model, version and model_instance; florence2_failed_requests_total with the reason too."""

    EVERY = 0.25
    """Seconds between two reports: every figure goes to the server and back."""

    def __init__(self, args: Mapping[str, str], counters: Mapping[str, str], gauges: Mapping[str, str]) -> None:
        """Names with what they mean."""
        self._next = 0.0
        self._counted: dict[str, float] = {}
        self._failures, self._lock = dict.fromkeys(REASONS, 0), Lock()
        # The families must live as long as their metrics.
        self._families: dict[str, Any] = {}
        self._metrics: dict[str, Any] = {}
        # Instances of a model are processes, each with figures of its own.
        labels = {name: args[f"model_{key}"] for name, key in LABELS.items()}
        kinds = ((counters, pb_utils.MetricFamily.COUNTER), (gauges, pb_utils.MetricFamily.GAUGE))
        try:
            for names, kind in kinds:
                for name, description in names.items():
                    family = pb_utils.MetricFamily(name=name, description=description, kind=kind)
                    self._families[name] = family
                    if name == FAILED:
                        for one in REASONS:
                            self._metrics[one] = family.Metric(labels={**labels, "reason": one})
                    else:
                        self._metrics[name] = family.Metric(labels=labels)
        except pb_utils.TritonModelException as error:
            pb_utils.Logger.log_info(f"no metrics of {args['model_name']}: {error}")
        self._counted = dict.fromkeys((*counters, *REASONS), 0.0)

    def failed(self, error: Exception) -> None:
        """One more request, from any thread."""
        with self._lock:
            self._failures[reason(error)] += 1

    def are_due(self) -> bool:
        """If so, not again before EVERY seconds have passed."""
        now = time.monotonic()
        if now < self._next:
            return False
        self._next = now + self.EVERY
        return True

    def report(self, figures: Mapping[str, float]) -> None:
        """Counters by how much there is of them in all; failed requests are counted here."""
        with self._lock:
            found: dict[str, float] = {**figures, **self._failures}
        for name, metric in self._metrics.items():
            if name in self._counted:
                metric.increment(found[name] - self._counted[name])
                self._counted[name] = found[name]
            else:
                metric.set(found[name])

    def try_report(self, figures: Mapping[str, float]) -> None:
        """Figures that can't be reported stop nothing."""
        try:
            self.report(figures)
        except Exception as error:
            pb_utils.Logger.log_error(f"metrics could not be reported: {error!r}")

    def close(self) -> None:
        """In `finalize`: Triton's stub crashes when they go after what it keeps them in (24.10)."""
        self._metrics.clear()
        self._families.clear()
