"""How fast checkpoints are scored on questions, and whether scores depend on anything but the question.

    python -m eval.bench_questions RUN_DLCM RUN_LLAMA --questions eval.jsonl.xz [--output docs/results]

All questions are scored in bf16, from text to scores, and that is timed. The first of each task are also scored in
fp32, and what this decides otherwise is counted: boundaries near their threshold, and answers. Of these the first are
scored in fp32 in batches of 1, 3 and 16, and their log-likelihoods compared.

Writes evaluation.json and evaluation.md, after every checkpoint.
"""

import argparse
import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from eval.bench import Bar, Row, bars_table, markdown_table, record, record_lines, tell, worst, write_json
from eval.loading import LoadedCheckpoint, load_checkpoint, report_errors
from eval.questions import Question, read_questions, score_task, selected
from eval.report import labels_of
from eval.scoring import Scorer

MOST_SECONDS, MOST_DIFFERENCE = 180.0, 1e-4
BATCHES = (1, 3, 16)
CHECKED = 500  # questions of each task, in fp32, whose attention goes document by document
COMPARED = 16  # of these, in batches
WARM_UP = 32


def measure(path: Path, tasks: Mapping[str, Sequence[Question]]) -> Row:
    """Seconds of all questions, and what differs."""
    loaded = load_checkpoint(path)
    scorer, wide = Scorer(loaded.model, loaded.tokenizer, "bfloat16"), Scorer(loaded.model, loaded.tokenizer, "float32")
    for name, of in tasks.items():  # kernels are compiled, and memory is found
        score_task(scorer, of[:WARM_UP], name)
    found = [score_task(scorer, of, name) for name, of in tasks.items()]
    questions, seconds = sum(len(of.answers) for of in found), sum(of.seconds for of in found)
    tell({"checkpoint": path, "questions": questions, "seconds": seconds})
    checked = [score_task(scorer, of[:CHECKED], name, reference=wide) for name, of in tasks.items()]
    checks = [dataclasses.asdict(of.check) for of in checked if of.check is not None]
    return {
        "parameters": loaded.model.num_parameters(),
        "questions": questions,
        "seconds": seconds,
        "questions_per_second": questions / seconds,
        "device": found[0].device,
        "checked": sum(len(of.answers) for of in checked),
        **{name: sum(check[name] for check in checks) for name in ("tokens", "boundaries", "answers")},
        "largest_difference": largest_difference(loaded, tasks),
    }


def largest_difference(loaded: LoadedCheckpoint, tasks: Mapping[str, Sequence[Question]]) -> float:
    """Nats by which a log-likelihood in fp32 depends on the batch."""
    pairs = [pair for of in tasks.values() for question in of[:COMPARED] for pair in question.pairs]
    scored = []
    for rows in BATCHES:
        scorer = Scorer(loaded.model, loaded.tokenizer, batch_rows=rows)
        scores = scorer.score(scorer.pairs(pairs), f"batches of {rows}")
        scored.append(torch.tensor([score.log_likelihood for score in scores]))
    return max(float((first - other).abs().max()) for first in scored for other in scored)


def must_show(rows: Sequence[Row]) -> dict[str, Bar]:
    """Over all checkpoints."""
    return {
        "seconds for all questions, the slowest checkpoint": Bar(
            worst((row["seconds"] for row in rows), at_most=True), MOST_SECONDS, at_most=True
        ),
        "largest difference of a log-likelihood between batches of 1, 3 and 16 in fp32, nats": Bar(
            worst((row["largest_difference"] for row in rows), at_most=True), MOST_DIFFERENCE, at_most=True
        ),
    }


def page(recorded: Mapping, rows: Sequence[Row], file: str) -> str:
    """The results in markdown."""
    header = (
        "checkpoint",
        "parameters",
        "questions",
        "seconds",
        "a second",
        "checked in fp32",
        "boundaries that differ",
        "answers",
    )
    lines = [
        (
            row["checkpoint"],
            f"{row['parameters'] / 1e6:.0f} M",
            f"{row['questions']:,}",
            f"{row['seconds']:.1f}",
            f"{row['questions_per_second']:,.0f}",
            f"{row['checked']:,}",
            f"{row['boundaries']:,} of {row['tokens']:,} tokens",
            f"{row['answers']:,}",
        )
        for row in rows
    ]
    return f"""# Scoring questions

{bars_table(must_show(rows))}

The questions of {file}, from text to scores in bf16; the last columns count what fp32 decides otherwise on the first
{CHECKED} of each task. A boundary that differs is a token whose p lies within rounding of the threshold.
`eval/bench_questions.py` says how it is measured.

{markdown_table(header, lines)}

{record_lines(recorded)}
"""


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.bench_questions", description="Times scoring of questions.")
    parser.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    parser.add_argument("--questions", type=Path, required=True, metavar="FILE", help="JSON lines (see eval.questions)")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N questions of each task")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    parser.add_argument("--commit", help="of the code, where it does not run in its git checkout")
    options = parser.parse_args(arguments)
    tasks = selected(read_questions(options.questions), None, options.limit)
    recorded = record(options.commit)
    rows: list[Row] = []
    for name, path in labels_of(options.checkpoints).items():
        rows.append({"checkpoint": name} | measure(path, tasks))
        tell(rows[-1])
        write_json(options.output / "evaluation.json", recorded, must_show(rows), limit=options.limit, rows=rows)
        text = page(recorded, rows, options.questions.name)
        (options.output / "evaluation.md").write_text(text, encoding="utf-8")
    print(bars_table(must_show(rows)))


if __name__ == "__main__":
    sys.exit(main())
