"""Writes a page that shows, token by token, where models cut texts into concepts and what each token costs them.

    python -m eval.viewer CHECKPOINT [CHECKPOINT ...]
    python -m eval.viewer CHECKPOINT --text "To be, or not to be"
    python -m eval.viewer CHECKPOINT --file README.md eval/viewer.py --output page.html

Held-out passages are shown where no text is given, and several checkpoints, say of several ratios, side by side: the
paper's Appendix A. A LLaMA baseline beside a DLCM shows its loss alone. The page is one file; its own policy
forbids it the network, and every script but its own. Texts are data in it, never markup.
"""

import argparse
import base64
import hashlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dlcm import DLCMForCausalLM
from eval.loading import EvaluationError, LoadedCheckpoint, load_checkpoint, report_errors
from eval.passages import DOMAINS, Passage, held_out_passages, read_passages
from eval.segmentation import Reading, cut, read, read_text
from train.metrics import bits_per_byte

TEMPLATE = Path(__file__).with_name("viewer.html")
TITLES = DOMAINS | {"math": "mathematics"}
DIGITS = 4  # of numbers in the page, after the point


def load_models(paths: Sequence[Path]) -> list[LoadedCheckpoint]:
    """Opens checkpoints; says on stderr which of them may have been trained on what the first one held out.

    Raises:
        EvaluationError: none of them is a DLCM.
        CheckpointError: one cannot be read.
    """
    models = [load_checkpoint(path) for path in paths]
    first = models[0]
    if not any(isinstance(loaded.model, DLCMForCausalLM) for loaded in models):
        raise EvaluationError(f"{first.path} holds a {type(first.model).__name__}, which forms no concepts; add a DLCM")
    for loaded in models[1:]:
        if loaded.state.data_fingerprint != first.state.data_fingerprint:
            print(f"warning: {first.path} and {loaded.path} were trained on different data", file=sys.stderr)
    return models


def page_data(models: Sequence[LoadedCheckpoint], passages: Sequence[Passage]) -> dict[str, Any]:
    """All that the page shows: the models, and of each passage a reading by each of them.

    Raises:
        EvaluationError: there is no passage, or a model cannot read one.
    """
    if not passages:
        raise EvaluationError("there is no passage to show; give --text, --file or --passages FILE")
    return {
        "models": [describe_model(loaded) for loaded in models],
        "passages": [
            {
                "domain": passage.domain,
                "title": TITLES[passage.domain].capitalize() if passage.domain in TITLES else passage.domain,
                "readings": [describe_reading(loaded, passage) for loaded in models],
            }
            for passage in passages
        ],
    }


def describe_model(loaded: LoadedCheckpoint) -> dict[str, Any]:
    """A model's checkpoint, target ratio, and as a measure of its losses that of guessing among all tokens, in nats."""
    model = loaded.model
    return {
        "checkpoint": str(loaded.path),
        "target_ratio": model.config.target_ratio if isinstance(model, DLCMForCausalLM) else None,
        "guessing": math.log(model.config.vocab_size),
    }


def describe_reading(loaded: LoadedCheckpoint, passage: Passage) -> dict[str, Any]:
    """A model's `Reading` of a passage, rounded, with its averages (see `averages`).

    Raises:
        EvaluationError: the passage is empty or too long, or the model's numbers are not finite.
    """
    try:
        reading = read(loaded.model, loaded.tokenizer, passage.text)
    except EvaluationError as error:
        raise EvaluationError(f"{passage.domain}: {error}") from error
    numbers = (*reading.losses, *(reading.probabilities or ()))
    if not all(number is None or math.isfinite(number) for number in numbers):
        raise EvaluationError(f"{loaded.path}: gives numbers that are not finite; choose an earlier checkpoint")
    return _rounded(asdict(reading) | averages(reading))


def averages(reading: Reading) -> dict[str, float | None]:
    """Loss in nats per predicted token, bits per byte of their text, tokens per concept; None where there is none."""
    losses = [loss for loss in reading.losses if loss is not None]
    num_bytes = len("".join(reading.tokens[1:]).encode())
    return {
        "mean_loss": math.fsum(losses) / len(losses) if losses else None,
        "bits_per_byte": bits_per_byte(math.fsum(losses), num_bytes) if num_bytes else None,
        "tokens_per_concept": None if reading.concepts is None else cut(reading).tokens_per_concept,
    }


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_rounded(item) for item in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def page(data: dict[str, Any]) -> str:
    """The data in a page that needs nothing else."""
    template = TEMPLATE.read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; style-src {_digest(template, 'style')}; script-src {_digest(template, 'script')}; "
        "base-uri 'none'; form-action 'none'"
    )
    # Markup could only begin with "<", which JSON has in strings alone, and there it may be escaped.
    content = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return template.replace("{{policy}}", policy).replace("{{data}}", content)  # texts may spell {{policy}}: last


def _digest(template: str, tag: str) -> str:
    """How a policy names what is between the tags of the only element <tag>."""
    content = template.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def chosen_passages(options: argparse.Namespace, loaded: LoadedCheckpoint) -> list[Passage]:
    """The texts of the command line, or what this checkpoint's data hold out."""
    if options.passages:
        return read_passages(options.passages)
    if options.file:
        return [Passage(str(file), read_text(file)) for file in options.file]
    if options.text:
        return [Passage("text", text) for text in options.text]
    return held_out_passages(loaded, TITLES)


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    models = load_models(options.checkpoints)
    content = page(page_data(models, chosen_passages(options, models[0])))
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(content, encoding="utf-8")
    print(options.output)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.viewer", description="Writes a page that shows where models cut texts into concepts."
    )
    parser.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CHECKPOINT",
        help="run directories (the newest checkpoint of each) or checkpoints; at least one DLCM",
    )
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--text", nargs="+", help="the texts themselves (default: from the validation split)")
    source.add_argument("--file", type=Path, nargs="+", help="UTF-8 files with a text each")
    source.add_argument("--passages", type=Path, help='JSON lines {"domain": ..., "text": ...}')
    parser.add_argument("--output", type=Path, default=Path("concepts.html"), help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
