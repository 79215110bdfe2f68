"""What tokens are, by the text that they stand for: starts and insides of words, digits, punctuation."""

import functools
import unicodedata
from collections.abc import Iterator

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast

from eval.loading import decode
from train.tokenizer import special_ids

TOKEN_CLASSES = ("word start", "word inside", "CJK", "digit", "punctuation", "symbol", "white space", "special")
JOINERS = "'’_"  # of what is one word, between its letters
OPERATORS = "#%&*/@\\"  # that Unicode counts as punctuation
CJK_NAMES = ("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "BOPOMOFO", "HANGUL")
FRAGMENT = "\ufffd"  # how bytes that are no whole character are decoded
MOST_BYTES = 4  # of a character


@functools.cache
def token_class(text: str | None, before: str = "") -> str:
    """What a token is, by its text.

    Args:
        text: None for a special token. One with a CJK letter is CJK, one with another letter a word, one with another
            number a digit; of the rest, white space has nothing else, and an operator or symbol makes a symbol.
        before: the text of the token before it, in which a word that goes on has its start.
    """
    if not text:
        return "special"
    if text.isspace():
        return "white space"
    if any(map(_is_cjk, text)):
        return "CJK"
    kinds = [unicodedata.category(character)[0] for character in text]
    if "L" in kinds:
        is_whole = all(character in JOINERS or kind in "MN" for character, kind in _before_letter(text, kinds))
        last = before.rstrip(JOINERS)[-1:]
        goes_on = last != "" and unicodedata.category(last)[0] in "LMN" and not _is_cjk(last)
        return "word inside" if is_whole and goes_on else "word start"
    if "N" in kinds:
        return "digit"
    return "punctuation" if "P" in kinds and "S" not in kinds and not set(text) & set(OPERATORS) else "symbol"


def _before_letter(text: str, kinds: list[str]) -> Iterator[tuple[str, str]]:
    return zip(text, kinds[: kinds.index("L")], strict=False)


def _is_cjk(character: str) -> bool:
    return unicodedata.category(character)[0] in "LN" and unicodedata.name(character, "").startswith(CJK_NAMES)


def token_texts(tokenizer: PreTrainedTokenizerFast, ids_T: np.ndarray) -> list[str | None]:
    """The text that each token stands for; None for special tokens. Tokens that share characters stand for them all."""

    def text_of(*ids: int) -> str:
        return decode(tokenizer, torch.tensor(ids))

    ids = ids_T.tolist()
    # Decoders of some tokenizers drop the first one's space: what a token stands for shows where it comes second.
    alone: dict[int, str | None] = {token: text_of(token, token)[len(text_of(token)) :] for token in set(ids)}
    alone |= dict.fromkeys(special_ids(tokenizer))
    texts: list[str | None] = []
    while len(texts) < len(ids):
        start = len(texts)
        text, stop = alone[ids[start]], start + 1
        while text and FRAGMENT in text and stop < min(start + MOST_BYTES, len(ids)) and alone[ids[stop]]:
            stop += 1
            text = text_of(*ids[start:stop])
        if text and FRAGMENT in text:  # no character's bytes
            text, stop = alone[ids[start]], start + 1
        texts += [text] * (stop - start)
    return texts


def token_classes(tokenizer: PreTrainedTokenizerFast, ids_T: np.ndarray) -> np.ndarray:
    """(T,) index into `TOKEN_CLASSES`."""
    texts = token_texts(tokenizer, ids_T)
    before = ["", *(piece or "" for piece in texts)]
    return np.array([TOKEN_CLASSES.index(token_class(*pair)) for pair in zip(texts, before, strict=False)])
