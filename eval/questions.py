"""Scores checkpoints on a file of questions, offline: accuracy, bits per byte of the right answers, and differences.

    python -m eval.questions RUN_DLCM RUN_LLAMA --questions eval.jsonl.xz [--tasks piqa lambada] [--limit 100]
    python -m eval.questions CHECKPOINT --questions eval.jsonl.xz --dtype bfloat16 --check

A line of the file is {"task": ..., "context": ..., "choices": [...], "gold": 0}; the context may be a list of one for
each choice. The choice that is likeliest after its context is the answer. Where there is one choice, as in LAMBADA, it
counts as right if greedy decoding would say it.

    chance              of guessing; 0 where there is one choice
    normalised          the answer is the choice likeliest per byte, without the one space that may come before it
                        (lm-eval's acc_bytes; its acc_norm counts characters)
    bits per byte       of the right choices: of all their bits, over all their bytes
    perplexity          of the right choices, where there is one choice each

All of it is computed from the rows in OUTPUT/scores, one file a task: a task that was scored before, with the same
checkpoint, questions and dtype, is read from there. Writes OUTPUT/questions.json and .md, and prints the latter.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.bench import Row, markdown_table
from eval.loading import EvaluationError, checkpoint_directory, load_checkpoint, report_errors
from eval.report import labels_of, publish, with_error, with_interval
from eval.scoring import BATCH_TOKENS, DTYPES, Dtype, Request, Score, Scorer
from eval.uncertainty import Ratio, mean_error, mean_paired_difference, paired_difference
from train.checkpoint import CHECKSUMS, tensor_files
from train.documents import open_sources

IDENTITY_FILES = ("config.json", "tokenizer.json")  # what scores depend on, besides the model's tensors
MEAN = "mean"  # what the last row of a table is called


@dataclass(frozen=True, slots=True)
class Question:
    """Pairs of context and choice, and which of them is right."""

    pairs: tuple[tuple[str, str], ...]
    gold: int


@dataclass(frozen=True, slots=True)
class Answer:
    """What a checkpoint says about a question.

    Attributes:
        log_likelihoods: of each choice, in nats.
        choice_bytes: of each choice, without a space before it.
        gold: index of the right choice.
        gold_bytes: of what was scored as the right choice.
        gold_is_greedy: whether greedy decoding would say it.
        is_cut: whether a context did not fit.
    """

    log_likelihoods: list[float]
    choice_bytes: list[int]
    gold: int
    gold_bytes: int
    gold_is_greedy: bool
    is_cut: bool

    @property
    def has_choice(self) -> bool:
        return len(self.log_likelihoods) > 1

    @property
    def chance(self) -> float:
        return 1 / len(self.log_likelihoods) if self.has_choice else 0.0

    @property
    def gold_nats(self) -> float:
        return -self.log_likelihoods[self.gold]

    @property
    def is_right(self) -> bool:
        return self._is_right(self.log_likelihoods)

    @property
    def is_right_by_byte(self) -> bool:
        return self._is_right(np.divide(self.log_likelihoods, self.choice_bytes))

    def _is_right(self, values: Sequence[float] | np.ndarray) -> bool:
        return int(np.argmax(values)) == self.gold if self.has_choice else self.gold_is_greedy


@dataclass(frozen=True, slots=True)
class Check:
    """What fp32 decides otherwise: boundaries, of so many tokens, and whether answers are right."""

    tokens: int
    boundaries: int
    answers: int


@dataclass(frozen=True, slots=True)
class TaskScores:
    """Answers to all questions of a task, the seconds from text to scores, and on what device."""

    answers: list[Answer]
    seconds: float
    device: str
    check: Check | None = None

    def accuracy(self) -> Ratio:
        return Ratio.mean([answer.is_right for answer in self.answers])

    def normalised(self) -> Ratio:
        return Ratio.mean([answer.is_right_by_byte for answer in self.answers])

    def bits_per_byte(self) -> Ratio:
        bits = [answer.gold_nats / math.log(2) for answer in self.answers]
        return Ratio.of(bits, [answer.gold_bytes for answer in self.answers])

    def perplexity(self) -> tuple[float, float | None] | None:
        """Of the right choices where there is one each, with its standard error; None elsewhere."""
        if any(answer.has_choice for answer in self.answers):
            return None
        nats = Ratio.mean([answer.gold_nats for answer in self.answers])
        perplexity = math.exp(nats.value)
        return perplexity, None if nats.error is None else perplexity * nats.error


CHECKED = tuple(field.name for field in dataclasses.fields(Check))
METRICS: dict[str, Callable[[TaskScores], Ratio]] = {
    "accuracy": TaskScores.accuracy,
    "normalised": TaskScores.normalised,
    "bits_per_byte": TaskScores.bits_per_byte,
}


# Questions


def read_questions(path: Path) -> dict[str, list[Question]]:
    """Questions by task, both in the order of the file.

    Raises:
        EvaluationError: a line is no question, which it names, or there is none.
        DataError: the file cannot be read.
    """
    (source,) = open_sources([str(path)])
    tasks: dict[str, list[Question]] = {}
    for where, line in source.rows("context"):
        if not isinstance(line, bytes):
            raise EvaluationError(f"{path}: questions are JSON lines; give a .jsonl file, or .jsonl.xz, .gz or .zst")
        try:
            row = json.loads(line)
            task, contexts, choices, gold = (row[key] for key in ("task", "context", "choices", "gold"))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise EvaluationError(
                f'{where}: must be JSON of the form {{"task": ..., "context": ..., "choices": [...], "gold": 0}}'
            ) from error
        if isinstance(contexts, str) and isinstance(choices, list):
            contexts = [contexts] * len(choices)
        problem = _problem(task, contexts, choices, gold)
        if problem is not None:
            raise EvaluationError(f"{where}: {problem}; correct the question, or leave it out")
        tasks.setdefault(task, []).append(Question(tuple(zip(contexts, choices, strict=True)), gold))
    if not tasks:
        raise EvaluationError(f"{path}: holds no question")
    return tasks


def _problem(task: Any, contexts: Any, choices: Any, gold: Any) -> str | None:
    if not isinstance(task, str):
        return "'task' is no text"
    if not _are_texts(choices):
        return "'choices' is no list of texts"
    if not _are_texts(contexts):
        return "'context' is no text, and no list of texts"
    if len(contexts) != len(choices):
        return f"{len(contexts)} contexts for {len(choices)} choices"
    if not all(_without_space(choice) for choice in choices):
        return f"choice {next(number for number, choice in enumerate(choices) if not _without_space(choice))} is empty"
    if type(gold) is not int or not 0 <= gold < len(choices):
        return f"'gold' is {gold!r}, and there are {len(choices)} choices"
    return None


def _are_texts(values: Any) -> bool:
    if not isinstance(values, list) or not all(isinstance(value, str) for value in values):
        return False
    try:
        "".join(values).encode()
    except UnicodeEncodeError:  # half of a surrogate pair
        return False
    return True


def _without_space(choice: str) -> str:
    return choice.removeprefix(" ")


def selected(
    tasks: Mapping[str, list[Question]], names: Sequence[str] | None, limit: int | None
) -> dict[str, list[Question]]:
    """The first `limit` questions of the tasks with these names; None is all.

    Raises:
        EvaluationError: there is no such task, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise EvaluationError(f"--limit {limit}: must be at least 1")
    for name in names or ():
        if name not in tasks:
            raise EvaluationError(f"--tasks: no task '{name}' in the questions (there is {', '.join(tasks)})")
    return {name: questions[:limit] for name, questions in tasks.items() if names is None or name in names}


