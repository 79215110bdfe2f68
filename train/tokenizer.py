"""Tokenizers: the built-in byte tokenizer, a byte-level BPE trained on the spot, or a ready-made one.

Each is a `transformers.PreTrainedTokenizerFast` backed by a `tokenizer.json`, so a checkpoint can carry it and
`AutoTokenizer.from_pretrained(checkpoint)` finds it. None of ours adds special tokens when it encodes: whoever
lays out a document places `<|bos|>` and `<|eos|>`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.utils import cached_file

BOS = "<|bos|>"
EOS = "<|eos|>"

# The GPT-4 split with three changes: every digit stands alone, combining marks stay with their letter, and Chinese
# characters form runs of their own (otherwise a comma would be glued to the clause after it).
SPLIT_PATTERN = (
    r"\p{Han}+"
    r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}&&[^\p{Han}]]+"
    r"|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


class TokenizerError(ValueError):
    """A tokenizer that cannot be loaded or trained as asked."""


def load_tokenizer(name: str) -> PreTrainedTokenizerFast:
    """Return the tokenizer called `name`.

    `name` is `byte`, a `tokenizer.json`, a directory that holds one, or the id of a repository on the hub.
    A bare `tokenizer.json` does not say which tokens open and close a document; a `tokenizer_config.json` beside
    it does, and is read. Raises TokenizerError when there is no such tokenizer.
    """
    if name == "byte":
        return byte_tokenizer()
    path = Path(name)
    if path.is_file():
        if path.name == "tokenizer.json" and path.with_name("tokenizer_config.json").is_file():
            return _from_pretrained(str(path.parent))
        return _from_file(path)
    if path.is_dir():
        if not (path / "tokenizer.json").is_file():
            raise TokenizerError(f"{name}: no tokenizer.json in this directory")
        return _from_pretrained(name)
    if path.suffix == ".json" or path.is_absolute() or name.startswith("."):
        raise TokenizerError(f"{name}: no such tokenizer file or directory")
    return _from_hub(name)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer whose ids 0-255 are the bytes themselves, followed by `<|bos|>` and `<|eos|>`; V = 258."""
    vocabulary = {character: byte for byte, character in enumerate(_byte_alphabet())}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(BOS, special=True), AddedToken(EOS, special=True)])
    return _with_document_tokens(backend)


def train_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE of exactly `vocab_size` ids, the 256 bytes, `<|bos|>` and `<|eos|>` included.

    The same texts in the same order give the same tokenizer. Raises TokenizerError when `vocab_size` has no room
    for the bytes, or when the texts run out of pairs to merge before reaching it.
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    smallest = len(alphabet) + 2
    if vocab_size < smallest:
        raise TokenizerError(f"bpe:{vocab_size}: a byte-level BPE needs at least {smallest} ids")
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(BOS, special=True), AddedToken(EOS, special=True)],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    reached = backend.get_vocab_size()
    if reached != vocab_size:
        raise TokenizerError(
            f"bpe:{vocab_size}: the text is too small, it yields only {reached} ids; ask for bpe:{reached} or fewer"
        )
    return _with_document_tokens(backend)


def tokenizer_hash(tokenizer: PreTrainedTokenizerFast) -> str:
    """sha256 of the tokenizer's canonical `tokenizer.json`: equal hashes turn equal text into equal ids."""
    content = _content(tokenizer)
    # Set by whoever encodes a padded batch, saved along by accident, and without effect on ids.
    content.pop("padding", None)
    content.pop("truncation", None)
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()


def vocabulary_size(tokenizer: PreTrainedTokenizerFast) -> int:
    """V, one more than the largest id: some vocabularies have gaps, and an embedding needs a row for each."""
    return max(tokenizer.get_vocab().values()) + 1


def special_ids(tokenizer: PreTrainedTokenizerFast) -> set[int]:
    """Ids that stand for no text: `<|bos|>` and its like."""
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    return {token_id for token_id, token in added.items() if token.special} | set(tokenizer.all_special_ids)


