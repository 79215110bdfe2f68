"""The tensor codec on trained models: errors at equal bits, bits per byte after compression, and speed.

    python -m eval.bench_codec RUN_DLCM RUN_LLAMA [--backends x264 x265 entropy] [--workers 32] [--output docs/results]

    weights    squared errors of every matrix, at as many bits as rounding in groups of 128 takes to 4, 3 and 2 bits;
               and errors of what layers put out
    models     bits per byte with all matrices compressed to --budgets, per method; bits given to all alike, or by what
               errors cost
    stages     the same with one stage of a DLCM compressed, by x264
    past       bits per byte with the old keys and values of the past compressed (dlcm/codec/past.py)
    gradients  a short training with gradients compressed (eval/codec_gradients.py)
    speed      one encoding and one decoding of a Gaussian matrix of --side^2 values at about 3 bits, on one thread; a
               budget takes four or five encodings to hit

Checkpoints are run directories or checkpoints of ours; of another directory or file of safetensors, weights alone are
looked at. Text is the validation split of the first run's data, or that of --text; half of its documents calibrate GPTQ
and costs, and up to --limit characters of the others are scored. Documents are cut at an eighth of the limit.

OUTPUT/codec.json, .md and .png are written anew after every section of every checkpoint. Started again with the same
settings, commit and machine, the command goes on behind those; --sections chooses some. `--budgets 3 --limit 20000
--side 1024 --gradient-steps 20` makes it short.
"""

import argparse
import json
import os
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from dlcm.codec import BACKENDS
from dlcm.codec.allocation import LEAST, MOST
from dlcm.codec.tensor import Backend, decompress, encode_once
from eval.bench import Row, bars_table, record, tell, write_json
from eval.bench_codec_report import CODEC, Results, must_show, page, plot
from eval.calibration import input_hessians, windows_of
from eval.codec import Mode, Weights, weights_source
from eval.codec_gradients import BUDGETS as GRADIENT_BUDGETS
from eval.codec_gradients import train
from eval.codec_methods import CLIPPED, ROTATED, ROUNDERS, ROUNDING, SHUFFLED
from eval.codec_models import STAGES, Texts, Trial, run_past_trial, run_trial
from eval.codec_report import LEVELS, comparison
from eval.loading import EvaluationError, load_checkpoint, positive, report_errors
from eval.perplexity import read_texts, validation_documents
from eval.processes import over_processes
from eval.report import labels_of
from train.config import load_run_config
from train.documents import Document

SECTIONS = ("weights", "models", "stages", "past", "gradients", "speed")
BUDGETS = (4.0, 3.5, 3.0, 2.5, 2.0)
VARIABLE: tuple[Mode, ...] = ("mse", "hessian")
STAGE_BUDGET = 3.0  # and below: what every stage bears says nothing
PAST_LEVELS, PAST_DOCUMENTS = (4, 3, 2), 4
LOG_STEP = 2.05 - 3  # log2 of the step over the deviation, at which a Gaussian takes about 3 bits
SETTINGS = ("backends", "budgets", "text", "limit", "side", "gradient_steps")
SHARES = 8  # documents are cut at this part of the limit, so that there are several

Measure = Callable[[], list[Row]]


