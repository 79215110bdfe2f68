"""Through lm-eval a model says what it says to `eval.scoring`, to lm-eval's own adapter, and to `generate`."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from eval.loading import EvaluationError, checkpoint_directory, load_checkpoint
from eval.questions import Question, score_task
from eval.scoring import Scorer
from tests.eval.conftest import Trained
from tests.eval.tasks import CHOICE, GENERATION, QUESTIONS, ROLLING, WORD, write_tasks
from tests.eval.toy import BYTES, bigram_model, random_table
from train.tokenizer import byte_tokenizer

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed (pip install dlcm[benchmarks])")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from eval.harness import HarnessModel  # noqa: E402

PAIRS = [(row["context"], f" {choice}") for row in QUESTIONS for choice in row["choices"]]
CONTEXTS = [row["context"] for row in QUESTIONS if row["context"]]
OPTIONS = {"until": ["e", "\n"], "max_gen_toks": 12, "do_sample": False}


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"), CHOICE, WORD, ROLLING, GENERATION)


def ask(kind: str, arguments: Sequence[tuple]) -> list[Instance]:
    return [Instance(kind, doc={}, arguments=of, idx=0) for of in arguments]


def run(model: Any, directory: Path, *tasks: str) -> dict[str, Any]:
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    return lm_eval.simple_evaluate(model=model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_OFFLINE", True)
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)  # seconds of asking for versions


@pytest.mark.parametrize("architecture", ["dlcm", "llama"])
def test_batch_size_and_padding_side_change_nothing(trained: Trained, architecture: str) -> None:
    loaded = load_checkpoint(getattr(trained, architecture))
    answers = []
    for batch_size, side in itertools.product((1, 3, 16), ("left", "right")):
        tokenizer = byte_tokenizer()
        tokenizer.padding_side = side
        model = HarnessModel(loaded.model, tokenizer, batch_size)
        scores = model.loglikelihood(ask("loglikelihood", PAIRS))
        rolling = model.loglikelihood_rolling(ask("loglikelihood_rolling", [(context,) for context in CONTEXTS]))
        texts = model.generate_until(ask("generate_until", [(context, OPTIONS) for context in CONTEXTS]))
        answers.append(([score for score, _ in scores], [greedy for _, greedy in scores], rolling, texts))
    scores, greedy, rolling, texts = answers[0]
    assert len(set(texts)) > 1
    for other in answers[1:]:
        assert other[0] == pytest.approx(scores, abs=1e-4)
        assert other[2] == pytest.approx(rolling, abs=1e-3)
        assert (other[1], other[3]) == (greedy, texts)


@pytest.mark.parametrize("architecture", ["dlcm", "llama"])
def test_the_hf_model_of_lm_eval_gives_the_same_numbers(trained: Trained, architecture: str, directory: Path) -> None:
    """As by `lm_eval --model hf --model_args pretrained=...,add_bos_token=True` where dlcm was imported."""
    pytest.importorskip("accelerate", reason="lm-eval's hf model needs accelerate")
    from lm_eval.models.huggingface import HFLM

    checkpoint = str(checkpoint_directory(getattr(trained, architecture)))
    arguments: dict[str, Any] = {"pretrained": checkpoint, "device": "cpu", "dtype": "float32", "batch_size": 3}
    model = HarnessModel.from_checkpoint(checkpoint)
    for tasks, hf in (
        (["local_choice", "local_word", "local_generation"], HFLM(add_bos_token=True, **arguments)),
        (["local_rolling"], HFLM(**arguments)),
    ):
        ours, theirs = run(model, directory, *tasks), run(hf, directory, *tasks)
        for task in tasks:
            for mine, other in zip(ours["samples"][task], theirs["samples"][task], strict=True):
                assert flat(mine["resps"]) == pytest.approx(flat(other["resps"]), abs=1e-3)
            assert numbers(ours["results"][task]) == pytest.approx(numbers(theirs["results"][task]), rel=1e-4)
    assert ours["results"]["local_rolling"]["bits_per_byte,none"] > 1


def numbers(metrics: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if isinstance(value, int | float)}


def flat(values: Any) -> list[Any]:
    """What is in nested lists and tuples: text as it is, and numbers."""
    return [x for value in values for x in flat(value)] if isinstance(values, list | tuple) else [values]


def test_question_files_and_tasks_give_the_same_numbers(trained: Trained, directory: Path) -> None:
    loaded = load_checkpoint(trained.dlcm)
    answer = run(HarnessModel(loaded.model, loaded.tokenizer), directory, "local_choice", "local_word")
    asked = [
        Question(tuple((row["context"], f" {choice}") for choice in row["choices"]), row["gold"]) for row in QUESTIONS
    ]
    scores = score_task(Scorer(loaded.model, loaded.tokenizer), asked, "task")
    for sample, found in zip(answer["samples"]["local_choice"], scores.answers, strict=True):
        values = [value for value, _ in sample["filtered_resps"]]
        assert found.log_likelihoods == pytest.approx(values, abs=1e-4)
        assert (found.is_right, found.is_right_by_byte) == (sample["acc"], sample["acc_bytes"])
    results = answer["results"]["local_choice"]
    assert scores.accuracy().value == pytest.approx(results["acc,none"])
    assert scores.normalised().value == pytest.approx(results["acc_bytes,none"])

    asked = [Question(((row["context"], f" {row['choices'][0]}"),), 0) for row in QUESTIONS]
    scores = score_task(Scorer(loaded.model, loaded.tokenizer), asked, "task")
    results, perplexity = answer["results"]["local_word"], scores.perplexity()
    assert perplexity is not None and perplexity[0] == pytest.approx(results["perplexity,none"], rel=1e-4)
    assert scores.accuracy().value == pytest.approx(results["acc,none"])


def test_standard_errors_are_lm_evals(directory: Path) -> None:
    scorer = bigram_model(random_table(), positions=512)
    manager = TaskManager(include_path=str(directory), include_defaults=False)
    tasks = ["local_choice"]
    answer = lm_eval.simple_evaluate(HarnessModel(scorer, BYTES), tasks=tasks, task_manager=manager, bootstrap_iters=10)
    asked = [
        Question(tuple((row["context"], f" {choice}") for choice in row["choices"]), row["gold"]) for row in QUESTIONS
    ]
    scores = score_task(Scorer(scorer, BYTES), asked, "task")
    assert scores.accuracy().error == pytest.approx(answer["results"]["local_choice"]["acc_stderr,none"], rel=1e-9)


# Generation


def test_generation_is_that_of_the_model_up_to_the_first_stop(trained: Trained) -> None:
    """The slow twin: the likeliest token after the whole text, again and again."""
    loaded = load_checkpoint(trained.dlcm)
    model = HarnessModel(loaded.model, loaded.tokenizer)
    (whole,) = model.generate_until(ask("generate_until", [("It was", {"until": [], "max_gen_toks": 12})]))
    ids = [BYTES.bos_token_id, *b"It was"]
    for _ in range(12):
        with torch.no_grad():
            ids.append(int(loaded.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
    assert whole == BYTES.decode(ids[7:])
    stop = whole[4:6]
    options = {"until": ["not there", stop], "max_gen_toks": 12}
    (cut,) = model.generate_until(ask("generate_until", [("It was", options)]))
    assert cut == whole[: whole.index(stop)]
    (none,) = model.generate_until(ask("generate_until", [("It was", options | {"until": whole[0]})]))
    assert none == ""


def test_generation_stops_early(trained: Trained, monkeypatch: pytest.MonkeyPatch) -> None:
    loaded = load_checkpoint(trained.dlcm)
    model = HarnessModel(loaded.model, loaded.tokenizer)
    (whole,) = model.generate_until(ask("generate_until", [("It was", {"until": [], "max_gen_toks": 40})]))
    steps: list[int] = []
    loaded.model.register_forward_hook(lambda module, args, output: steps.append(1))
    model.generate_until(ask("generate_until", [("It was", {"until": [whole[3]], "max_gen_toks": 40})]))
    assert len(steps) <= 4


def test_options_are_kept_apart_and_answers_in_order(trained: Trained) -> None:
    loaded = load_checkpoint(trained.dlcm)
    model = HarnessModel(loaded.model, loaded.tokenizer)
    asked = [(context, {"until": [], "max_gen_toks": length}) for context in CONTEXTS for length in (3, 7)]
    together = model.generate_until(ask("generate_until", asked))
    assert together == [model.generate_until(ask("generate_until", [one]))[0] for one in asked]


def test_sampling_is_sampling(trained: Trained) -> None:
    loaded = load_checkpoint(trained.dlcm)
    model = HarnessModel(loaded.model, loaded.tokenizer)
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_k": 0}
    torch.manual_seed(0)
    first, second = model.generate_until(ask("generate_until", [("It was", options), ("It was", options)]))
    assert first != second


def test_errors_are_one_line(trained: Trained) -> None:
    loaded = load_checkpoint(trained.dlcm)
    with pytest.raises(EvaluationError, match=r"max_gen_toks=256 must be .* the model has 256"):
        HarnessModel(loaded.model, loaded.tokenizer).generate_until(ask("generate_until", [("a", {"until": []})]))
    small = AutoModelForCausalLM.from_config(
        loaded.model.config.__class__(**loaded.model.config.to_diff_dict() | {"vocab_size": 100})
    )
    with pytest.raises(EvaluationError, match="has 258 ids and the model a vocabulary of 100"):
        HarnessModel(small.eval(), loaded.tokenizer)
