"""transformers' `generate` with our caches: whatever it does, it draws what it would draw without one."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation import BaseStreamer

from dlcm.causal_lm import PackedCausalLM
from tests.conftest import VOCABULARY, arrange, random_documents, tiny_baseline, tiny_dlcm

BOTH = pytest.mark.parametrize("build", [pytest.param(tiny_dlcm, id="dlcm"), pytest.param(tiny_baseline, id="llama")])
PROMPTS = [3, 8, 1]
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "temperature": 1.5, "top_k": 0, "top_p": 0.9},
    "top_k": {"do_sample": True, "top_k": 5},
    "several": {"do_sample": True, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5},
    "beam_sampling": {"num_beams": 2, "do_sample": True},
    "chunks": {"prefill_chunk_size": 3},
    "penalties": {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
}


def greedy(model: PackedCausalLM, prompt: Tensor, new_tokens: int) -> Tensor:
    """The argmax of a full forward, appended again and again."""
    ids = prompt
    for _ in range(new_tokens):
        ids = torch.cat([ids, model(ids[None]).logits[0, -1].argmax()[None]])
    return ids


def said(model: PackedCausalLM, seed: int = 0, **arguments: Any) -> Tensor:
    torch.manual_seed(seed)
    inputs = arrange(random_documents(PROMPTS, seed=7), "left_padded").inputs
    return model.generate(**{**inputs, "max_new_tokens": 12, "pad_token_id": 0, "do_sample": False, **arguments})


@BOTH
def test_greedy_is_the_argmax_of_every_step(build: Callable):
    model, prompts = build(6), random_documents(PROMPTS, seed=7)
    together = said(model)
    assert len(set(together[:, max(PROMPTS) :].flatten().tolist())) > 2, "a constant continuation would prove little"
    for prompt, continued in zip(prompts, together, strict=True):
        assert continued[max(PROMPTS) :].tolist() == greedy(model, prompt, 12)[len(prompt) :].tolist()


@BOTH
@pytest.mark.parametrize("way", WAYS)
def test_the_cache_changes_nothing(build: Callable, way: str):
    model = build(6)
    without = {key: value for key, value in WAYS[way].items() if key != "prefill_chunk_size"}
    assert torch.equal(said(model, **WAYS[way]), said(model, use_cache=False, **without))


@BOTH
def test_drafts_are_verified_and_cropped(build: Callable):
    """Prompt lookup proposes several tokens at once; what was wrong is cropped from the cache."""
    model = build(6)
    prompt = torch.randint(VOCABULARY, (1, 6), generator=torch.Generator().manual_seed(0)).repeat(1, 4)
    expected = greedy(model, prompt[0], 20).tolist()
    drafted = model.generate(prompt, max_new_tokens=20, do_sample=False, prompt_lookup_num_tokens=4)
    assert drafted[0].tolist() == expected


@BOTH
def test_turns_go_on_where_the_last_one_ended(build: Callable):
    model = build(6)
    inputs = arrange(random_documents(PROMPTS, seed=7), "left_padded").inputs
    ids_BL, mask_BL = inputs["input_ids"], inputs["attention_mask"]
    cache = model.new_cache()
    for turn in range(3):
        arguments = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
        read = ids_BL.shape[1]
        expected = model.generate(ids_BL, attention_mask=mask_BL, use_cache=False, **arguments)
        found = model.generate(ids_BL, attention_mask=mask_BL, past_key_values=cache, **arguments)
        assert torch.equal(found, expected)
        assert cache.get_seq_length() == read + 4  # the last token has not been read yet
        news = torch.randint(VOCABULARY, (3, 4), generator=torch.Generator().manual_seed(turn))
        ids_BL = torch.cat([found, news], 1)
        mask_BL = torch.cat([mask_BL, torch.ones(3, 9, dtype=mask_BL.dtype)], 1)


@BOTH
def test_a_prefix_is_read_once(build: Callable):
    model = build(6)
    (prefix,) = random_documents([9], seed=3)
    cache = model.new_cache()
    with torch.no_grad():
        model(prefix[None], past_key_values=cache)
    for tail in random_documents([4, 2], seed=4):
        ids = torch.cat([prefix, tail])
        again = model.generate(ids[None], past_key_values=copy.deepcopy(cache), max_new_tokens=6, do_sample=False)
        assert again[0].tolist() == greedy(model, ids, 6).tolist()
    assert cache.get_seq_length() == 9


@BOTH
def test_the_cache_comes_back(build: Callable):
    model = build(6)
    answer = said(model, return_dict_in_generate=True)
    assert isinstance(answer.past_key_values, model.cache_class)
    assert answer.past_key_values.get_seq_length() == answer.sequences.shape[1] - 1


class Collected(BaseStreamer):
    def __init__(self) -> None:
        self.ids: list[int] = []

    def put(self, value: Tensor) -> None:
        self.ids += value.flatten().tolist()

    def end(self) -> None:
        self.ids.append(-1)


class AfterFour(StoppingCriteria):
    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        return torch.full((len(input_ids),), input_ids.shape[1] >= 9)


@BOTH
def test_streamers_and_stopping_criteria(build: Callable):
    model, (prompt,) = build(6), random_documents([5], seed=6)
    streamer = Collected()
    stopped = model.generate(
        prompt[None],
        max_new_tokens=12,
        do_sample=False,
        streamer=streamer,
        stopping_criteria=StoppingCriteriaList([AfterFour()]),
    )
    assert streamer.ids == [*stopped[0].tolist(), -1] == [*greedy(model, prompt, 4).tolist(), -1]


@BOTH
def test_steps_read_one_token(build: Callable):
    model, (prompt,) = build(6), random_documents([5], seed=6)
    read: list[int] = []
    model.register_forward_hook(lambda module, arguments, output: read.append(output.logits.shape[1]))
    model.embed_tokens.register_forward_hook(lambda module, arguments, output: read.append(arguments[0].numel()))
    model.generate(prompt[None], max_new_tokens=4, do_sample=False)
    assert read == [5, 1, *[1, 1] * 3]  # tokens embedded, columns of logits


@BOTH
def test_the_configuration_decides_where_nobody_else_does(build: Callable):
    model, (prompt,) = build(6, use_cache=False), random_documents([5], seed=6)
    answer = model.generate(prompt[None], max_new_tokens=2, return_dict_in_generate=True)
    assert "past_key_values" not in answer


@BOTH
def test_what_cannot_be_generated_is_an_error_before_anything_is(build: Callable):
    model, (prompt,) = build(6, max_position_embeddings=16), random_documents([5], seed=6)
    assert model.generate(prompt[None], max_new_tokens=12).shape[1] <= 17
    for arguments, message in (
        ({"max_new_tokens": 13}, "up to 18, of which all but the last need one of the model's 16 positions"),
        ({"max_new_tokens": 13, "use_cache": False}, "model's 16 positions"),
        ({"max_new_tokens": 2, "cache_implementation": "quantized"}, "'quantized' is not supported: use 'dynamic'"),
        ({"max_new_tokens": 2, "cache_implementation": "static"}, "CUDA graphs need a model on a GPU"),
    ):
        with pytest.raises(ValueError, match=message):
            model.generate(prompt[None], generation_config=GenerationConfig(**arguments))
    with pytest.raises(ValueError, match="past_key_values needs use_cache=True"):
        model.generate(prompt[None], max_new_tokens=2, use_cache=False, past_key_values=model.new_cache())
    with pytest.raises(ValueError, match="give either past_key_values or cache_implementation"):
        configuration = GenerationConfig(max_new_tokens=2, cache_implementation="dynamic")
        model.generate(prompt[None], generation_config=configuration, past_key_values=model.new_cache())
