"""What a checkpoint says beside its weights: how it decodes, sees pictures, and what it does not ground."""

from collections.abc import Callable, Iterator
from typing import Any

from transformers import Florence2Config

from florence2.fields import GENERATION, IMAGE_TOKENS, MAP_VALUES, PHRASES, PREPROCESSOR, check, short, value_at
from florence2_export.layouts import Layout
from florence2_export.source import CheckpointError, Source, told_of_checkpoint

Refuse = Callable[[str], CheckpointError]

ID_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")

# Microsoft's processing_florence2.py keeps the list in code, native checkpoints in processor_config.json.
_BANNED = """
it, I, me, mine, you, your, yours, he, him, his, she, her, hers, they, them, their, theirs, one,
oneself, we, us, our, ours, its, myself, yourself, himself, herself, itself, ourselves, yourselves,
themselves, this, that, these, those, who, whom, whose, which, what, all, another, any, anybody,
anyone, anything, each, everybody, everyone, everything, few, many, nobody, none, several, some,
somebody, someone, something, each other, one another, the image, image, images, the, a, an, a
group, other objects, lots, a set
"""
MICROSOFT_BANNED_PHRASES = tuple(phrase.strip() for phrase in " ".join(_BANNED.split()).split(","))


def true_ids(config: dict[str, Any], tokenizer_ids: dict[str, int]) -> dict[str, int]:
    """bos, eos and pad: text_config is right where fine-tuning broke the others; else the tokenizer's."""
    text = config["text_config"]
    return {key: text[key] if isinstance(text.get(key), int) else tokenizer_ids[key] for key in ID_KEYS}


def correct_ids(
    values: dict[str, Any], ids: dict[str, int], text: dict[str, Any], file: str, repairs: list[str]
) -> dict[str, Any]:
    """`values` with the true ids; an id that is not given is not a repair."""
    wrong = {key: values[key] for key in ID_KEYS if values.get(key) is not None and not _holds(values[key], ids[key])}
    if wrong:
        changes = ", ".join(f"{key} {wrong[key]} replaced by {ids[key]}" for key in wrong)
        authority = "text_config" if all(key in text for key in wrong) else "the tokenizer"
        repairs.append(f"{file}: {changes}, as {authority} says")
    kept = {key: values[key] for key in ID_KEYS if values.get(key) is not None and key not in wrong}
    return values | ids | kept


def _holds(value: Any, wanted: int) -> bool:
    return value == wanted or (isinstance(value, list) and wanted in value)


# What transformers 4.x writes into config.json for every model: there these values say nothing.
_WRITTEN_ANYWAY: dict[str, Any] = {
    "num_beams": 1,
    "no_repeat_ngram_size": 0,
    "length_penalty": 1.0,
    "early_stopping": False,
    "max_length": 20,
    "min_length": 0,
    "do_sample": False,
    "repetition_penalty": 1.0,
    "encoder_no_repeat_ngram_size": 0,
    "temperature": 1.0,
    "top_k": 50,
    "top_p": 1.0,
    "typical_p": 1.0,
    "num_beam_groups": 1,
    "diversity_penalty": 0.0,
    "num_return_sequences": 1,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "bad_words_ids": None,
    "exponential_decay_length_penalty": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "decoder_start_token_id": None,
}
_DECODING = ("num_beams", "no_repeat_ngram_size", "length_penalty", "early_stopping")


def read_generation(source: Source, config: dict[str, Any], ids: dict[str, int], repairs: list[str]) -> dict[str, Any]:
    """generation_config.json, or config.json in its place; ids corrected, HF's defaults for the rest."""
    file = "generation_config.json"
    text = config["text_config"]
    said = _said(config) | _said(text)
    if source.has(file):
        generation = source.json(file)
        with told_of_checkpoint():
            check(generation, GENERATION, f"{source.folder / file}: ")
        generation = correct_ids(generation, ids, text, file, repairs)
    else:
        generation = said | ids
        repairs.append(f"{file} is missing: decoding defaults taken from config.json's text_config")
    generation = {key: _WRITTEN_ANYWAY[key] for key in _DECODING if generation.get(key) is None} | {
        key: value for key, value in generation.items() if key not in _DECODING or value is not None
    }
    forced = {
        "decoder_start_token_id": ids["eos_token_id"],
        "forced_bos_token_id": ids["bos_token_id"],
        "forced_eos_token_id": ids["eos_token_id"],
    }
    for key, default in forced.items():
        if generation.get(key) is None:
            generation[key] = said.get(key, default)
            repairs.append(f"{file}: {key} is absent, set to {generation[key]}")
    return generation


def _said(values: dict[str, Any]) -> dict[str, Any]:
    return {
        key: values[key]
        for key, anyway in _WRITTEN_ANYWAY.items()
        if values.get(key) is not None and values[key] != anyway
    }


