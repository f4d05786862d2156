"""The word-level tokenizer: one id a word of the grammar, as an ordinary fast tokenizer of transformers."""

from __future__ import annotations

import re

from . import world

_WORD = re.compile(r"\w+|[^\w\s]+")


def words(prompt: str) -> list[str]:
    """The words of a prompt as the tokenizer splits it: lower case, punctuation by itself."""
    return _WORD.findall(prompt.lower())


def unknown_words(prompt: str) -> list[str]:
    """Words of the prompt that are outside the grammar's vocabulary, in order, each once."""
    known = set(world.vocabulary()[len(world.SPECIALS) :])
    return list(dict.fromkeys(word for word in words(prompt) if word not in known))


def build_tokenizer():
    """A ``PreTrainedTokenizerFast`` over :func:`world.vocabulary`; every caption ends with ``</s>``."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    pad, end, unknown = world.SPECIALS
    ids = {word: i for i, word in enumerate(world.vocabulary())}
    core = Tokenizer(models.WordLevel(ids, unk_token=unknown))
    core.normalizer = normalizers.Lowercase()
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(single=f"$A {end}", special_tokens=[(end, ids[end])])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=pad,
        eos_token=end,
        unk_token=unknown,
        model_max_length=world.TEXT_LENGTH,
        padding_side="right",
    )
