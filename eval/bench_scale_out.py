"""A training step's speed on several GPUs of one machine, against one of them: DDP and FSDP2, each DLCM and its LLaMA.

    python -m eval.bench_scale_out [--processes 2] [--pairs small medium] [--models dlcm llama] [--strategies ddp fsdp]
                                   [--set KEY=VALUE ...] [--output docs/results]

Measures by itself on one GPU, then on `--processes` together, each with the micro-batch that the configuration gives to
one: what several do in a second over what one does is the speed-up. A step is that of eval/bench_training.py, whose
docstring says what is in it, and in MFU. Memory is that of the first GPU. Writes scale_out.json and scale_out.md.
`--set device=cpu` runs it without GPUs: to see that it runs, not how fast.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from eval.bench import Bar, Row, bars_table, find, markdown_table, record, record_lines, tell, worst, write_json
from eval.bench_decode_report import MODELS
from eval.bench_training import Bench, measure_throughput, released_memory
from eval.loading import EvaluationError, report_errors
from train.distributed import Ranks

ONE = "one GPU"
STRATEGIES = ("ddp", "fsdp")
PAIRS = ("small", "medium")
SPEED_UP = 1.85  # of two GPUs
WARM_UP_STEPS, STEPS = 5, 30


def measure_together(options: argparse.Namespace) -> None:
    """Writes `options.rows`: all models, on the ranks that this process is one of. Every rank does as many steps."""
    ranks = Ranks()
    on_gpu = "device=cpu" not in options.set
    device = torch.device("cuda", ranks.local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    strategies = options.strategies if ranks.size > 1 else [ONE]
    rows: list[Row] = []
    for pair, model, strategy in itertools.product(options.pairs, options.models, strategies):
        chosen = [] if strategy == ONE else [f"parallel.strategy={strategy}"]
        with released_memory():
            bench = Bench(pair, model, [*options.set, *chosen], device, ranks)
            measured = measure_throughput(bench, WARM_UP_STEPS, options.steps, seconds=0)
            key: Row = {"pair": pair, "model": model, "strategy": strategy, "gpus": ranks.size}
            rows.append({**key, "overrides": " ".join(options.set), **bench.describe(), **measured})
            del bench
        if ranks.is_first:
            tell(rows[-1])
            options.rows.write_text(json.dumps(rows), encoding="utf-8")
    ranks.leave()


def measure(processes: int, arguments: Sequence[str]) -> list[Row]:
    """The same, in so many processes started for it.

    Raises:
        EvaluationError: they failed; what they said is above.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "rows.json"
        command = [*(launcher if processes > 1 else []), "-m", "eval.bench_scale_out", *arguments, "--rows", str(path)]
        status = subprocess.run([sys.executable, *command], check=False).returncode
        if status != 0:
            raise EvaluationError(f"measuring on {processes} GPUs failed with status {status}; see what it said above")
        return json.loads(path.read_text(encoding="utf-8"))


def speed_up(rows: Sequence[Row], pair: str, model: str, strategy: str) -> float | None:
    """Tokens per second over those of one GPU; None where one was not measured."""
    one, several = (find(rows, pair=pair, model=model, strategy=which) for which in (ONE, strategy))
    return several["tokens_per_second"] / one["tokens_per_second"] if one and several else None


def peaks_over_one(rows: Sequence[Row], pair: str, model: str) -> float | None:
    """Bytes at the peak under FSDP2 over those of one GPU."""
    one, several = (find(rows, pair=pair, model=model, strategy=which).get("peak_gb") for which in (ONE, "fsdp"))
    return several / one if one and several else None


def must_show(rows: Sequence[Row]) -> dict[str, Bar]:
    """The bars, from rows alone: of two GPUs, as configured."""
    rows = [row for row in rows if row["gpus"] in (1, 2) and not row["overrides"]]
    bars: dict[str, Bar] = {}
    for pair, strategy in itertools.product(PAIRS, STRATEGIES):
        ours, theirs = (speed_up(rows, pair, model, strategy) for model in MODELS)
        for name, value in zip(MODELS.values(), (ours, theirs), strict=True):
            bars[f"tokens per second, 2 GPUs over 1, {strategy}, {name}, {pair}"] = Bar(value, SPEED_UP)
        over = ours / theirs if ours and theirs else None
        bars[f"that of the DLCM over that of the LLaMA, {strategy}, {pair}"] = Bar(over, 1.0)
    for pair in PAIRS:
        over = worst((peaks_over_one(rows, pair, model) for model in MODELS), at_most=True)
        bars[f"GB at the peak, fsdp over 1 GPU, the larger of DLCM and LLaMA, {pair}"] = Bar(over, 1.0, at_most=True)
    return bars


def page(recorded: dict[str, Any], bars: dict[str, Bar], rows: Sequence[Row]) -> str:
    """The results as markdown."""
    parts = [
        "# Training steps on several GPUs of one machine",
        record_lines(recorded),
        "Written by `eval/bench_scale_out.py`, whose docstring says what was measured.",
        bars_table(bars),
        throughput_table(rows),
    ]
    return "\n\n".join(parts) + "\n"


def throughput_table(rows: Sequence[Row]) -> str:
    def shown(value: float | None, form: str) -> str | None:
        return None if value is None else f"{value:{form}}"

    def line(row: Row) -> tuple[str | None, ...]:
        place = f"{row['gpus']}, {row['strategy']}" if row["strategy"] != ONE else ONE
        faster = speed_up(rows, row["pair"], row["model"], row["strategy"])
        numbers = (("tokens_per_second", ",.0f"), ("step_ms", ",.1f"), ("mfu", ".1%"), ("peak_gb", ".1f"))
        shape = f"{row['documents']} x {row['sequence_length']:,}"
        measured = (shown(row[name], form) for name, form in numbers)
        return row["pair"], MODELS[row["model"]], place, shape, *measured, shown(faster, ".3f")

    header = ("pair", "model", "GPUs", "windows each", "tokens / s", "ms / step", "MFU", "peak GB", "over 1 GPU")
    return markdown_table(header, map(line, rows))


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    given = list(sys.argv[1:] if arguments is None else arguments)
    options = parse_arguments(given)
    if options.rows is not None:
        measure_together(options)
        return
    if "device=cpu" not in options.set and torch.cuda.device_count() < options.processes:
        raise EvaluationError(
            f"bench_scale_out times {options.processes} GPUs, but torch sees {torch.cuda.device_count()}; "
            f"--set device=cpu runs it without any"
        )
    rows = [row for processes in (1, options.processes) for row in measure(processes, given)]
    bars, recorded, output = must_show(rows), record(options.commit), options.output
    write_json(output / "scale_out.json", recorded, bars, rows=rows)
    (output / "scale_out.md").write_text(page(recorded, bars, rows), encoding="utf-8")
    print(f"\n{throughput_table(rows)}\n\n{bars_table(bars)}\n\nfiles are in {output}")


def parse_arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench_scale_out", description="Times training steps on several GPUs against one."
    )
    parser.add_argument("--processes", type=int, default=2, help="GPUs that are measured together (%(default)s)")
    parser.add_argument("--pairs", nargs="+", default=list(PAIRS), help="directories of configs/ (small medium)")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--strategies", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--steps", type=int, default=STEPS, help="that are measured (%(default)s)")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every configuration")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="where to write (%(default)s)")
    parser.add_argument("--commit", help="of the code, where it does not run in its git checkout")
    parser.add_argument("--rows", type=Path, help=argparse.SUPPRESS)  # of the processes that measure: where to
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
