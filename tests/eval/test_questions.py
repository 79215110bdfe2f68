"""Accuracies, bits and perplexities are those of the table that the model was made of; the report comes from rows."""

import dataclasses
import json
import lzma
import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from eval import questions
from eval.loading import EvaluationError
from eval.questions import Answer, Question, TaskScores, main, mean_of, read_questions, row_of, score_task
from eval.scoring import Scorer
from tests.conftest import tiny_dlcm
from tests.eval.conftest import Trained
from tests.eval.toy import BYTES, bigram_model, log_likelihood, random_table, uniform_table

TABLE = random_table(3)
ROWS: list[dict[str, Any]] = [
    {"task": "choice", "context": "Question: 中文?\nAnswer:", "choices": [" one", " é", " three of"], "gold": 1},
    {"task": "choice", "context": "Another", "choices": [" a", " ab", " abc", " abcd"], "gold": 0},
    {"task": "choice", "context": "White space ", "choices": ["x", "yy"], "gold": 1},
    {"task": "two", "context": ["Sarah", "Maria"], "choices": [" won.", " won."], "gold": 1},
    {"task": "two", "context": ["", "It"], "choices": [" rained.", " rained."], "gold": 0},
    {"task": "last", "context": "He did not care about", "choices": [" signs"], "gold": 0},
    {"task": "last", "context": "They", "choices": [" é"], "gold": 0},
    {"task": "last", "context": "Then it", "choices": [" ended"], "gold": 0},
]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def nats(context: str, choice: str) -> float:
    """The slow twin of a score."""
    kept = context.rstrip()
    return log_likelihood(TABLE, [BYTES.bos_token_id, *kept.encode()][-1], (context[len(kept) :] + choice).encode())


def scored(tmp_path: Path, task: str) -> TaskScores:
    tasks = read_questions(write_rows(tmp_path / "questions.jsonl", ROWS))
    return score_task(Scorer(bigram_model(TABLE), BYTES), tasks[task], task)


def test_numbers_of_choices(tmp_path: Path) -> None:
    scores, rows = scored(tmp_path, "choice"), [row for row in ROWS if row["task"] == "choice"]
    right, by_byte, bits, num_bytes = [], [], 0.0, 0
    for row, answer in zip(rows, scores.answers, strict=True):
        values = [nats(row["context"], choice) for choice in row["choices"]]
        assert answer.log_likelihoods == pytest.approx(values, rel=1e-9)
        right.append(values.index(max(values)) == row["gold"])
        lengths = [len(choice.removeprefix(" ").encode()) for choice in row["choices"]]
        assert answer.choice_bytes == lengths
        per_byte = [value / length for value, length in zip(values, lengths, strict=True)]
        by_byte.append(per_byte.index(max(per_byte)) == row["gold"])
        bits -= values[row["gold"]] / math.log(2)
        num_bytes += len(row["choices"][row["gold"]].encode())
    num_bytes += 1  # the space at the end of the third context was scored, too
    row = row_of("model", "choice", scores)
    assert row["questions"] == 3 and row["chance"] == pytest.approx((1 / 3 + 1 / 4 + 1 / 2) / 3)
    assert row["accuracy"] == pytest.approx(sum(right) / 3) and row["normalised"] == pytest.approx(sum(by_byte) / 3)
    assert row["accuracy_error"] == pytest.approx(statistics.stdev(right) / math.sqrt(3))
    assert row["bits_per_byte"] == pytest.approx(bits / num_bytes, rel=1e-9)
    assert row["perplexity"] is None and row["cut"] == 0


def test_the_context_may_be_what_is_chosen(tmp_path: Path) -> None:
    scores = scored(tmp_path, "two")
    expected = [[nats("Sarah", " won."), nats("Maria", " won.")], [nats("", " rained."), nats("It", " rained.")]]
    for answer, values, gold in zip(scores.answers, expected, (1, 0), strict=True):
        assert answer.log_likelihoods == pytest.approx(values, rel=1e-9)
        assert answer.is_right == (values[gold] > values[1 - gold])


def test_perplexity_of_the_last_word(tmp_path: Path) -> None:
    scores, rows = scored(tmp_path, "last"), [row for row in ROWS if row["task"] == "last"]
    values = [-nats(row["context"], row["choices"][0]) for row in rows]
    row = row_of("model", "last", scores)
    assert row["perplexity"] == pytest.approx(math.exp(sum(values) / 3), rel=1e-9)
    error = statistics.stdev(values) / math.sqrt(3)
    assert row["perplexity_error"] == pytest.approx(row["perplexity"] * error, rel=1e-9)
    assert row["bits_per_byte"] == pytest.approx(sum(values) / math.log(2) / len(" signs é ended".encode()), rel=1e-9)
    assert row["chance"] == row["accuracy"] == row["normalised"] == 0


