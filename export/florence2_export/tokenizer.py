"""A checkpoint's tokenizer, completed with the tokens that Florence-2's processor adds."""

from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from florence2_export.source import CheckpointError, Source, one_line

BOS, PAD, EOS, UNK, MASK = "<s>", "<pad>", "</s>", "<unk>", "<mask>"
IMAGE = "<image>"

# The order gives the ids: Microsoft's processing_florence2.py, tokens_to_add; `desciption` is spelt as there.
FLORENCE_TOKENS = (
    *("<od>", "</od>", "<ocr>", "</ocr>"),
    *(f"<loc_{index}>" for index in range(1000)),
    *("<cap>", "</cap>", "<ncap>", "</ncap>", "<dcap>", "</dcap>", "<grounding>", "</grounding>"),
    *("<seg>", "</seg>", "<sep>", "<region_cap>", "</region_cap>"),
    *(
        "<region_to_desciption>",
        "</region_to_desciption>",
        "<proposal>",
        "</proposal>",
        "<poly>",
        "</poly>",
        "<and>",
    ),
)


def load_tokenizer(source: Source) -> Tokenizer:
    """Complete, without truncation or padding; `<s>` and `</s>` only where special tokens are asked for."""
    tokenizer = _from_json(source) if source.has("tokenizer.json") else _from_vocabulary(source)
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _add_declared(tokenizer, source)
    _add_missing(tokenizer, FLORENCE_TOKENS)
    _frame_with_bos_and_eos(tokenizer, source)
    return tokenizer


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """Of a tokenizer from `load_tokenizer`, which has all three."""
    vocabulary = tokenizer.get_vocab()
    return {"bos_token_id": vocabulary[BOS], "eos_token_id": vocabulary[EOS], "pad_token_id": vocabulary[PAD]}


def _from_json(source: Source) -> Tokenizer:
    path = source.path("tokenizer.json")
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises nothing more special
        raise CheckpointError(f"{path} is damaged or cut short ({one_line(error)}); get it again") from error


def _from_vocabulary(source: Source) -> Tokenizer:
    """BART's byte-level BPE from vocab.json and merges.txt, as transformers' BartTokenizer builds it."""
    if not source.has("vocab.json") or not source.has("merges.txt"):
        raise CheckpointError(
            f"{source.folder}: no tokenizer; expected tokenizer.json, or vocab.json and merges.txt: "
            "copy them from the checkpoint's base model"
        )
    vocab, merges = source.path("vocab.json"), source.path("merges.txt")
    prefix_space = bool(source.optional_json("tokenizer_config.json").get("add_prefix_space", False))
    try:
        bpe = models.BPE.from_file(str(vocab), str(merges), continuing_subword_prefix="", end_of_word_suffix="")
    except Exception as error:
        raise CheckpointError(f"{vocab}, {merges.name}: {one_line(error)}; get them again") from error
    tokenizer = Tokenizer(bpe)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    _add_missing(tokenizer, (BOS, PAD, EOS, UNK))
    tokenizer.add_special_tokens([AddedToken(MASK, lstrip=True, normalized=False, special=True)])
    return tokenizer


def _add_declared(tokenizer: Tokenizer, source: Source) -> None:
    """Tokens that transformers keeps beside the vocabulary, with ids that must come out as given."""
    for file, declared in _declared(source):
        _add_missing(tokenizer, sorted(declared, key=declared.__getitem__))
        vocabulary = tokenizer.get_vocab()
        for token, index in declared.items():
            if vocabulary[token] != index:
                raise CheckpointError(
                    f"{source.folder / file}: {token} has id {index}, but the vocabulary gives it "
                    f"{vocabulary[token]}; copy the tokenizer from the checkpoint's base model"
                )


def _declared(source: Source) -> Iterator[tuple[str, dict[str, int]]]:
    for file in ("added_tokens.json", "tokenizer_config.json"):
        content = source.optional_json(file)
        try:
            if file == "tokenizer_config.json":
                by_id = content.get("added_tokens_decoder") or {}
                content = {token["content"]: index for index, token in by_id.items()}
            yield file, {token: int(index) for token, index in content.items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            problem = f"its added tokens are not tokens with ids ({one_line(error)})"
            raise CheckpointError(f"{source.folder / file}: {problem}; get it again") from error


def _add_missing(tokenizer: Tokenizer, tokens: Iterable[str]) -> None:
    # A token of the vocabulary that is not an added one would be cut into pieces; adding keeps its id.
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    missing = [AddedToken(token, normalized=False, special=True) for token in tokens if token not in added]
    tokenizer.add_special_tokens(missing)


def _frame_with_bos_and_eos(tokenizer: Tokenizer, source: Source) -> None:
    absent = [token for token in (BOS, EOS, PAD) if tokenizer.token_to_id(token) is None]
    if absent:
        raise CheckpointError(
            f"{source.folder}: the tokenizer has no {', '.join(absent)}; copy the base model's tokenizer"
        )
    ids = special_ids(tokenizer)
    if tokenizer.encode("").ids != [ids["bos_token_id"], ids["eos_token_id"]]:
        frame = [(BOS, ids["bos_token_id"]), (EOS, ids["eos_token_id"])]
        tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=frame)
