"""Whether what an export says beside its graphs can be served: a release is refused before a server reads it."""

import re
from pathlib import Path

from florence2.fields import PREPROCESSOR, check, check_tokens, short
from florence2.generation.settings import GenerationSettings
from florence2.manifest import Manifest, Sizes, read_json
from florence2.tokenizer_file import read_tokenizer, without_panics

_FRAME = ("<s>", "</s>")
_LOCATION = re.compile(r"<loc_\d+>")


def check_settings(export: Path, manifest: Manifest) -> None:
    """Raises ValueError, in one line that names the file and the field, for settings that no server could use or that
    contradict the manifest's sizes."""
    sizes = manifest.sizes
    _check_sizes(sizes, f"{export / 'manifest.json'}: sizes.")
    _check_preprocessor(export / "preprocessor_config.json", sizes)
    _check_generation(export / "generation_config.json", sizes)
    _check_tokenizer(export / "tokenizer.json", sizes)


def _check_sizes(sizes: Sizes, where: str) -> None:
    width = sizes.decoder_attention_heads * sizes.head_dim
    if sizes.d_model != width:
        raise ValueError(f"{where}d_model is {sizes.d_model}; its heads times head_dim are {width}")
    if sizes.image_tokens >= sizes.max_position_embeddings:
        raise ValueError(
            f"{where}image_tokens is {sizes.image_tokens}, which leaves no room for a prompt in "
            f"max_position_embeddings {sizes.max_position_embeddings}"
        )


def _check_preprocessor(path: Path, sizes: Sizes) -> None:
    content, where = read_json(path), f"{path}: "
    check(content, PREPROCESSOR, where, required=("size.height", "size.width", "resample"))
    expected = {"size.height": sizes.image_height, "size.width": sizes.image_width}
    found = {f"size.{side}": content["size"][side] for side in ("height", "width")}
    if found != expected:
        raise ValueError(f"{where}size is {short(content['size'])}; the manifest's image is {short(expected)}")


def _check_generation(path: Path, sizes: Sizes) -> None:
    content = read_json(path)
    GenerationSettings.from_config(content, sizes.max_position_embeddings)
    check_tokens(content, sizes.vocab_size, f"{path}: ")


def _check_tokenizer(path: Path, sizes: Sizes) -> None:
    tokenizer = read_tokenizer(path)
    for part in ("truncation", "padding"):
        if getattr(tokenizer, part) is not None:
            raise ValueError(f"{path}: {part} is on; a prompt is read as it is: set it to null")
    vocabulary = tokenizer.get_vocab()
    locations = {token for token in vocabulary if _LOCATION.fullmatch(token)}
    if len(locations) != sizes.location_bins:
        raise ValueError(f"{path}: added_tokens has {len(locations)} locations; the manifest has {sizes.location_bins}")
    for token in (*_FRAME, *sorted(locations)):
        if not 0 <= vocabulary.get(token, -1) < sizes.vocab_size:
            problem = f"added_tokens gives {token} the id {vocabulary.get(token)}"
            raise ValueError(f"{path}: {problem}; give ids from 0 to {sizes.vocab_size - 1}")
    with without_panics(path):
        found = tokenizer.encode("<s>a</s>", add_special_tokens=False).ids
    if found[:1] + found[-1:] != [vocabulary[token] for token in _FRAME]:
        raise ValueError(f"{path}: post_processor or added_tokens change <s>a</s> to ids {short(found)}")
