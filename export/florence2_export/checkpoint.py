"""Every Florence-2 checkpoint that users have, as transformers' native class. No remote code is ever run."""

import json
import logging
import re
from dataclasses import dataclass
from typing import Any

from tokenizers import Tokenizer
from transformers import Florence2ForConditionalGeneration, GenerationConfig

from florence2.fields import CONFIG, GENERATION, check, check_tokens, short
from florence2_export.checkpoint_settings import (
    correct_ids,
    read_banned_phrases,
    read_generation,
    read_preprocessor,
    true_ids,
)
from florence2_export.layouts import (
    LM_HEAD,
    POSITION_OFFSET,
    POSITIONS,
    SHARED,
    Layout,
    check_architecture,
    name_in,
    native_config,
)
from florence2_export.native_model import native_model
from florence2_export.source import SETTINGS, CheckpointError, Source, open_source, told_of_checkpoint
from florence2_export.tokenizer import FLORENCE_TOKENS, IMAGE, load_tokenizer, special_ids
from florence2_export.weights import Weights, adapter_error, open_weights

__all__ = ["Checkpoint", "CheckpointError", "load_checkpoint"]

logger = logging.getLogger(__name__)


@dataclass
class Checkpoint:
    model: Florence2ForConditionalGeneration
    """float32, on the CPU, for inference; its generation_config is what `generation` says of decoding."""
    tokenizer: Tokenizer
    """The base vocabulary and all of Florence-2's tokens; no truncation, no padding."""
    preprocessor: dict[str, Any]
    generation: dict[str, Any]
    banned_grounding_phrases: list[str]
    layout: Layout
    source: str
    revision: str | None
    """The commit, for a hub id."""
    sha256: str
    """Of its settings and weights files: names and contents."""
    repairs: list[str]
    """One sentence for each thing that was not as it should be."""


def load_checkpoint(source: str, revision: str | None = None) -> Checkpoint:
    """A folder or hub id in Microsoft's layout or transformers' own. Raises CheckpointError."""
    files = open_source(str(source), revision)
    repairs: list[str] = []
    config = _read_config(files, repairs)
    tokenizer = load_tokenizer(files)
    ids = true_ids(config, special_ids(tokenizer))
    config = correct_ids(config, ids, config["text_config"], "config.json", repairs)
    generation = read_generation(files, config, ids, repairs)
    native = native_config(config, ids, str(files.folder / "config.json"))
    preprocessor = read_preprocessor(files, native, repairs)

    weights = open_weights(files)
    banned_phrases = read_banned_phrases(files, weights.layout)
    text: Any = native.text_config
    _check_vision_type(config, weights.layout, repairs)
    _fit_vocabulary(text, weights, tokenizer, repairs)
    _fit_positions(text, weights, repairs)
    _check_tokens_have_rows(tokenizer, text.vocab_size, weights)
    _check_ids_and_room(generation, preprocessor, text, files)
    image_token_id = tokenizer.token_to_id(IMAGE)
    native.image_token_id = text.vocab_size if image_token_id is None else image_token_id
    model = native_model(native, weights, _declared_tied(config), repairs)
    model.generation_config = _generation_config(generation)

    for repair in repairs:
        logger.warning("%s: %s", source, repair)
    return Checkpoint(
        model=model,
        tokenizer=tokenizer,
        preprocessor=preprocessor,
        generation=generation,
        banned_grounding_phrases=banned_phrases,
        layout=weights.layout,
        source=str(source),
        revision=files.revision,
        sha256=files.sha256(),
        repairs=repairs,
    )


def _read_config(files: Source, repairs: list[str]) -> dict[str, Any]:
    if files.has("adapter_config.json") and not files.has("config.json"):
        raise adapter_error(files)
    path = str(files.folder / "config.json")
    config = files.json("config.json")
    check_architecture(config, path, repairs)
    if config.get("quantization_config"):
        raise CheckpointError(f"{path}: a quantised checkpoint (quantization_config); give the unquantised one")
    with told_of_checkpoint():
        check(config, CONFIG, f"{path}: ")
    for part in ("text_config", "vision_config"):
        if not isinstance(config.get(part), dict):
            raise CheckpointError(f"{path}: {part} is missing; copy the file from the checkpoint's base model")
    _note_auto_maps(files, repairs)
    return config


