"""The torch modules that become the ONNX graphs: vision encoder, encoder, decoder, and what changes a cache's shape.

They hold the layers of transformers' `Florence2ForConditionalGeneration` and run them in the order of its code, with
attention spelled out in plain operators, which ONNX Runtime and TensorRT both read: ONNX Runtime's fused
MultiHeadAttention is no more than 4% faster on a CPU, and slower beside int8 weights. Names of caches are optimum's.

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
from torch import Tensor, nn
from torch.export import Dim

from florence2.manifest import Sizes
from florence2_export.onnx_files import Signature

CANDIDATES = 16
"""Continuations the decoder returns per beam: beam search looks at 2 x num_beams of them (HF's `beams_to_keep` with one
end token), and num_beams goes up to 8. All of them can stem from one beam, so every beam gives that many."""


class ImageEncoder(nn.Module):
    """`pixel_values` f32 [B, 3, H, W], normalised -> `image_features` f32 [B, N, D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vision_tower = model.model.vision_tower
        self.projector = model.model.multi_modal_projector

    def forward(self, pixel_values: Tensor) -> Tensor:
        hidden = pixel_values.to(dtype_of(self))
        # Not vision_tower(...): its decorators record outputs, which torch.export can't follow.
        for conv, blocks in zip(self.vision_tower.convs, self.vision_tower.blocks, strict=True):
            hidden = conv(hidden).permute(0, 2, 3, 1)
            for block in blocks:
                hidden = _vision_block(block.spatial_block, block.spatial_block.window_attn, _attend_windows, hidden)
                hidden = _vision_block(block.channel_block, block.channel_block.channel_attn, _attend_channels, hidden)
            hidden = hidden.permute(0, 3, 1, 2)
        return self.projector(hidden).float()


class VisionEncoder(ImageEncoder):
    """`pixels` u8 [B, H, W, 3], resized, RGB -> `image_features` f32 [B, N, D]."""

    def __init__(self, model: Any, preprocessor: dict[str, Any]) -> None:
        super().__init__(model)
        # (x * rescale - mean) / std as one multiply and one add per channel.
        rescale, mean, std = (preprocessor[name] for name in ("rescale_factor", "image_mean", "image_std"))
        # No buffers: they stay float32 when the weights become half.
        self.scale = torch.tensor([rescale / s for s in std])
        self.shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)])

    def forward(self, pixels: Tensor) -> Tensor:
        # First of all a cast: TensorRT takes u8 as an input, and for nothing else.
        normalised = pixels.to(torch.float32) * self.scale + self.shift
        return super().forward(normalised.permute(0, 3, 1, 2))