def speed(backend: Backend, side: int) -> Row:
    """Million values a second in both directions."""
    x = torch.randn(side, side, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    blob = encode_once(x, LOG_STEP, backend=backend)
    middle = time.perf_counter()
    decompress(blob)
    millions = x.numel() / 1e6
    return {
        "backend": backend,
        "bits": blob.bits,
        "encode_mvalues_per_second": millions / (middle - start),
        "decode_mvalues_per_second": millions / (time.perf_counter() - middle),
    }


def texts_of(documents: Sequence[Document], limit: int) -> Texts:
    """Documents in a random order: half to calibrate on, and of the others so many characters to score.

    Raises:
        EvaluationError: there are not two.
    """
    if len(documents) < 2:
        raise EvaluationError("one document is too few: one calibrates, another is scored; give --text with more")
    cut = [Document(of.text[: max(1, limit // SHARES)], of.where, of.source, of.domain) for of in documents]
    random.Random(0).shuffle(cut)
    half, scored, size = len(cut) // 2, [], 0
    for document in cut[half:]:
        scored.append(document)
        size += len(document.text)
        if size >= limit:
            break
    return Texts(cut[:half], scored)


@dataclass(frozen=True, slots=True)
class Bench:
    """What is measured, on what, by how many processes."""

    backends: tuple[Backend, ...]
    budgets: tuple[float, ...]
    texts: Texts | None
    workers: int
    side: int
    gradient_steps: int

    def weights(self, path: Path) -> list[Row]:
        hessians = None
        if is_ours(path) and self.texts is not None:
            loaded = load_checkpoint(path)
            positions = loaded.model.config.max_position_embeddings
            hessians = input_hessians(loaded.model, windows_of(loaded.tokenizer, self.texts.calibration, positions))
        return comparison(Weights(weights_source(path)), LEVELS, self.backends, workers=self.workers, hessians=hessians)

    def models(self, path: Path) -> list[Row]:
        trials = [Trial(None)]
        for budget in self.budgets:
            trials += [Trial(method, budget) for method in ROUNDERS if budget == int(budget)]
            for backend in self.backends:
                trials += [Trial(backend + variant, budget) for variant in ("", ROTATED, SHUFFLED)]
                if LEAST <= budget <= MOST:
                    trials += [Trial(backend, budget, mode) for mode in VARIABLE]
        return self._run(run_trial, [(path, trial, self.texts) for trial in trials])

    def stages(self, path: Path) -> list[Row]:
        budgets = [budget for budget in self.budgets if budget <= STAGE_BUDGET] or [min(self.budgets)]
        trials = [Trial(CODEC, budget, stage=stage) for stage in STAGES for budget in budgets]
        return self._run(run_trial, [(path, trial, self.texts) for trial in (Trial(None), *trials)])

    def past(self, path: Path) -> list[Row]:
        assert self.texts is not None
        documents = sorted(self.texts.scored, key=lambda of: -len(of.text))[:PAST_DOCUMENTS]
        methods = [ROUNDING, CLIPPED, *(backend + variant for backend in self.backends for variant in ("", SHUFFLED))]
        cases = [(None, PAST_LEVELS[0]), *((method, level) for level in PAST_LEVELS for method in methods)]
        return self._run(run_past_trial, [(path, method, level, documents) for method, level in cases])

    def gradients(self) -> list[Row]:
        cases = [(None, True), *((bits, feedback) for bits in GRADIENT_BUDGETS for feedback in (True, False))]
        return self._run(train, [(self.gradient_steps, bits, feedback) for bits, feedback in cases])

    def speed(self) -> list[Row]:
        return [speed(backend, self.side) for backend in self.backends]

    def _run(self, function: Callable[..., Row], jobs: Sequence[tuple[Any, ...]]) -> list[Row]:
        rows = []
        for row in over_processes(function, jobs, self.workers):
            tell(row)
            rows.append(row)
        return rows

    def steps(self, paths: dict[str, Path], sections: Sequence[str]) -> Iterator[tuple[str, str, Measure]]:
        """Section, checkpoint, and what measures it."""
        for section in sections:
            measure = getattr(self, section)
            if section in ("gradients", "speed"):
                yield section, "", measure
                continue
            for label, path in paths.items():
                if section == "weights" or (is_ours(path) and (section != "stages" or is_dlcm(path))):
                    yield section, label, partial(measure, path)


def is_ours(source: Path) -> bool:
    """Whether it is a checkpoint that can be scored."""
    return (source / "run.yaml").is_file()


def is_dlcm(source: Path) -> bool:
    return str(load_run_config(source / "run.yaml", resolved=True).model.get("architecture")) == "dlcm"


def measured_before(path: Path, recorded: dict[str, Any], settings: dict[str, Any]) -> Results:
    """What an earlier call has written, if it was of the same settings, commit and machine.

    Raises:
        EvaluationError: it was not.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        known: Results = content["results"]
        same = content["settings"] == settings and all(content[key] == recorded[key] for key in ("machine", "commit"))
    except (ValueError, KeyError, TypeError) as error:
        raise EvaluationError(f"{path}: not of this command; remove it, or give another --output") from error
    if not same:
        raise EvaluationError(
            f"{path}: of other settings, another commit or machine; remove it, or give another --output"
        )
    return known


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    labels = labels_of(options.checkpoints)
    sources = {label: weights_source(path) for label, path in labels.items()}
    settings = {name: getattr(options, name) for name in SETTINGS}
    settings |= {"checkpoints": {label: str(path) for label, path in sources.items()}}
    recorded = record(options.commit)
    results = measured_before(options.output / "codec.json", recorded, settings)
    ours, texts = [path for path in sources.values() if is_ours(path)], None
    if ours:
        documents = read_texts(options.text) if options.text else list(validation_documents(load_checkpoint(ours[0])))
        texts = texts_of(documents, options.limit)
    bench = Bench(
        tuple(options.backends), tuple(options.budgets), texts, options.workers, options.side, options.gradient_steps
    )
    for section, label, measure in bench.steps(sources, options.sections):
        if label in results.get(section, {}):
            continue
        start = time.perf_counter()
        results.setdefault(section, {})[label] = measure()
        print(f"{section} {label}: {time.perf_counter() - start:,.0f} s", flush=True)
        bars = must_show(results)
        write_json(options.output / "codec.json", recorded, bars, settings=settings, results=results)
        (options.output / "codec.md").write_text(page(recorded, bars, settings, results), encoding="utf-8")
        plot(options.output / "codec.png", results)
    print(bars_table(must_show(results)))


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m eval.bench_codec", description="Measures the tensor codec.")
    parser.add_argument("checkpoints", nargs="+", type=Path)
    parser.add_argument("--sections", choices=SECTIONS, nargs="+", default=SECTIONS, help="(default: all)")
    parser.add_argument("--backends", choices=BACKENDS, nargs="+", default=["x264", "entropy"], help="(%(default)s)")
    parser.add_argument("--budgets", type=float, nargs="+", default=list(BUDGETS), help="bits of models (%(default)s)")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="instead of the validation split")
    parser.add_argument("--limit", type=positive, default=200_000, help="characters to score (%(default)s)")
    parser.add_argument("--workers", type=positive, default=os.cpu_count() or 1, help="processes (%(default)s)")
    parser.add_argument("--side", type=positive, default=4096, help="of the matrix that is timed (%(default)s)")
    parser.add_argument("--gradient-steps", type=positive, default=300, help="of the short training (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="(default: %(default)s)")
    parser.add_argument("--commit", help="of the code, where it does not run in its git checkout")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