def token_byte_lengths(tokenizer: PreTrainedTokenizerFast) -> np.ndarray | None:
    """Number of UTF-8 bytes that each id stands for, (V,) int64; 0 for special tokens and for gaps.

    Known for byte-level vocabularies, whose token strings spell one byte per character. Returns None for any
    other kind (SentencePiece, WordPiece), where one id may stand for different bytes in different places.
    A normaliser can still break the count for some text, so a caller that needs it exact checks it on the text.
    """
    if "ByteLevel" not in _step_types(_content(tokenizer)["decoder"]):
        return None
    alphabet = set(_byte_alphabet())
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    special = special_ids(tokenizer)
    lengths_V = np.zeros(vocabulary_size(tokenizer), dtype=np.int64)
    for token, token_id in tokenizer.get_vocab().items():
        if token_id in special:
            continue
        if token_id in added:  # matched in the text as it stands, not through the byte alphabet
            lengths_V[token_id] = len(token.encode())
        elif alphabet.issuperset(token):
            lengths_V[token_id] = len(token)
        else:
            return None
    return lengths_V


def word_end_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Ids after which a word has ended, sorted: their last byte is neither letter nor digit nor within a character.

    All bytes of a character beyond ASCII but its first count as within it. So Chinese is cut between characters, at the
    first byte of each: that is where the one before is known to be whole. Special tokens end words.

    Raises:
        TokenizerError: not a byte-level vocabulary, or no id ends a word.
    """
    if token_byte_lengths(tokenizer) is None:
        raise TokenizerError("segmenter='words' needs a byte-level tokenizer, whose tokens are known as bytes")
    byte_of = {character: byte for byte, character in enumerate(_byte_alphabet())}
    added = tokenizer.backend_tokenizer.get_added_tokens_decoder()
    found = set(special_ids(tokenizer))
    for token, token_id in tokenizer.get_vocab().items():
        if token_id not in found:
            last = token.encode()[-1] if token_id in added else byte_of[token[-1]]
            if not (chr(last).isalnum() if last < 0x80 else last < 0xC0):
                found.add(token_id)
    return sorted(found)


def _from_hub(name: str) -> PreTrainedTokenizerFast:
    try:
        # Asked for first: without it, transformers would look for every other kind of vocabulary file and convert it.
        cached_file(name, "tokenizer.json")
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise TokenizerError(f"{name}: no tokenizer.json found on the hub, nor such a path here ({reason})") from error
    return _from_pretrained(name)


def _from_pretrained(name: str) -> PreTrainedTokenizerFast:
    # Not AutoTokenizer: for a `tokenizer_class` such as LlamaTokenizerFast (DeepSeek-V3 says so) it rebuilds the
    # pipeline of that class and ignores the one in tokenizer.json, which gives other ids.
    with _malformed_content(f"{name}: its tokenizer files cannot be loaded"):
        return PreTrainedTokenizerFast.from_pretrained(name)


def _from_file(path: Path) -> PreTrainedTokenizerFast:
    with _malformed_content(f"{path}: not a tokenizer.json"):
        return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_file(str(path)))


@contextmanager
def _malformed_content(problem: str) -> Iterator[None]:
    """The tokenizers package raises bare Exception for it, or panics, which is no Exception at all."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise TokenizerError(f"{problem} ({reason})") from error


def _with_document_tokens(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


def _content(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return json.loads(tokenizer.backend_tokenizer.to_str())


def _step_types(step: dict[str, Any] | None) -> set[str]:
    """Types of all steps of a decoder, which may be a sequence of others."""
    if step is None:
        return set()
    return {step["type"]}.union(*(_step_types(inner) for inner in step.get("decoders", [])))


def _byte_alphabet() -> list[str]:
    """The character that spells each byte 0-255: itself where printable, else the next one beyond Latin-1."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    printable = {ord(letter): letter for letter in letters if ord(letter) < 256}
    others = iter(letter for letter in letters if ord(letter) >= 256)
    return [printable[byte] if byte in printable else next(others) for byte in range(256)]