def test_one_choice_is_right_if_greedy_decoding_says_it() -> None:
    table = uniform_table()
    for last, token in zip(b"x yes", b" yes.", strict=True):
        table[last, token] = 1.0
    scorer = Scorer(bigram_model(table / table.sum(1, keepdim=True)), BYTES)
    asked = [Question((("x", " yes"),), 0), Question((("x", " yet"),), 0), Question((("x", " yes"), ("x", " no")), 1)]
    assert [answer.is_right for answer in score_task(scorer, asked, "task").answers] == [True, False, False]
    assert [answer.is_right_by_byte for answer in score_task(scorer, asked, "task").answers] == [True, False, False]


def test_uniform_probabilities_cost_the_same_bits_everywhere(tmp_path: Path) -> None:
    tasks = read_questions(write_rows(tmp_path / "questions.jsonl", ROWS))
    scorer = Scorer(bigram_model(uniform_table()), BYTES)
    for task, asked in tasks.items():
        row = row_of("model", task, score_task(scorer, asked, task))
        assert row["bits_per_byte"] == pytest.approx(math.log2(258), rel=1e-9)
        assert row["bits_per_byte_error"] == pytest.approx(0, abs=1e-9)


def test_contexts_that_are_cut_are_counted() -> None:
    scorer = Scorer(bigram_model(TABLE, positions=8), BYTES)
    asked = [Question((("a long context", " b"), ("short", " b")), 0), Question((("short", " b"),), 0)]
    found = score_task(scorer, asked, "task")
    assert row_of("model", "task", found)["cut"] == 1
    assert found.answers[0].log_likelihoods[0] == pytest.approx(log_likelihood(TABLE, ord("t"), b" b"))


def test_mean_is_that_of_the_rows() -> None:
    def answers(right: Sequence[bool]) -> TaskScores:
        return TaskScores(
            [Answer([-1.0, -2.0], [1, 1], int(not is_right), 2, False, False) for is_right in right], 1.0, "cpu"
        )

    rows = [row_of("model", "a", answers([True, True, False])), row_of("model", "b", answers([False]))]
    mean = mean_of(rows)
    assert mean["accuracy"] == pytest.approx((2 / 3 + 0) / 2) and mean["tasks"] == 2
    assert mean["accuracy_error"] is None  # of one question nobody knows
    mean = mean_of([rows[0], rows[0]])
    assert mean["accuracy_error"] == pytest.approx(rows[0]["accuracy_error"] / math.sqrt(2))


def test_check_counts_what_fp32_decides_otherwise(tmp_path: Path) -> None:
    model = tiny_dlcm(vocab_size=len(BYTES)).float()
    exact, rough = Scorer(model, BYTES), Scorer(model, BYTES, dtype="bfloat16")
    asked = read_questions(write_rows(tmp_path / "questions.jsonl", ROWS))["choice"]
    check = score_task(exact, asked, "task", exact).check
    assert check is not None and (check.boundaries, check.answers) == (0, 0)
    assert check.tokens == sum(
        1 + len((q["context"] + c).rstrip().encode()) - 1 for q in ROWS[:3] for c in q["choices"]
    )
    check = score_task(rough, asked, "task", exact).check
    ids = [torch.tensor([[BYTES.bos_token_id, *(c + x).encode()][:-1]]) for q in asked for c, x in q.pairs]
    with torch.no_grad():
        precise = [model(input_ids=x).boundaries for x in ids]
        with torch.autocast("cpu", torch.bfloat16):
            flips = sum(int((model(input_ids=x).boundaries != y).sum()) for x, y in zip(ids, precise, strict=True))
    assert check is not None and check.boundaries == flips


# The command