def _vision_block(block: Any, attention: Any, attend: Callable[..., Tensor], hidden: Tensor) -> Tensor:
    """Attention, then a feed-forward layer, each behind a depthwise convolution. `hidden` [B, H, W, C]."""
    # Channels go first around the convolutions alone: ONNX Runtime makes that part of its own rearranging for them.
    hidden = hidden + block.conv1(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    hidden = hidden + attend(attention, block.norm1(hidden))
    hidden = hidden + block.conv2(hidden.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    return hidden + block.ffn(block.norm2(hidden))


def _attend_windows(attention: Any, hidden: Tensor) -> Tensor:
    """Every head in every window for itself. `hidden` [B, H, W, C]."""
    batch, height, width, channels = hidden.shape
    side, heads = attention.window_size, attention.num_heads
    if height % side or width % side:
        hidden = nn.functional.pad(hidden, (0, 0, 0, -width % side, 0, -height % side))
    rows, columns = hidden.shape[1] // side, hidden.shape[2] // side
    # HF cuts the windows first; linear layers do not mind, and each tensor is rearranged once instead of twice.
    split = (batch, rows, side, columns, side, heads, channels // heads)
    query, key, value = (
        part.reshape(split).permute(0, 1, 3, 5, 2, 4, 6).reshape(-1, side * side, channels // heads)
        for part in attention.qkv(hidden).split(channels, dim=-1)
    )
    weights = torch.softmax(query * attention.scale @ key.transpose(1, 2), dim=-1)
    attended = (weights @ value).reshape(batch, rows, columns, heads, side, side, channels // heads)
    attended = attended.permute(0, 1, 4, 2, 5, 3, 6).reshape(batch, rows * side, columns * side, channels)
    return attention.proj(attended[:, :height, :width])


def _attend_channels(attention: Any, hidden: Tensor) -> Tensor:
    """The channels of every group among themselves. `hidden` [B, H, W, C]."""
    batch, height, width, channels = hidden.shape
    split = (batch, height * width, attention.groups, channels // attention.groups)
    # HF puts the tokens last; kept before the channels, they are moved in whole rows.
    query, key, value = (part.reshape(split).transpose(1, 2) for part in attention.qkv(hidden).split(channels, dim=-1))
    weights = torch.softmax((query * (height * width) ** -0.5).transpose(2, 3) @ key, dim=-1)
    attended = value @ weights.transpose(2, 3)
    return attention.proj(attended.transpose(1, 2).reshape(batch, height, width, channels))


class Encoder(nn.Module):
    """Image features and prompt -> the keys and values that every decoder layer attends to.

    `image_features` f32 [B, N, D], `input_ids` i64 [B, S], `attention_mask` i64 [B, S] (0 on padding) ->
    per decoder layer key and value [B, heads, N + S, head_dim], `encoder_attention_mask` i64 [B, N + S].
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        language_model = model.model.language_model
        self.encoder = language_model.encoder
        self.cross = nn.ModuleList(layer.encoder_attn for layer in language_model.decoder.layers)

    def forward(self, image_features: Tensor, input_ids: Tensor, attention_mask: Tensor) -> list[Tensor]:
        encoder: Any = self.encoder
        image_mask = attention_mask.new_ones(image_features.shape[:2])
        mask = torch.cat([image_mask, attention_mask], dim=1)
        embedded = torch.cat([image_features.to(dtype_of(self)), encoder.embed_tokens(input_ids)], dim=1)
        hidden = encode(encoder, embedded, mask)
        caches = []
        cross: Any = self.cross
        for attention in cross:
            caches.append(split_heads(attention.k_proj(hidden), attention.num_heads))
            caches.append(split_heads(attention.v_proj(hidden), attention.num_heads))
        return [*caches, mask]


def encode(encoder: Any, embedded: Tensor, mask: Tensor) -> Tensor:
    """The text encoder: `embedded` [B, S, D], `mask` i64 [B, S] -> its last hidden state [B, S, D]."""
    # Padding may reach past the last position.
    positions = torch.arange(embedded.shape[1]).clamp(max=encoder.config.max_position_embeddings - 1)
    hidden = encoder.layernorm_embedding(embedded + learned_positions(encoder, positions))
    bias = mask_bias(mask[:, None, None, :] > 0, hidden.dtype)
    for layer in encoder.layers:
        attention = layer.self_attn
        query, key, value = (
            split_heads(projection(hidden), attention.num_heads)
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        attended = attention.out_proj(softmax_attention(query * attention.scaling, key, value, bias))
        hidden = layer.self_attn_layer_norm(hidden + attended)
        hidden = layer.final_layer_norm(hidden + layer.fc2(layer.activation_fn(layer.fc1(hidden))))
        if hidden.dtype == torch.float16:
            # BartEncoderLayer does so where anything in the batch has overflowed; here it is nobody else's business.
            most = torch.finfo(hidden.dtype).max - 1000
            hidden = hidden.clamp(-most, most)
    return hidden


class Decoder(nn.Module):
    """One step of every beam of every running request: R rows, one per beam, in B slots, one per request.

    `input_ids` i64 [R]: the last token of each beam. `positions` i64 [R]: how many tokens stand before it, which is the
    cache column too that its key and value are written to. `banned_token_ids` i64 [R, M]: tokens that may not come
    next, -1 pads.
    `moved_from`, `moved_to` i64 [N, 2]: cache entries, as row and column, that are copied before anything is read, all
    at once: so beams change rows without their caches being copied whole.
    `beam_rows` i64 [B, K]: the rows of each slot's request, any row where it has fewer beams or the slot is empty;
    `row_beams` i64 [R]: each row's place in it, counted through. `encoder_attention_mask` i64 [B, S].
    Self-attention caches [R, heads, T, head_dim], of which a row's first `positions` columns are read; cross-attention
    caches [B, heads, S, head_dim], once per request: its beams are the query length of cross-attention.
    -> `candidate_ids` i64 and `candidate_logprobs` f32 [R, CANDIDATES], best first; the self-attention caches, changed.
    Bound to the same memory as input and output they are changed in place (ScatterND copies only what it must).
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.decoder = model.model.language_model.decoder
        self.lm_head = model.lm_head
        self.candidates = min(CANDIDATES, model.lm_head.out_features)

    def forward(
        self,
        input_ids: Tensor,
        positions: Tensor,
        banned_token_ids: Tensor,
        moved_from: Tensor,
        moved_to: Tensor,
        beam_rows: Tensor,
        row_beams: Tensor,
        encoder_attention_mask: Tensor,
        past: list[Tensor],
        cross: list[Tensor],
    ) -> list[Tensor]:
        decoder, (slots, beams) = self.decoder, beam_rows.shape
        rows, heads = torch.arange(input_ids.shape[0]), torch.arange(past[0].shape[1])
        moved = (moved_from[:, :1], heads, moved_from[:, 1:])
        changed = torch.cat([moved_to, torch.stack([rows, positions], dim=1)])
        written = (changed[:, :1], heads, changed[:, 1:])
        hidden = decoder.layernorm_embedding(decoder.embed_tokens(input_ids) + learned_positions(decoder, positions))
        self_bias = mask_bias(torch.arange(past[0].shape[2]) <= positions[:, None, None, None], hidden.dtype)
        cross_bias = mask_bias(encoder_attention_mask[:, None, None, :] > 0, hidden.dtype)
        present = []
        for i, layer in enumerate(decoder.layers):
            attention = layer.self_attn
            query, *new = (
                projection(hidden).unflatten(-1, (attention.num_heads, -1))
                for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
            )
            key, value = (
                cache.index_put(written, torch.cat([cache[moved], entry]))
                for cache, entry in zip(past[2 * i : 2 * i + 2], new, strict=True)
            )
            present += [key, value]
            attended = softmax_attention(query[:, :, None] * attention.scaling, key, value, self_bias)[:, 0]
            hidden = layer.self_attn_layer_norm(hidden + attention.out_proj(attended))
            attention = layer.encoder_attn
            query = attention.q_proj(hidden)[beam_rows.reshape(-1)].reshape(slots, beams, -1)
            query = split_heads(query, attention.num_heads) * attention.scaling
            attended = softmax_attention(query, cross[2 * i], cross[2 * i + 1], cross_bias).flatten(0, 1)[row_beams]
            hidden = layer.encoder_attn_layer_norm(hidden + attention.out_proj(attended))
            hidden = layer.final_layer_norm(hidden + layer.fc2(layer.activation_fn(layer.fc1(hidden))))
        logprobs = torch.log_softmax(self.lm_head(hidden).float(), dim=-1)
        bans = torch.where(banned_token_ids < 0, 0.0, -torch.inf)
        logprobs = logprobs.scatter_add(-1, banned_token_ids.clamp(min=0), bans)
        best = logprobs.topk(self.candidates, dim=-1)
        return [best.indices, best.values, *present]


class Relayout(nn.Module):
    """Rows and columns of a cache: `cache` [R, heads, T, head_dim], `rows` i64 [K], `columns` i64 [C] -> `relaid` [K,
    heads, C, head_dim]. No weights; a graph because the caches lie on the device, where ONNX Runtime is all there is.
    """

    def forward(self, cache: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        return cache[rows][:, :, columns]


def split_heads(hidden: Tensor, heads: int) -> Tensor:
    batch, length, width = hidden.shape
    return hidden.reshape(batch, length, heads, width // heads).transpose(1, 2)


def softmax_attention(query: Tensor, key: Tensor, value: Tensor, bias: Tensor) -> Tensor:
    """Softmax attention, [B, heads, Q, head_dim] x [B, heads, K, head_dim] -> [B, Q, heads * head_dim]."""
    weights = torch.softmax(query @ key.transpose(2, 3) + bias, dim=-1)
    return (weights @ value).transpose(1, 2).flatten(2)


def mask_bias(allowed: Tensor, dtype: torch.dtype) -> Tensor:
    # Half of the least number: where nothing is allowed, a sum of -inf in every column would give NaN.
    return torch.where(allowed, 0.0, torch.finfo(dtype).min / 2).to(dtype)


def dtype_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def learned_positions(stack: Any, positions: Tensor) -> Tensor:
    # BART's learned positions start at row 2 (BartLearnedPositionalEmbedding.offset).
    table = stack.embed_positions
    return nn.functional.embedding(positions + table.offset, table.weight)


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