def read_banned_phrases(source: Source, layout: Layout) -> list[str]:
    if layout == "microsoft":
        return list(MICROSOFT_BANNED_PHRASES)
    name = "post_processor_config.phrase_grounding.banned_grounding_tokens"
    where = f"{source.folder / 'processor_config.json'}: "
    content = source.optional_json("processor_config.json")
    with told_of_checkpoint():
        check(content, {name: PHRASES}, where)
        return list(value_at(content, name, where) or [])


_NEEDED = ("size.height", "size.width", "image_mean", "image_std")


def read_preprocessor(source: Source, config: Florence2Config, repairs: list[str]) -> dict[str, Any]:
    """The image processor's settings, all of them; refused where they ask for what is not done here."""
    file, prefix, given = _image_processor(source)

    def refuse(problem: str) -> CheckpointError:
        return CheckpointError(f"{source.folder / file}: {problem}")

    with told_of_checkpoint():
        check(given, PREPROCESSOR, f"{source.folder / file}: {prefix}", _NEEDED)
    size = {"height": given["size"]["height"], "width": given["size"]["width"]}
    for key in ("do_resize", "do_rescale", "do_normalize"):
        if given.get(key) is False:
            raise refuse(f"{key} is false; Florence-2 pixels are resized, rescaled and normalised: set it to true")
    if given.get("do_pad"):
        raise refuse("do_pad is true; Florence-2 does not pad pictures: set it to false")
    if _crops(given, size):
        raise refuse(f"do_center_crop to {short(given.get('crop_size'))} after resizing to {size}: set it to false")
    return {
        "do_resize": True,
        "size": size,
        "resample": 3 if given.get("resample") is None else given["resample"],
        "do_center_crop": False,
        "do_rescale": True,
        "rescale_factor": given.get("rescale_factor") or 1 / 255,
        "do_normalize": True,
        "image_mean": [float(value) for value in given["image_mean"]],
        "image_std": [float(value) for value in given["image_std"]],
        "do_convert_rgb": True,
        "image_seq_length": _image_seq_length(given, size, config, file, repairs, refuse),
    }


def _image_processor(source: Source) -> tuple[str, str, dict[str, Any]]:
    """processor_config.json first, as transformers 5 does (ImageProcessingMixin.get_image_processor_dict): the file,
    what its fields' names begin with, and the object."""
    file = "processor_config.json"
    nested = source.optional_json(file).get("image_processor")
    if nested is None:
        return "preprocessor_config.json", "", source.json("preprocessor_config.json")
    if not isinstance(nested, dict):
        raise CheckpointError(f"{source.folder / file}: image_processor is {short(nested)}; give an object")
    return file, "image_processor.", nested


def _crops(given: dict[str, Any], size: dict[str, int]) -> bool:
    """A crop to the size just resized to changes nothing. CLIPImageProcessor's own default is to crop."""
    crop = given.get("crop_size")
    if isinstance(crop, int):
        crop = {"height": crop, "width": crop}
    if given.get("do_center_crop") is None:
        return crop is not None and crop != size
    return bool(given["do_center_crop"]) and crop != size


def feature_maps(vision: Any, size: dict[str, int]) -> Iterator[tuple[int, int, int]]:
    """Of a vision_config and a preprocessor's size: channels, rows and columns of what each stage gives."""
    sides = (size["height"], size["width"])
    stages = zip(vision.patch_size, vision.patch_stride, vision.patch_padding, vision.embed_dim, strict=True)
    for kernel, stride, padding, channels in stages:
        height, width = ((side + 2 * padding - kernel) // stride + 1 for side in sides)
        yield channels, height, width
        sides = (height, width)


def _image_seq_length(
    given: dict[str, Any],
    size: dict[str, int],
    config: Florence2Config,
    file: str,
    repairs: list[str],
    refuse: Refuse,
) -> int:
    """Image tokens: the last stage's map, and the pooled token before it."""
    vision: Any = config.vision_config
    for channels, *grid in feature_maps(vision, size):
        if min(grid) < 1 or not MAP_VALUES.allows(grid[0] * grid[1] * channels):
            what = f"a stage of {grid[0]} x {grid[1]} places and {channels} channels"
            raise refuse(f"size {size} gives {what}; give a size that vision_config's patch_stride is made for")
    if max(grid) > vision.max_position_embeddings:
        raise refuse(
            f"size {size} gives {grid[0]} x {grid[1]} image tokens; "
            f"the model has positions for 1 to {vision.max_position_embeddings} a side"
        )
    length = grid[0] * grid[1] + 1
    if not IMAGE_TOKENS.allows(length):
        raise refuse(f"size {size} gives {length} image tokens; give a size with {IMAGE_TOKENS}")
    stated = given.get("image_seq_length")
    if stated is not None and stated != length:
        repairs.append(f"{file}: image_seq_length {stated} replaced by {length}, which is what {size} gives")
    return length