# Scores


def score_task(scorer: Scorer, questions: Sequence[Question], name: str, reference: Scorer | None = None) -> TaskScores:
    """Scores all choices.

    Args:
        scorer: what says how likely they are.
        questions: at least one.
        name: shown beside the progress.
        reference: scores them, too, and differences are counted.
    """
    started = time.perf_counter()
    requests = scorer.pairs([pair for question in questions for pair in question.pairs])
    scores = scorer.score(requests, name)
    seconds = time.perf_counter() - started
    answers = _answers(questions, requests, scores)
    check = None
    if reference is not None:
        expected = reference.score(requests, f"{name}, fp32")
        pairs = zip(scores, expected, strict=True)
        check = Check(
            tokens=sum(score.tokens for score in scores),
            boundaries=sum(int((ours.boundaries_T != theirs.boundaries_T).sum()) for ours, theirs in pairs),
            answers=sum(
                ours.is_right != theirs.is_right
                for ours, theirs in zip(answers, _answers(questions, requests, expected), strict=True)
            ),
        )
    return TaskScores(answers, seconds, _device_name(scorer.model.device), check)


def _answers(questions: Sequence[Question], requests: Sequence[Request], scores: Sequence[Score]) -> list[Answer]:
    scored, answers = iter(zip(requests, scores, strict=True)), []
    for question in questions:
        of_question = [next(scored) for _ in question.pairs]
        gold_request, gold_score = of_question[question.gold]
        answers.append(
            Answer(
                log_likelihoods=[score.log_likelihood for _, score in of_question],
                choice_bytes=[len(_without_space(choice).encode()) for _, choice in question.pairs],
                gold=question.gold,
                gold_bytes=gold_request.num_bytes,
                gold_is_greedy=gold_score.is_greedy,
                is_cut=any(score.is_cut for _, score in of_question),
            )
        )
    return answers


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class ScoredCheckpoint:
    """A checkpoint that is opened where there is something to score.

    Args:
        path: a run directory or a checkpoint.
        directory: where scores are kept.
        dtype, batch_tokens: see `Scorer`.
        check: whether to count what fp32 decides otherwise.
    """

    def __init__(self, path: Path, directory: Path, dtype: Dtype, batch_tokens: int, check: bool):
        self.path, self.directory = checkpoint_directory(path), directory
        self.dtype, self.batch_tokens, self.check = dtype, batch_tokens, check
        checksums = json.loads((self.path / CHECKSUMS).read_text(encoding="utf-8"))
        names = (*tensor_files(self.path, "model"), *IDENTITY_FILES)
        self._identity = [checksums.get(name) for name in names]
        self._scorers: tuple[Scorer, Scorer | None] | None = None

    def scores(self, task: str, questions: Sequence[Question]) -> TaskScores:
        """Scores of a task, read or made."""
        key = [*self._identity, self.dtype, self.check, [dataclasses.astuple(question) for question in questions]]
        digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
        file = self.directory / f"{re.sub(r'[^A-Za-z0-9_-]', '_', task)}-{digest[:16]}.json"
        if file.exists():
            return _read(file)
        if self._scorers is None:
            self._scorers = self._open()
        found = score_task(self._scorers[0], questions, task, self._scorers[1])
        self.directory.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(".tmp")
        partial.write_text(json.dumps(dataclasses.asdict(found)), encoding="utf-8")
        partial.replace(file)  # so that a file that is there is whole
        return found

    def _open(self) -> tuple[Scorer, Scorer | None]:
        loaded = load_checkpoint(self.path)
        scorer = Scorer(loaded.model, loaded.tokenizer, self.dtype, self.batch_tokens)
        return scorer, Scorer(loaded.model, loaded.tokenizer, "float32", self.batch_tokens) if self.check else None