def _note_auto_maps(files: Source, repairs: list[str]) -> None:
    """`repository--module.Class` sends transformers to another repository for the code."""
    for name in SETTINGS:
        if not name.endswith("config.json") or not files.has(name):
            continue
        # A class, or a tokenizer's slow and fast ones.
        targets = re.findall(r'"([^"]*)--[^"]*"', json.dumps(files.json(name).get("auto_map")))
        elsewhere = sorted({target[:100] for target in targets})
        if elsewhere:
            names = ", ".join(elsewhere[:3])
            repairs.append(f"{name}: auto_map points to code in {names}; ignored, no remote code is run")


def _check_vision_type(config: dict[str, Any], layout: Layout, repairs: list[str]) -> None:
    expected = {"microsoft": "davit", "native": "florence_vision"}[layout]
    found = config["vision_config"].get("model_type")
    if found != expected:
        what = "missing" if found is None else repr(found)
        repairs.append(f"config.json: vision_config.model_type is {what}, read as {expected!r}")


def _fit_vocabulary(text: Any, weights: Weights, tokenizer: Tokenizer, repairs: list[str]) -> None:
    """The table's rows count, where it has one for every token: resizing it can leave config.json behind."""
    if not weights.has(SHARED):
        return
    rows, *width = weights.shape(SHARED)
    head_agrees = not weights.has(LM_HEAD) or weights.shape(LM_HEAD) == weights.shape(SHARED)
    if rows == text.vocab_size or width != [text.d_model] or not head_agrees or rows <= _last_needed_id(tokenizer):
        return
    name = name_in(weights.layout, SHARED)
    repairs.append(f"config.json: vocab_size {text.vocab_size} replaced by {rows}, the rows of {name}")
    text.vocab_size = rows


def _fit_positions(text: Any, weights: Weights, repairs: list[str]) -> None:
    """The same for the positions, where encoder and decoder agree on them."""
    shapes = {weights.shape(name) if weights.has(name) else None for name in POSITIONS}
    shape = shapes.pop()
    if shapes or shape is None or shape[1:] != (text.d_model,):
        return
    positions = shape[0] - POSITION_OFFSET
    if positions != text.max_position_embeddings and positions > 0:
        what = f"max_position_embeddings {text.max_position_embeddings} replaced by {positions}"
        repairs.append(f"config.json: {what}, the rows of {name_in(weights.layout, POSITIONS[0])}")
        text.max_position_embeddings = positions


def _last_needed_id(tokenizer: Tokenizer) -> int:
    vocabulary = tokenizer.get_vocab()
    return max(vocabulary[token] for token in FLORENCE_TOKENS)


def _check_tokens_have_rows(tokenizer: Tokenizer, rows: int, weights: Weights) -> None:
    last = _last_needed_id(tokenizer)
    if last >= rows:
        raise CheckpointError(
            f"{weights.where}: {name_in(weights.layout, SHARED)} has {rows} rows, but the tokenizer's "
            f"Florence-2 tokens go up to id {last}; give the tokenizer this model was trained with"
        )
    beyond = sorted(token for token, index in tokenizer.get_vocab().items() if index >= rows and token != IMAGE)
    if beyond:
        logger.warning("%s: %d tokens have no row in the embedding: %s", weights.where, len(beyond), short(beyond))


def _check_ids_and_room(generation: dict[str, Any], preprocessor: dict[str, Any], text: Any, files: Source) -> None:
    with told_of_checkpoint():
        check_tokens(generation, text.vocab_size, f"{files.folder / 'generation_config.json'}: ")
    taken, positions = preprocessor["image_seq_length"], text.max_position_embeddings
    if taken >= positions:
        raise CheckpointError(
            f"{files.folder}: size {preprocessor['size']} gives {taken} image tokens, which leaves no room for a "
            f"prompt in max_position_embeddings {positions}; give a smaller size"
        )


def _declared_tied(config: dict[str, Any]) -> bool | None:
    """transformers 4.x reads the text config's, 5.x the top level's; None where neither says."""
    flags = [part["tie_word_embeddings"] for part in (config, config["text_config"]) if "tie_word_embeddings" in part]
    return any(flags) if flags else None


def _generation_config(generation: dict[str, Any]) -> GenerationConfig:
    """Of the fields that are checked: what else it says changes no answer, or is refused where answers are made."""
    return GenerationConfig.from_dict({key: generation[key] for key in GENERATION if generation.get(key) is not None})
