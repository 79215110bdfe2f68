"""Every tokenizer is exact about bytes, keeps its identity through a file, and names what is wrong with a bad one."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from train import tokenizer as module
from train.tokenizer import (
    BOS,
    EOS,
    TokenizerError,
    byte_tokenizer,
    load_tokenizer,
    special_ids,
    token_byte_lengths,
    tokenizer_hash,
    train_bpe,
    vocabulary_size,
    word_end_ids,
)

TEXTS = [
    "def area(r):\n    return 3.14159 * r ** 2  # 2024\n" * 3,
    "It was the best of times, it was the worst of times; don't ask 1234567 times.\n" * 3,
    "湘靈鼓瑟，善鼓雲和瑟，常聞帝子靈。馮夷空自舞，楚客不堪聽。\n" * 3,
]
# No lone surrogates: they are no text, and the reader of documents refuses them.
ANY_TEXT = st.text(st.characters(codec="utf-8"), max_size=60)


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    return train_bpe(TEXTS, 320)


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]


def test_words_end_with_bytes_that_are_no_part_of_one() -> None:
    ids = word_end_ids(byte_tokenizer())
    assert ids == sorted(ids) and {256, 257} < set(ids)
    inside = set(range(256)) - set(ids)
    letters = {ord(c) for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789"}
    assert inside == letters | set(range(0x80, 0xC0))  # and bytes within characters


def test_longer_tokens_end_words_by_their_last_byte(bpe: PreTrainedTokenizerFast) -> None:
    ids, vocabulary = set(word_end_ids(bpe)), bpe.get_vocab()
    lengths = token_byte_lengths(bpe)
    longer = [token for token, token_id in vocabulary.items() if lengths[token_id] > 1]
    ending = {bpe.decode([vocabulary[token]]) for token in longer if vocabulary[token] in ids}
    assert {" *", "):\n"} & ending and not any(text[-1:].isalnum() for text in ending)
    assert {bpe.bos_token_id, bpe.eos_token_id, vocabulary["."]} < ids and vocabulary["Ġt"] not in ids


def test_words_of_tokens_that_are_not_bytes() -> None:
    backend = Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    with pytest.raises(TokenizerError, match="needs a byte-level tokenizer"):
        word_end_ids(PreTrainedTokenizerFast(tokenizer_object=backend))


@given(text=ANY_TEXT)
@settings(max_examples=50)
def test_byte_ids_are_the_bytes(text: str) -> None:
    tokenizer = byte_tokenizer()
    assert encode(tokenizer, text) == list(text.encode())
    assert tokenizer.decode(list(text.encode())) == text


def test_byte_vocabulary() -> None:
    tokenizer = load_tokenizer("byte")
    assert vocabulary_size(tokenizer) == len(tokenizer) == 258
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 257)
    assert special_ids(tokenizer) == {256, 257}
    np.testing.assert_array_equal(token_byte_lengths(tokenizer), [1] * 256 + [0, 0])


@given(text=ANY_TEXT)
@settings(max_examples=50)
def test_bpe_round_trip_and_exact_byte_lengths(bpe: PreTrainedTokenizerFast, text: str) -> None:
    ids = encode(bpe, text)
    assert bpe.decode(ids) == text
    lengths_V = token_byte_lengths(bpe)
    assert lengths_V is not None
    assert lengths_V[ids].sum() == len(text.encode())


def test_bpe_has_exactly_the_size_asked_for(bpe: PreTrainedTokenizerFast) -> None:
    assert vocabulary_size(bpe) == len(bpe) == 320
    assert (bpe.bos_token, bpe.eos_token) == (BOS, EOS)
    assert max(len(encode(bpe, text)) / len(text.encode()) for text in TEXTS) < 0.8  # it does compress


def test_bpe_training_is_deterministic(bpe: PreTrainedTokenizerFast) -> None:
    assert tokenizer_hash(train_bpe(iter(TEXTS), 320)) == tokenizer_hash(bpe)


def test_bpe_split_digits_and_chinese_punctuation(bpe: PreTrainedTokenizerFast) -> None:
    pieces = [piece for piece, _ in bpe.backend_tokenizer.pre_tokenizer.pre_tokenize_str("x = 1234，湘靈鼓瑟。")]
    readable = [bpe.convert_tokens_to_string([piece]) for piece in pieces]
    assert readable == ["x", " =", " ", "1", "2", "3", "4", "，", "湘靈鼓瑟", "。"]


def test_bpe_errors_name_the_size() -> None:
    with pytest.raises(TokenizerError, match=r"bpe:100: .* at least 258"):
        train_bpe(TEXTS, 100)
    with pytest.raises(TokenizerError, match=r"bpe:5000: the text is too small, it yields only (\d+) ids"):
        train_bpe(TEXTS, 5000)


@pytest.mark.parametrize("name", ["byte", "bpe"])
def test_hash_survives_every_way_of_saving_and_loading(name: str, bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer = bpe if name == "bpe" else byte_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    for loaded in (
        AutoTokenizer.from_pretrained(tmp_path),
        load_tokenizer(str(tmp_path)),
        load_tokenizer(str(tmp_path / "tokenizer.json")),
    ):
        assert isinstance(loaded, PreTrainedTokenizerFast)
        assert tokenizer_hash(loaded) == tokenizer_hash(tokenizer)
        assert (loaded.bos_token_id, loaded.eos_token_id) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
        assert encode(loaded, TEXTS[2]) == encode(tokenizer, TEXTS[2])


def test_hash_tells_tokenizers_apart_but_not_their_padding(bpe: PreTrainedTokenizerFast) -> None:
    assert tokenizer_hash(bpe) != tokenizer_hash(byte_tokenizer())
    assert tokenizer_hash(bpe) != tokenizer_hash(train_bpe(TEXTS, 319))
    padded = byte_tokenizer()
    padded.backend_tokenizer.enable_padding(length=8)
    padded.backend_tokenizer.enable_truncation(max_length=4)
    assert tokenizer_hash(padded) == tokenizer_hash(byte_tokenizer())


def test_tokenizer_json_decides_whatever_class_the_config_names(bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    bpe.save_pretrained(tmp_path)
    config_path = tmp_path / "tokenizer_config.json"
    config = json.loads(config_path.read_text()) | {"tokenizer_class": "LlamaTokenizerFast"}
    config_path.write_text(json.dumps(config))
    loaded = load_tokenizer(str(tmp_path))
    assert [encode(loaded, text) for text in TEXTS] == [encode(bpe, text) for text in TEXTS]


def test_bare_tokenizer_json_names_no_document_tokens(bpe: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    path = tmp_path / "other.json"
    bpe.backend_tokenizer.save(str(path))
    loaded = load_tokenizer(str(path))
    assert (loaded.bos_token_id, loaded.eos_token_id) == (None, None)
    assert encode(loaded, TEXTS[0]) == encode(bpe, TEXTS[0])
    assert special_ids(loaded) == special_ids(bpe)  # still no text, though nothing says what they are for


def test_added_tokens_count_their_own_bytes_and_gaps_count_none() -> None:
    backend = byte_tokenizer().backend_tokenizer
    backend.add_tokens(["王后"])  # matched as it stands, so its string is not in the byte alphabet
    lengths_V = token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=backend))
    assert lengths_V is not None
    assert lengths_V[258] == 6

    content = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    content["model"]["vocab"]["a"] = 300
    gap = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(content)))
    lengths_V = token_byte_lengths(gap)
    assert lengths_V is not None
    assert vocabulary_size(gap) == len(lengths_V) == 301
    assert (lengths_V[300], lengths_V[299]) == (1, 0)


def test_byte_lengths_are_unknown_when_not_byte_level() -> None:
    backend = Tokenizer(models.WordLevel({"▁the": 0, "▁cat": 1, "[UNK]": 2}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Sequence([decoders.Metaspace()])
    assert token_byte_lengths(PreTrainedTokenizerFast(tokenizer_object=backend)) is None


def test_load_errors_name_the_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(TokenizerError, match=r"missing/tokenizer\.json: no such"):
        load_tokenizer(str(tmp_path / "missing" / "tokenizer.json"))
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json in this directory"):
        load_tokenizer(str(tmp_path))
    broken = tmp_path / "broken.json"
    broken.write_text('{"version": "1.0"')
    with pytest.raises(TokenizerError, match=r"broken\.json: not a tokenizer\.json"):
        load_tokenizer(str(broken))

    directory = tmp_path / "directory"
    directory.mkdir()
    (directory / "tokenizer.json").write_text('{"version": "1.0"')
    with pytest.raises(TokenizerError, match=r"directory: its tokenizer files cannot be loaded \(.*\)$"):
        load_tokenizer(str(directory))

    def unreachable(name: str, file: str) -> None:
        raise OSError(f"cannot reach the hub for {file}\nand many more lines")

    monkeypatch.setattr(module, "cached_file", unreachable)
    with pytest.raises(
        TokenizerError, match=r"^someone/something: no .* \(cannot reach the hub for tokenizer\.json\)$"
    ):
        load_tokenizer("someone/something")
