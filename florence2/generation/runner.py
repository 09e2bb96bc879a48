"""The encoder and decoder graphs in ONNX Runtime, caches included."""

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Ids = NDArray[np.int64]

CPU = ("CPUExecutionProvider",)


@dataclass
class Caches:
    """What the decoder reads for a batch of requests: B requests, R = B x num_beams rows."""

    cross: dict[str, Any]
    """Cross-attention keys and values [B, heads, S, head_dim], once per request, under the decoder's input names."""
    encoder_attention_mask: Any
    past: dict[str, Any]
    """Self-attention keys and values [R, heads, T, head_dim], right-aligned, under the decoder's input names."""


class GraphRunner:
    """Runs `encoder.onnx` once per request and `decoder.onnx` once per step."""

    def __init__(self, folder: Path, providers: Sequence[str] = CPU, threads: int = 0) -> None:
        self.encoder = session(folder / "encoder.onnx", providers, threads)
        self.decoder = session(folder / "decoder.onnx", providers, threads)
        self._encoder_outputs = [output.name for output in self.encoder.get_outputs()]
        self._decoder_outputs = [output.name for output in self.decoder.get_outputs()]
        inputs = {graph_input.name: graph_input.shape for graph_input in self.decoder.get_inputs()}
        self._past_shapes = {
            name: shape for name, shape in inputs.items() if name.endswith((".decoder.key", ".decoder.value"))
        }

    def encode(self, image_features: NDArray[np.float32], prompts: Sequence[Ids], num_beams: int) -> Caches:
        """`image_features` [B, N, D] and one prompt of token ids per request -> their caches, nothing decoded yet."""
        length = max(map(len, prompts))
        attention_mask = np.array([[1] * len(p) + [0] * (length - len(p)) for p in prompts], np.int64)
        input_ids = np.array([[*p, *[0] * (length - len(p))] for p in prompts], np.int64)
        feeds = {"image_features": image_features, "input_ids": input_ids, "attention_mask": attention_mask}
        outputs = dict(zip(self._encoder_outputs, self.encoder.run(None, feeds), strict=True))
        rows = len(prompts) * num_beams
        return Caches(
            encoder_attention_mask=outputs.pop("encoder_attention_mask"),
            cross={_as_past(name): value for name, value in outputs.items()},
            past={
                name: np.zeros((rows, heads, 0, head_dim), np.float32)
                for name, (_, heads, _, head_dim) in self._past_shapes.items()
            },
        )

    def decode(
        self, caches: Caches, input_ids: Ids, positions: Ids, beam_indices: Ids, banned: Sequence[Ids]
    ) -> tuple[Ids, NDArray[np.float32]]:
        """One step. `input_ids`, `positions` [B, K]; `beam_indices` [R]; `banned` R lists of token ids -> candidate ids
        and log-probabilities [B, K, C]. The caches move on by one token."""
        widest = max(1, *map(len, banned))
        padded = np.full((len(banned), widest), -1, np.int64)
        for row, tokens in zip(padded, banned, strict=True):
            row[: len(tokens)] = tokens
        feeds = {
            "input_ids": input_ids,
            "positions": positions,
            "beam_indices": beam_indices,
            "banned_token_ids": padded.reshape(*input_ids.shape, widest),
            "encoder_attention_mask": caches.encoder_attention_mask,
            **caches.past,
            **caches.cross,
        }
        ids, logprobs, *present = self.decoder.run(None, feeds)
        caches.past = {_as_past(name): value for name, value in zip(self._decoder_outputs[2:], present, strict=True)}
        return ids, logprobs


def session(path: Path, providers: Sequence[str] = CPU, threads: int = 0) -> "InferenceSession":
    """An ONNX Runtime session; `threads` 0 takes every core this process may use."""
    # Imported here: what reads token ids and settings only must not need ONNX Runtime.
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads or available_cores()
    # Triton runs several sessions on the same cores; threads that spin while idle would slow the others down.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options, providers=list(providers))


def available_cores(cpu_max: Path = Path("/sys/fs/cgroup/cpu.max")) -> int:
    """Cores by affinity and by the container's quota, which ONNX Runtime doesn't look at."""
    cores = len(os.sched_getaffinity(0))
    try:
        quota, period = cpu_max.read_text().split()
        return max(1, min(cores, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2 here, or no quota ("max")
        return cores


def _as_past(name: str) -> str:
    return name.replace("present.", "past_key_values.", 1)