def run(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_command_compares_and_resumes(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "questions.jsonl.xz"
    file.write_bytes(lzma.compress(write_rows(tmp_path / "plain.jsonl", ROWS).read_bytes()))
    output = tmp_path / "output"
    arguments = [trained.dlcm, trained.llama, "--questions", file, "--output", output]
    code, out, err = run(arguments, capsys)
    assert (code, err) == (0, "")
    report = json.loads((output / "questions.json").read_text())
    assert out.startswith((output / "questions.md").read_text().split("\n\nMachine")[0])

    by_name = {"dlcm": report["rows"][:3], "llama": report["rows"][3:]}
    assert report["checkpoints"] == {"dlcm": str(trained.dlcm), "llama": str(trained.llama)}
    for (name, rows), mean, speed in zip(by_name.items(), report["means"], report["speed"], strict=True):
        assert [row["task"] for row in rows] == ["choice", "two", "last"]
        assert {row["checkpoint"] for row in rows} == {name} == {mean["checkpoint"]}
        assert mean["bits_per_byte"] == pytest.approx(statistics.mean(row["bits_per_byte"] for row in rows))
        assert speed["questions"] == 8 and speed["device"] == "cpu"
        assert speed["questions_per_second"] == pytest.approx(8 / sum(row["seconds"] for row in rows))
    *of_tasks, of_mean = report["differences"]
    for row, ours, theirs in zip(of_tasks, *by_name.values(), strict=True):
        difference = row["bits_per_byte"]
        assert difference["value"] == pytest.approx(ours["bits_per_byte"] - theirs["bits_per_byte"])
        assert difference["low"] <= difference["value"] <= difference["high"]
    assert of_mean["task"] == "mean"
    assert of_mean["accuracy"]["value"] == pytest.approx(
        report["means"][0]["accuracy"] - report["means"][1]["accuracy"]
    )

    def not_again(*_: object) -> None:
        raise AssertionError("was scored before")

    monkeypatch.setattr(questions, "load_checkpoint", not_again)
    assert run(arguments, capsys)[:2] == (0, out)
    code, out, _ = run([*arguments, "--tasks", "last", "two"], capsys)
    assert code == 0 and "| two |" in out and "| choice |" not in out
    for changed in (["--limit", 1], ["--dtype", "bfloat16"]):
        with pytest.raises(AssertionError, match="scored before"):
            run([*arguments, *changed], capsys)
    write_rows(tmp_path / "plain.jsonl", [row | {"gold": 0} for row in ROWS])
    with pytest.raises(AssertionError, match="scored before"):  # other questions
        run([trained.dlcm, "--questions", tmp_path / "plain.jsonl", "--output", output], capsys)

    kept = next((output / "scores").glob("two-*.json"))
    kept.write_text("{}")
    code, _, err = run(arguments, capsys)
    assert code == 2 and f"{kept}: holds no scores" in err and err.count("\n") == 1


def test_command_limits_and_checks(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "questions.jsonl", ROWS)
    arguments = [trained.dlcm, "--questions", file, "--output", tmp_path, "--limit", 2, "--tasks", "choice"]
    code, out, _ = run([*arguments, "--dtype", "bfloat16", "--check"], capsys)
    assert code == 0 and "In fp32 boundaries differ at " in out and "bfloat16." in out
    (row,) = json.loads((tmp_path / "questions.json").read_text())["rows"]
    assert row["questions"] == 2 and set(row["check"]) == {"tokens", "boundaries", "answers"}
    assert json.loads((tmp_path / "questions.json").read_text())["differences"] == []


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("not json", "must be JSON of the form"),
        ('["task"]', "must be JSON of the form"),
        ('{"task": "a", "context": "b", "choices": ["c"]}', "must be JSON of the form"),
        ({"task": 1}, "'task' is no text"),
        ({"context": 1}, "'context' is no text"),
        ({"context": "\ud800"}, "'context' is no text"),
        ({"choices": "abc"}, "'choices' is no list of texts"),
        ({"choices": [1, 2]}, "'choices' is no list of texts"),
        ({"context": ["a"], "choices": ["b", "c"]}, "1 contexts for 2 choices"),
        ({"choices": [" a", ""]}, "choice 1 is empty"),
        ({"choices": [" "]}, "choice 0 is empty"),
        ({"choices": []}, "'gold' is 0, and there are 0 choices"),
        ({"gold": 2}, "'gold' is 2, and there are 2 choices"),
        ({"gold": True}, "'gold' is True"),
        ({"gold": "0"}, "'gold' is '0'"),
    ],
)
def test_bad_questions_are_named(line: str | dict[str, Any], message: str, tmp_path: Path) -> None:
    good = {"task": "a", "context": "b", "choices": [" c", " d"], "gold": 0}
    file = tmp_path / "questions.jsonl"
    bad = line if isinstance(line, str) else json.dumps(good | line)
    file.write_text(json.dumps(good) + "\n" + bad + "\n", encoding="utf-8")
    with pytest.raises(EvaluationError, match=f"questions.jsonl: line 2: .*{message}"):
        read_questions(file)


def test_bad_requests_are_one_line(trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write_rows(tmp_path / "questions.jsonl", ROWS)
    empty, text, long = tmp_path / "empty.jsonl", tmp_path / "notes.txt", tmp_path / "long.jsonl"
    empty.write_text("")
    text.write_text("some notes")
    write_rows(long, [{"task": "a", "context": "b", "choices": ["c" * 300], "gold": 0}])
    for arguments, message in (
        ([trained.dlcm, "--questions", empty], "holds no question"),
        ([trained.dlcm, "--questions", text], "give a .jsonl file"),
        ([trained.dlcm, "--questions", tmp_path / "none.jsonl"], "no such file"),
        (
            [trained.dlcm, "--questions", file, "--tasks", "two", "other"],
            "no task 'other' in the questions (there is choice,",
        ),
        ([trained.dlcm, "--questions", file, "--limit", 0], "must be at least 1"),
        ([trained.dlcm, "--questions", file, "--check"], "give it with --dtype bfloat16"),
        ([trained.dlcm, "--questions", file, "--batch-tokens", 0], "batch_tokens=0"),
        ([tmp_path / "nowhere", "--questions", file], "no such directory"),
        ([trained.dlcm, "--questions", long], "300 tokens, the model 256 positions"),
    ):
        code, out, err = run([*arguments, "--output", tmp_path / "output"], capsys)
        assert (code, out) == (2, "")
        assert err.startswith("error: ") and err.count("\n") == 1 and message in err


def test_rows_survive_json() -> None:
    answer = Answer([-1.5, -2.25], [3, 4], 1, 5, True, False)
    assert Answer(**json.loads(json.dumps(dataclasses.asdict(answer)))) == answer
