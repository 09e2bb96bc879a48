"""Load for a served Florence-2 with Triton's perf_analyzer: its input, its runs, a report of them."""
