"""The graphs of an export, as one table: the module of each, and its tensors. Names of caches are optimum's.

In half precision the same modules hold half weights. ONNX's LayerNormalization computes in float32 inside
(`stash_type` 1): done in half, it destroys the late blocks of a trained vision encoder. Softmax in half adds no drift
(benchmarks/precision.md). Log-softmax is float32; so are pictures, image features and log-probabilities, which leave
the process: no model's config.pbtxt depends on the precision of a release.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from florence2.manifest import Sizes
from florence2_export.onnx_files import Signature
from florence2_export.text_graphs import Decoder, Encoder, Relayout
from florence2_export.vision_graph import VisionEncoder


@dataclass(frozen=True)
class Graph:
    """The module of one graph, and its signature by the checkpoint's sizes."""

    name: str
    build: Callable[[Any, dict[str, Any]], nn.Module]
    example: Callable[[Sizes, torch.dtype], tuple]
    dynamic_shapes: Callable[[Sizes], tuple]
    input_names: Callable[[Sizes], list[str]]
    output_names: Callable[[Sizes], list[str]]
    one_picture: bool = False

    def signature(self, sizes: Sizes) -> Signature:
        return Signature(
            example=partial(self.example, sizes),
            dynamic_shapes=self.dynamic_shapes(sizes),
            input_names=self.input_names(sizes),
            output_names=self.output_names(sizes),
            one_picture=self.one_picture,
        )


def _cache_names(sizes: Sizes, direction: str, kind: str) -> list[str]:
    return [f"{direction}.{layer}.{kind}.{part}" for layer in range(sizes.decoder_layers) for part in ("key", "value")]


def _decoder_example(sizes: Sizes, dtype: torch.dtype) -> tuple:
    slots, beams, rows, columns, moves, encoder_length = 2, 3, 5, 9, 4, 7
    cache = (sizes.decoder_attention_heads, columns, sizes.head_dim)
    cross = (sizes.decoder_attention_heads, encoder_length, sizes.head_dim)
    return (
        torch.ones(rows, dtype=torch.int64),
        torch.full((rows,), 6),
        torch.full((rows, 2), -1, dtype=torch.int64),
        torch.zeros(moves, 2, dtype=torch.int64),
        torch.ones(moves, 2, dtype=torch.int64),
        torch.zeros(slots, beams, dtype=torch.int64),
        torch.arange(rows),
        torch.ones(slots, encoder_length, dtype=torch.int64),
        [torch.zeros(rows, *cache, dtype=dtype) for _ in range(2 * sizes.decoder_layers)],
        [torch.zeros(slots, *cross, dtype=dtype) for _ in range(2 * sizes.decoder_layers)],
    )


def _decoder_shapes(sizes: Sizes) -> tuple:
    rows, banned, moves = Dim("rows"), Dim("banned"), Dim("moves")
    slots, beams, encoder_length = Dim("slots"), Dim("num_beams"), Dim("encoder_length")
    columns, caches = Dim("columns"), 2 * sizes.decoder_layers
    return (
        {0: rows},
        {0: rows},
        {0: rows, 1: banned},
        {0: moves},
        {0: moves},
        {0: slots, 1: beams},
        {0: rows},
        {0: slots, 1: encoder_length},
        [{0: rows, 2: columns}] * caches,
        [{0: slots, 2: encoder_length}] * caches,
    )


VISION_ENCODER = Graph(
    name="vision_encoder",
    build=VisionEncoder,
    example=lambda s, _: (torch.zeros(2, s.image_height, s.image_width, 3, dtype=torch.uint8),),
    dynamic_shapes=lambda s: ({0: Dim("batch")},),
    input_names=lambda s: ["pixels"],
    output_names=lambda s: ["image_features"],
    one_picture=True,
)
ENCODER = Graph(
    name="encoder",
    build=lambda model, _: Encoder(model),
    example=lambda s, _: (
        torch.zeros(2, s.image_tokens, s.d_model),
        torch.ones(2, 8, dtype=torch.int64),
        torch.ones(2, 8, dtype=torch.int64),
    ),
    dynamic_shapes=lambda s: (
        {0: Dim("batch")},
        {0: Dim("batch"), 1: Dim("prompt_length")},
        {0: Dim("batch"), 1: Dim("prompt_length")},
    ),
    input_names=lambda s: ["image_features", "input_ids", "attention_mask"],
    output_names=lambda s: [*_cache_names(s, "present", "encoder"), "encoder_attention_mask"],
)
DECODER = Graph(
    name="decoder",
    build=lambda model, _: Decoder(model),
    example=_decoder_example,
    dynamic_shapes=_decoder_shapes,
    input_names=lambda s: [
        *("input_ids", "positions", "banned_token_ids", "moved_from", "moved_to", "beam_rows", "row_beams"),
        "encoder_attention_mask",
        *_cache_names(s, "past_key_values", "decoder"),
        *_cache_names(s, "past_key_values", "encoder"),
    ],
    output_names=lambda s: ["candidate_ids", "candidate_logprobs", *_cache_names(s, "present", "decoder")],
)
RELAYOUT = Graph(
    name="relayout",
    build=lambda model, _: Relayout(),
    example=lambda s, dtype: (
        torch.zeros(3, s.decoder_attention_heads, 4, s.head_dim, dtype=dtype),
        torch.zeros(2, dtype=torch.int64),
        torch.zeros(5, dtype=torch.int64),
    ),
    dynamic_shapes=lambda s: ({0: Dim("rows"), 2: Dim("columns")}, {0: Dim("kept_rows")}, {0: Dim("kept_columns")}),
    input_names=lambda s: ["cache", "rows", "columns"],
    output_names=lambda s: ["relaid"],
)
GRAPHS = (VISION_ENCODER, ENCODER, DECODER, RELAYOUT)
