"""The demo's tokenizer: a byte-level BPE with Florence-2's special tokens, in the order of its ids."""

from florence2_export.tokenizer import BOS, EOS, FLORENCE_TOKENS, IMAGE, MASK, PAD, UNK
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import RobertaTokenizer

from florence2.tasks import TASKS
from florence2_demo import words

VOCABULARY_MULTIPLE = 64


def build() -> RobertaTokenizer:
    """Every word of the demo is one token, with and without a space before; capitals stay single letters."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    # The bound on the size is never reached: merging stops when every word is whole.
    trainer = trainers.BpeTrainer(
        vocab_size=4000, special_tokens=[BOS, PAD, EOS, UNK], initial_alphabet=sorted(alphabet), show_progress=False
    )
    bpe.train_from_iterator(_corpus(), trainer)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([AddedToken(MASK, lstrip=True)])
    bpe.add_special_tokens(list(FLORENCE_TOKENS))
    bpe.add_special_tokens([IMAGE])
    bpe.post_processor = processors.RobertaProcessing((EOS, 2), (BOS, 0), add_prefix_space=False)
    return RobertaTokenizer(
        tokenizer_object=bpe,
        extra_special_tokens={"image_token": IMAGE},
        model_max_length=512,
    )


def vocabulary_size(tokenizer: RobertaTokenizer) -> int:
    """Rounded up as transformers' converter rounds it: some logits belong to no token."""
    return -(-len(tokenizer) // VOCABULARY_MULTIPLE) * VOCABULARY_MULTIPLE


def _corpus() -> list[str]:
    nouns = [*words.SHAPES, *words.PAGE_OBJECTS, "word", *words.COLOURS, "page", "text", "title", "paragraph"]
    nouns += [words.plural(noun) for noun in nouns]
    prompts = [task.prompt.replace("{input}", " ") for task in TASKS.values()]
    # BPE needs to meet a pair twice to merge it.
    return [
        *nouns,
        *words.COUNTS.values(),
        " ".join(["", *nouns, *words.COUNTS.values(), "an", "and", "with", "of"]),
        *prompts,
    ] * 2