def _read(file: Path) -> TaskScores:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        answers, check = [Answer(**answer) for answer in content["answers"]], content["check"]
        return TaskScores(answers, content["seconds"], content["device"], None if check is None else Check(**check))
    except (ValueError, TypeError, KeyError) as error:
        raise EvaluationError(f"{file}: holds no scores, or another version's; delete it to score anew") from error


# Numbers


def row_of(checkpoint: str, task: str, scores: TaskScores) -> Row:
    row: Row = {"checkpoint": checkpoint, "task": task, "questions": len(scores.answers)}
    row["chance"] = float(np.mean([answer.chance for answer in scores.answers]))
    for name, metric in METRICS.items():
        ratio = metric(scores)
        row |= {name: ratio.value, f"{name}_error": ratio.error}
    row["perplexity"], row["perplexity_error"] = scores.perplexity() or (None, None)
    row |= {"cut": sum(answer.is_cut for answer in scores.answers), "seconds": scores.seconds}
    return row | {"device": scores.device, "check": None if scores.check is None else dataclasses.asdict(scores.check)}


def mean_of(rows: Sequence[Row]) -> Row:
    """The mean over tasks, each counting alike."""
    mean: Row = {"checkpoint": rows[0]["checkpoint"], "tasks": len(rows)}
    mean |= {name: float(np.mean([row[name] for row in rows])) for name in ("chance", *METRICS)}
    return mean | {f"{name}_error": mean_error([row[f"{name}_error"] for row in rows]) for name in METRICS}


def speed_of(rows: Sequence[Row]) -> Row:
    """How fast all tasks of a checkpoint were scored."""
    questions, seconds = (sum(row[name] for row in rows) for name in ("questions", "seconds"))
    speed: Row = {"checkpoint": rows[0]["checkpoint"], "questions": questions, "seconds": seconds}
    speed["questions_per_second"] = questions / seconds
    return speed | {"device": ", ".join(dict.fromkeys(row["device"] for row in rows))}


