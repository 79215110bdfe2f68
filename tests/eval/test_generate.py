"""Continuations: what generate() draws is what the model predicts; limits are errors that say what to change."""

import pytest
import torch

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from eval.generate import continue_prompt, main
from eval.loading import EvaluationError
from tests.conftest import tiny_baseline, tiny_dlcm
from tests.eval.conftest import Trained
from train.tokenizer import byte_tokenizer

BYTES = byte_tokenizer()
PROMPT = "Once"


def models() -> list[DLCMForCausalLM | LlamaBaselineForCausalLM]:
    return [build(vocab_size=len(BYTES), max_position_embeddings=64) for build in (tiny_dlcm, tiny_baseline)]


@pytest.mark.parametrize("model", models())
def test_greedy_continuation_is_the_argmax_of_every_step(model: DLCMForCausalLM | LlamaBaselineForCausalLM) -> None:
    ids = [BYTES.bos_token_id, *PROMPT.encode()]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    expected = BYTES.decode(ids[1 + len(PROMPT) :], skip_special_tokens=True)
    assert continue_prompt(model, BYTES, PROMPT, max_new_tokens=12, temperature=0) == expected


@pytest.mark.parametrize("model", models())
def test_the_seed_decides(model: DLCMForCausalLM | LlamaBaselineForCausalLM) -> None:
    said = [continue_prompt(model, BYTES, PROMPT, 20, temperature=1.0, top_p=1.0, seed=seed) for seed in (5, 5, 6)]
    assert said[0] == said[1] != said[2]


def test_a_small_top_p_is_greedy() -> None:
    model = models()[0]
    greedy = continue_prompt(model, BYTES, PROMPT, 12, temperature=0)
    assert continue_prompt(model, BYTES, PROMPT, 12, temperature=1.0, top_p=1e-6) == greedy


def test_sampling_is_not_cut_to_the_fifty_likeliest() -> None:
    model = models()[1]
    with torch.no_grad():
        model.lm_head.weight.zero_()  # all 258 tokens are equally likely
    said = continue_prompt(model, BYTES, "x", 62, temperature=1.0, top_p=1.0)
    unlikely = {token for token in BYTES(said)["input_ids"] if token >= 50}
    assert unlikely


def test_the_end_of_the_document_ends_it() -> None:
    model = models()[1]
    eos = BYTES.eos_token_id
    with torch.no_grad():
        model.decoder_norm.weight.zero_()[0] = 1.0
        model.lm_head.weight.zero_()
        model.lm_head.weight[eos, 0], model.lm_head.weight[eos - 1, 0] = 1.0, -1.0  # <eos>, or <bos> if h is negative
    said = continue_prompt(model, BYTES, PROMPT, 12, temperature=0)
    assert said == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"max_new_tokens": 60}, "5 tokens of prompt and max_new_tokens=60 .* 64 positions"),
        ({"max_new_tokens": 0}, "max_new_tokens=0"),
        ({"temperature": -0.1}, "temperature=-0.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"prompt": ""}, "empty"),
    ],
)
def test_impossible_requests(arguments: dict, message: str) -> None:
    with pytest.raises(EvaluationError, match=message):
        continue_prompt(models()[0], BYTES, **{"prompt": PROMPT} | arguments)


def test_longest_possible_request() -> None:
    assert isinstance(continue_prompt(models()[0], BYTES, PROMPT, max_new_tokens=59), str)


def test_command_prints_the_continuation(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    for run_dir in (trained.dlcm, trained.llama):
        arguments = [str(run_dir), "--prompt", "It was", "--max-new-tokens", "8", "--temperature", "0"]
        assert main(arguments) == 0
        first = capsys.readouterr().out
        assert main([*arguments, "--seed", "3"]) == 0
        assert capsys.readouterr().out == first != "\n"


def test_command_reports_errors(trained: Trained, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(trained.dlcm), "--prompt", "It was", "--max-new-tokens", "1000"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("error: ")
    assert "256 positions" in captured.err
