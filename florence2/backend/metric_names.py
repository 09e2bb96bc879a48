"""The names of our metrics, and what they mean."""

from dataclasses import replace

from florence2.generation.engine import Counters, Engine

FAILED = "florence2_failed_requests_total"
"""Has a label of its own, `reason`."""
FAILURES = {FAILED: "Requests that were answered with an error, by whose doing: client, overload, deadline or server"}
TIMES = {
    "florence2_waiting_seconds_total": "Time that requests have waited in the model for their turn",
    "florence2_running_seconds_total": "Time from a request's turn in the model to its answer",
}
"""Triton's own stop when a request is handed over."""
ENGINE = {
    "florence2_steps_total": "Steps of the decoder",
    "florence2_failed_steps_total": "Runs of the encoder or the decoder that failed",
    "florence2_tokens_total": "Tokens decoded: one per step of every request, whatever its beams",
    "florence2_encoder_seconds_total": "Time in the encoder graph",
    "florence2_decoder_seconds_total": "Time in the decoder graph",
    "florence2_first_tokens_total": "Requests that got their first token",
    "florence2_first_token_seconds_total": "Time from a request's arrival at the engine to its first token",
}
WORKER_COUNTERS = {**TIMES, **FAILURES}
"""Of preprocess and vision_encoder."""
COUNTERS = {**ENGINE, **TIMES, **FAILURES}
"""Of beam_search."""
GAUGES = {
    "florence2_requests_running": "Requests that share the steps",
    "florence2_requests_waiting": "Requests that wait for rows of the caches",
    "florence2_rows_used": "Rows of the caches in use, one per beam",
    "florence2_rows_free": "Rows of the caches that are free",
    "florence2_tokens_per_step": "Tokens per step since the last report",
    "florence2_cache_bytes": "Memory that the caches take at most",
}


class EngineFigures:
    """Of an engine, by the names in ENGINE, TIMES and GAUGES."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self._reported = engine, Counters()

    def __call__(self) -> dict[str, float]:
        now, before, scheduler = replace(self._engine.counters), self._reported, self._engine.scheduler
        self._reported = now
        steps, used = now.steps - before.steps, scheduler.rows_used
        return {
            "florence2_steps_total": now.steps,
            "florence2_failed_steps_total": now.failed_steps,
            "florence2_tokens_total": now.tokens,
            "florence2_encoder_seconds_total": now.encoder_seconds,
            "florence2_decoder_seconds_total": now.decoder_seconds,
            "florence2_first_tokens_total": now.first_tokens,
            "florence2_first_token_seconds_total": now.first_token_seconds,
            "florence2_waiting_seconds_total": now.waiting_seconds,
            "florence2_running_seconds_total": now.running_seconds,
            "florence2_requests_running": len(scheduler.running),
            "florence2_requests_waiting": len(scheduler.waiting),
            "florence2_rows_used": used,
            "florence2_rows_free": scheduler.caches.rows - used,
            "florence2_tokens_per_step": (now.tokens - before.tokens) / steps if steps else 0,
            "florence2_cache_bytes": scheduler.caches.bytes,
        }
