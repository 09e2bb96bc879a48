"""Ways to keep one decoder layer's self-attention cache between steps of beam search, in ONNX Runtime.

python benchmarks/cache_layouts.py

`concat` copies the cache whole, as transformers does. The others change it in place: `scatter`, this project's, copies
only the latest entries of the one beam per request that changes rows; `indirection` (DecoderMaskedMultiHeadAttention)
looks up every token's row and has one length for all rows; `token tree` has one cache per request and masks other
beams' tokens. Outputs must equal numpy's; indices and masks, made once for all layers, aren't counted.

`scatter` is kept, though the token tree is faster on the CPU by a millisecond or two in a step of six layers: its rows
are as long as an answer, so that the caches' memory is known before start, and requests of 1 and 8 beams share a step
without being padded to the widest. It needs plain operators only, which every ONNX Runtime provider and TensorRT have.
On CUDA nothing was measured yet: `--provider CUDAExecutionProvider`.
"""

import argparse
import random
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from onnx.parser import parse_model
from onnxruntime import InferenceSession, IOBinding, OrtValue, SessionOptions, get_available_providers
from onnxruntime.capi.onnxruntime_pybind11_state import Fail, InvalidGraph, NotImplemented
from tables import Table, environment

from florence2.generation.sessions import available_cores

DEVICES = {"CPUExecutionProvider": "cpu", "CUDAExecutionProvider": "cuda"}

HEADS, HEAD_DIM, OWN = 12, 64, 10
"""OWN: beams of a request differ in their last so many cached tokens; so many entries move when a beam changes rows."""
SHAPES = ((1, 3, 64), (1, 3, 512), (8, 3, 64), (8, 3, 128), (8, 3, 512), (24, 1, 128), (3, 8, 128))
ATTENTION = """keys = Transpose<perm = [0, 1, 3, 2]>(present_key) scores = MatMul(queries, keys)
    biased = Add(scores, bias) weights = Softmax<axis = -1>(biased) heads = MatMul(weights, present_value)"""

Array = NDArray[Any]
Graph = tuple[str, dict[str, Array], dict[str, Array]]
"""Nodes from inputs, `past_key` and `past_value` to `attended`, `present_key` and `present_value`; inputs; caches."""