def differences_of(ours: Mapping[str, TaskScores], theirs: Mapping[str, TaskScores]) -> list[Row]:
    """Paired differences, ours less theirs: a row for each task, and the last one for the mean over tasks."""
    rows: list[Row] = [{"task": task} for task in [*ours, MEAN]]
    for name, metric in METRICS.items():
        pairs = [(metric(ours[task]), metric(theirs[task])) for task in ours]
        found = [paired_difference(*pair, name=task) for task, pair in zip(ours, pairs, strict=True)]
        found.append(mean_paired_difference(pairs, list(ours)))
        for row, difference in zip(rows, found, strict=True):
            row[name] = dataclasses.asdict(difference)
    return rows


# Report


def scores_table(rows: Sequence[Row]) -> str:
    """Rows of a checkpoint, and their mean, in markdown."""
    header = ("task", "questions", "chance, %", "accuracy, %", "normalised, %", "bits per byte", "perplexity")
    return markdown_table(
        header,
        (
            (
                row.get("task", MEAN),
                f"{row['questions']:,}" if "questions" in row else None,
                f"{100 * row['chance']:.1f}",
                *(with_error(row[name], row[f"{name}_error"], 1, 100) for name in ("accuracy", "normalised")),
                with_error(row["bits_per_byte"], row["bits_per_byte_error"], 3),
                with_error(row.get("perplexity"), row.get("perplexity_error"), 2),
            )
            for row in [*rows, mean_of(rows)]
        ),
    )


def differences_table(rows: Sequence[Row]) -> str:
    header = ("task", "accuracy, points", "normalised, points", "bits per byte")
    digits_and_scale = {"accuracy": (1, 100), "normalised": (1, 100), "bits_per_byte": (3, 1)}
    return markdown_table(
        header,
        (
            (row["task"], *(with_interval(row[name], *shown) for name, shown in digits_and_scale.items()))
            for row in rows
        ),
    )


def speed_line(rows: Sequence[Row], dtype: Dtype) -> str:
    speed = "{questions:,} questions in {seconds:,.1f} s, {questions_per_second:,.0f} a second, on {device}"
    sentences = [f"{speed.format(**speed_of(rows))}, {dtype}."]
    if cut := sum(row["cut"] for row in rows):
        sentences.append(f"Of {cut:,} questions the context was longer than the model's positions and was cut.")
    if checks := [row["check"] for row in rows if row["check"]]:
        tokens, boundaries, answers = (sum(check[name] for check in checks) for name in CHECKED)
        sentences.append(f"In fp32 boundaries differ at {boundaries:,} of {tokens:,} tokens, and {answers:,} answers.")
    return " ".join(sentences)


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    paths = labels_of(options.checkpoints)
    if options.check and options.dtype == "float32":
        raise EvaluationError("--check compares with fp32; give it with --dtype bfloat16")
    tasks = selected(read_questions(options.questions), options.tasks, options.limit)
    output = options.output or options.checkpoints[0].parent / "questions"

    scores: dict[str, dict[str, TaskScores]] = {}
    for name, path in paths.items():
        checkpoint = ScoredCheckpoint(path, output / "scores", options.dtype, options.batch_tokens, options.check)
        scores[name] = {task: checkpoint.scores(task, questions) for task, questions in tasks.items()}

    rows = {name: [row_of(name, task, found) for task, found in of.items()] for name, of in scores.items()}
    first, *others = scores
    differences = {other: differences_of(scores[first], scores[other]) for other in others}
    parts = ["# Questions"]
    for name in scores:
        parts += [f"## {name}", scores_table(rows[name]), speed_line(rows[name], options.dtype)]
    for other in others:
        parts += [f"## {first} less {other}", differences_table(differences[other])]
    publish(
        output,
        "questions",
        parts,
        questions=str(options.questions),
        checkpoints={name: str(path) for name, path in paths.items()},
        dtype=options.dtype,
        limit=options.limit,
        rows=[row for of in rows.values() for row in of],
        means=[mean_of(of) for of in rows.values()],
        speed=[speed_of(of) for of in rows.values()],
        differences=[{"ours": first, "theirs": other, **row} for other in others for row in differences[other]],
    )


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.questions", description="Scores checkpoints on questions.")
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="run directories or checkpoints"
    )
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="JSON lines (.xz, .gz, .zst)")
    parser.add_argument("--tasks", nargs="+", metavar="TASK", help="these alone")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task")
    parser.add_argument("--output", type=Path, help="where to write (default: `questions` beside the first CHECKPOINT)")
    parser.add_argument(
        "--dtype", choices=DTYPES, default="float32", help="bfloat16 is autocast (default: %(default)s)"
    )
    parser.add_argument("--check", action="store_true", help="with bfloat16: count what fp32 decides otherwise")
    parser.add_argument("--batch-tokens", type=int, default=BATCH_TOKENS, help="read at a time (default: %(default)s)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