class Step:
    """One step of beam search, however caches are laid out. A row is a beam; the last beam of every request continues
    the first one's tokens, the others continue their own. The last of the `tokens` is the new one."""

    def __init__(self, requests: int, beams: int, tokens: int) -> None:
        rng, count = np.random.default_rng(0), requests * beams
        self.requests, self.beams, self.tokens, self.rows = requests, beams, tokens, np.arange(count)
        self.first = self.rows // beams * beams
        self.parents = np.where(self.rows == self.first + beams - 1, self.first, self.rows)
        self.query = rng.standard_normal((count, 1, HEADS, HEAD_DIM), np.float32) * np.float32(HEAD_DIM**-0.5)
        self.new = {part: rng.standard_normal((count, HEADS, 1, HEAD_DIM), np.float32) for part in ("key", "value")}
        # The beam that wrote a token, to its own row: another one every OWN tokens.
        writer = rng.permuted(np.tile(np.arange(beams)[:, None], (requests, 1, tokens // OWN + 1)), axis=1)
        self.writer = writer.repeat(OWN, axis=2).reshape(count, -1)[:, -tokens:]
        self.writer[:, : -1 - OWN] = self.writer[self.first, : -1 - OWN]
        self.written = {part: rng.standard_normal((count, HEADS, tokens, HEAD_DIM), np.float32) for part in self.new}
        by_beam = (self.first[:, None] + self.writer, slice(None), np.arange(tokens))
        self.past = {part: cache[by_beam].swapaxes(1, 2) for part, cache in self.written.items()}

    def attended(self, parents: Array) -> Array:
        """[rows, HEADS, HEAD_DIM], if rows continue `parents`."""
        key, value = (np.append(self.past[part][parents, :, :-1], self.new[part], axis=2) for part in self.new)
        weights = np.exp(np.einsum("rqhd,rhtd->rht", self.query, key))
        return np.einsum("rht,rhtd->rhd", weights / weights.sum(axis=-1, keepdims=True), value)

    def inputs(self, **others: Array) -> dict[str, Array]:
        nothing_masked = np.zeros((len(self.rows), 1, 1, self.tokens), np.float32)
        return {"query": self.query, **self.new, "bias": nothing_masked, **others}


def attending(nodes: str, attention: str = ATTENTION) -> str:
    """`nodes` for keys and for values, and attention to what they make."""
    return f"""{nodes.replace("*", "key")} {nodes.replace("*", "value")}
        queries = Transpose<perm = [0, 2, 1, 3]>(query) {attention}
        attended = Transpose<perm = [0, 2, 1, 3]>(heads)"""


def entries(rows: Array, columns: Array) -> Array:
    """Indices [N, HEADS, 1, 3] of these rows' entries in these columns, for GatherND and ScatterND."""
    found = np.meshgrid(rows, columns, np.arange(HEADS), indexing="ij")
    return np.stack(found, axis=-1)[..., [0, 2, 1]].reshape(-1, HEADS, 1, 3)


def concat(step: Step) -> Graph:
    own = "Gather<axis = 0>(past_*, parents)" if step.beams > 1 else "Identity(past_*)"  # greedy search: no reordering
    nodes = attending(f"own_* = {own} present_* = Concat<axis = 2>(own_*, *)")
    return nodes, step.inputs(parents=step.parents), {part: past[:, :, :-1] for part, past in step.past.items()}


def scatter(step: Step) -> Graph:
    rows, own = np.flatnonzero(step.parents != step.rows), np.arange(step.tokens - 1)[-OWN:]
    changed = np.append(entries(rows, own), entries(step.rows, own[-1:] + 1), axis=0)
    moves = "moved_* = GatherND(past_*, moved) changes_* = Concat<axis = 0>(moved_*, *)"
    nodes = attending(f"{moves} present_* = ScatterND(past_*, changed, changes_*)")
    return nodes, step.inputs(moved=entries(step.parents[rows], own), changed=changed), step.past


def tensor_scatter_without_reordering(step: Step) -> Graph:
    attention = "heads = Attention<scale = 1.0>(queries, present_key, present_value, bias)"
    nodes = attending("present_* = TensorScatter<axis = 2>(past_*, *, columns)", attention)
    return nodes, step.inputs(columns=np.full_like(step.rows, step.tokens - 1)), step.past


def indirection(step: Step) -> Graph:
    nodes = f"""attended, present_key, present_value = com.microsoft.DecoderMaskedMultiHeadAttention
        <num_heads = {HEADS}, past_present_share_buffer = 1, scale = 1.0>
        (query, key, value, , , past_key, past_value, past_length, num_beams, cache_indirection)"""
    inputs = {name: new.reshape(len(new), 1, -1) for name, new in step.inputs().items() if name != "bias"}
    inputs |= {"past_length": np.array([step.tokens - 1], np.int32), "num_beams": np.array([step.beams], np.int32)}
    writer = np.append(step.writer[step.parents, :-1], (step.rows - step.first)[:, None], axis=1)
    inputs["cache_indirection"] = writer.reshape(step.requests, step.beams, -1).astype(np.int32)
    return nodes, inputs, step.written


def token_tree(step: Step) -> Graph:
    """A request's columns: tokens that all its beams share, then each beam's own, then the new ones."""
    beams, shared, caches = np.arange(step.beams), step.tokens - 1 - OWN, {}
    for part, past in step.past.items():
        own = past[:, :, shared:-1].reshape(step.requests, step.beams, HEADS, OWN, HEAD_DIM).swapaxes(1, 2)
        pieces = past[:: step.beams, :, :shared], own.reshape(step.requests, HEADS, -1, HEAD_DIM), own[:, :, :, 0]
        caches[part] = np.concatenate(pieces, axis=2)
    own_seen, new_seen = step.parents[: step.beams, None] == beams.repeat(OWN), beams[:, None] == beams
    seen = np.concatenate([np.ones((step.beams, shared), bool), own_seen, new_seen], axis=1)
    bias = np.tile(np.where(seen, np.float32(0), np.finfo(np.float32).min), (step.requests, 1, 1, 1))
    changed = entries(np.arange(step.requests), np.arange(seen.shape[1])[-step.beams :])
    inputs = step.inputs(query=step.query.reshape(step.requests, -1, HEADS, HEAD_DIM), bias=bias, changed=changed)
    return attending("present_* = ScatterND(past_*, changed, *)"), inputs, caches


LAYOUTS = (concat, scatter, tensor_scatter_without_reordering, indirection, token_tree)


def session(graph: Graph, provider: str) -> tuple[InferenceSession, IOBinding]:
    """Has run once: some of what a provider lacks shows only then, and outputs are allocated."""
    nodes, inputs, caches = graph
    arrays = inputs | {f"past_{part}": cache for part, cache in caches.items()}
    types = (f"{str(v.dtype).replace('float32', 'float')}{list(v.shape)} {name}" for name, v in arrays.items())
    model = parse_model(
        f'<ir_version: 10, opset_import: ["": {24 if "TensorScatter" in nodes else 20}, "com.microsoft": 1]> layer '
        f"({', '.join(types)}) => (float[] attended, float[] present_key, float[] present_value) {{ {nodes} }}"
    )
    options, cpu = SessionOptions(), provider == "CPUExecutionProvider"
    options.intra_op_num_threads = available_cores()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    options.add_session_config_entry("session.disable_cpu_ep_fallback", str(int(not cpu)))
    # With TF32, a GPU's outputs would differ from numpy's.
    runner = InferenceSession(model.SerializeToString(), options, [provider], [{} if cpu else {"use_tf32": "0"}])
    binding = runner.io_binding()
    for name in ("attended", "present_key", "present_value"):
        binding.bind_output(name, DEVICES[provider])
    for name, value in inputs.items():
        binding.bind_cpu_input(name, value)
    for part, past in caches.items():
        if part == "key" and "cache_indirection" in inputs and not cpu:
            # CUDA's kernel has its keys as [rows, heads, head_dim / 4, columns, 4].
            past = past.reshape(*past.shape[:3], -1, 4).swapaxes(2, 3).reshape(past.shape)
        cache = OrtValue.ortvalue_from_numpy(past.copy(), DEVICES[provider])
        binding.bind_ortvalue_input(f"past_{part}", cache)
        if "Concat<axis = 2>" not in nodes:
            binding.bind_ortvalue_output(f"present_{part}", cache)
    runner.run_with_iobinding(binding)
    return runner, binding


def measure(shape: tuple[int, int, int], provider: str, steps: int, missing: set[str]) -> list[str]:
    """Median milliseconds of every layout; `missing` gets the reasons why the provider doesn't run some."""
    step, runs = Step(*shape), {}
    reordered, as_before = step.attended(step.parents), step.attended(step.rows)
    for layout in LAYOUTS:
        try:
            runs[layout] = session(layout(step), provider)
        except (Fail, InvalidGraph, NotImplemented) as error:
            missing.add(f"n/a: {layout.__name__}: {error}\n\n")
    times: dict[Any, list[float]] = {layout: [] for layout in runs}
    for layout in (layout for _ in range(steps) for layout in random.sample(list(runs), len(runs))):
        runner, binding = runs[layout]
        started = time.perf_counter()
        runner.run_with_iobinding(binding)
        times[layout].append(1000 * (time.perf_counter() - started))
        expected = as_before if layout is tensor_scatter_without_reordering else reordered
        if not np.allclose(binding.get_outputs()[0].numpy().ravel(), expected.ravel(), atol=1e-5):
            raise SystemExit(f"{layout.__name__} differs from numpy: {shape}")
    return [f"{np.median(times[layout]):.3f}" if layout in runs else "n/a" for layout in LAYOUTS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--provider", default="CPUExecutionProvider", choices=[p for p in DEVICES if p in get_available_providers()]
    )
    parser.add_argument("--steps", type=int, default=200)
    arguments = parser.parse_args()
    table = Table("requests x beams x tokens", *(layout.__name__.replace("_", " ") for layout in LAYOUTS))
    missing: set[str] = set()
    for shape in SHAPES:
        table.add(" x ".join(map(str, shape)), *measure(shape, arguments.provider, arguments.steps, missing))
    print(table, *sorted(missing), sep="\n")
    Path(__file__).with_suffix(".md").write_text(
        f"# Cache layouts\n\n{__doc__}\nMedian milliseconds per layer and step: fp32, {arguments.provider}, all cores, "
        f"{arguments.steps} steps of each in turns.\n\n{table}\n{''.join(sorted(missing))}{environment('onnx')}"
    )


if __name__ == "__main__":
    main()
