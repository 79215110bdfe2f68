"""What concepts are worth to a trained DLCM: its loss with something of them taken away.

    python -m eval.knockout RUN_DLCM ... [--text FILE ...] [--max-tokens N] [--output DIR]

    whole        the model as it is
    unreasoned   concepts as they were pooled: the backbone is left out
    strangers    every token reads concepts of other places, of whatever is in the batch
    mean         every concept is the mean of the batch's: there is something to read, and it says nothing
    none         nothing is read: cross-attention and injection add nothing

Text and windows are those of eval.analysis. What a model loses without is more than what one would lose that had been
trained without, and less than what it could have won. Beside it, the root mean squares of the residual stream behind
the encoder and of what cross-attention and injection add to it: what is small there can say little, since the decoder
reads their sum through a norm. Writes knockout.json and knockout.md.
"""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlcm import DLCMForCausalLM
from eval.analysis import Text, mean, measure, open_checkpoints, over_documents, text_for
from eval.bench import Row, markdown_table, record, record_lines, write_json
from eval.loading import LoadedCheckpoint, load_checkpoint, report_errors
from eval.uncertainty import paired_difference

SEED = 0  # of the order in which strangers stand
Hook = tuple[nn.Module, Callable[..., Any]]


def _unreasoned(model: DLCMForCausalLM) -> list[Hook]:
    return [(model.backbone, lambda _, inputs, output: inputs[0])]


def _strangers(model: DLCMForCausalLM) -> list[Hook]:
    def in_another_order(_: nn.Module, inputs: tuple[Tensor, ...], z_MC: Tensor) -> Tensor:
        order_M = torch.randperm(len(z_MC), generator=torch.Generator().manual_seed(SEED))
        return z_MC[order_M.to(z_MC.device)]

    return [(model.smoothing, in_another_order)]


def _mean(model: DLCMForCausalLM) -> list[Hook]:
    return [(model.smoothing, lambda _, inputs, z_MC: z_MC.mean(0, keepdim=True).expand_as(z_MC))]


def _none(model: DLCMForCausalLM) -> list[Hook]:
    hooks: list[Hook] = [(cross, lambda _, inputs, output: inputs[0]) for cross in model.cross_attentions]
    if model.injection is not None:
        hooks.append((model.injection, lambda _, inputs, output: torch.zeros_like(output)))
    return hooks


# What is taken away, in the order of how much it is.
KNOCKOUTS: dict[str, Callable[[DLCMForCausalLM], list[Hook]]] = {
    "whole": lambda model: [],
    "unreasoned": _unreasoned,
    "strangers": _strangers,
    "mean": _mean,
    "none": _none,
}


@contextmanager
def hooked(hooks: Sequence[Hook]) -> Iterator[None]:
    """Forward hooks for a while."""
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def knockout_rows(name: str, loaded: LoadedCheckpoint, text: Text) -> list[Row]:
    """Mean losses in nats a token, and by how much they are above the whole model's, with its error and interval.

    Raises:
        EvaluationError: losses are not finite.
    """
    model, rows = loaded.model, []
    assert isinstance(model, DLCMForCausalLM)
    document_K = text.document_T[~text.opens_T]
    whole_K = None
    for what, hooks in KNOCKOUTS.items():
        with hooked(hooks(model)):
            loss_T, _ = measure(loaded, text)
        loss_K = loss_T[~text.opens_T]
        whole_K = loss_K if whole_K is None else whole_K
        row = {"checkpoint": name, "knockout": what, **mean("loss", loss_K, document_K)}
        row |= mean("difference", loss_K - whole_K, document_K)
        interval = paired_difference(over_documents(loss_K, document_K), over_documents(whole_K, document_K), what)
        rows.append(row | {"low": interval.low, "high": interval.high})
    return rows


def scale_row(name: str, loaded: LoadedCheckpoint, text: Text) -> Row:
    """Root mean squares of the residual stream behind the encoder, and of what each path adds to it."""
    model = loaded.model
    assert isinstance(model, DLCMForCausalLM)
    squares: dict[str, list[Tensor]] = {"encoder": [], "cross_attention": [], "injection": []}

    def see(what: str, x: Tensor) -> None:
        squares[what].append(x.double().square().mean())

    hooks: list[Hook] = [(model.encoder, lambda _, inputs, output: see("encoder", output))]
    for cross in model.cross_attentions:
        hooks.append((cross, lambda _, inputs, output: see("cross_attention", output - inputs[0])))
    if model.injection is not None:
        gate_LE = 1.0 if model.injection.gate is None else model.injection.gate
        hooks.append(
            (model.injection, lambda _, inputs, output: see("injection", output[:, None] * gate_LE))  # layer by layer
        )
    with hooked(hooks):
        measure(loaded, text)
    found = {what: float(torch.stack(x).mean().sqrt()) if x else None for what, x in squares.items()}
    return {"checkpoint": name, **found}


def page(recorded: Row, text: Text, rows: Sequence[Row], scales: Sequence[Row]) -> str:
    """The results in markdown."""
    losses = [
        (
            f"{row['checkpoint']}, {row['knockout']}",
            f"{row['loss']:.4f}",
            *(
                (None, None)
                if row["knockout"] == "whole"
                else (
                    f"{row['difference']:+.4f}",
                    None if row["low"] is None else f"{row['low']:+.4f} to {row['high']:+.4f}",
                )
            ),
        )
        for row in rows
    ]
    sizes = [
        (row["checkpoint"], *(None if row[k] is None else f"{row[k]:.3f}" for k in list(row)[1:])) for row in scales
    ]
    return f"""# What concepts are worth

{markdown_table(("model, without", "nats per token", "above the whole", "95 %"), losses)}

{int((~text.opens_T).sum()):,} tokens of {len(text.source_D):,} documents: {text.name}.

{markdown_table(("root mean square", "behind the encoder", "cross-attention adds", "injection adds"), sizes)}

{record_lines(recorded)}
"""


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.knockout", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoints", nargs="+", type=Path, help="run directories or checkpoints of DLCMs")
    parser.add_argument("--text", nargs="+", default=[], metavar="FILE", help="(default: the first run's validation)")
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read no more than the first N (default: all)")
    parser.add_argument("--output", type=Path, help="directory (default: beside the first checkpoint)")
    options = parser.parse_args(arguments)
    opened = open_checkpoints(options.checkpoints, None)
    text = text_for(opened, options.text, options.max_tokens)
    rows, scales = [], []
    for one in opened:
        loaded = load_checkpoint(one.directory)
        rows += knockout_rows(one.name, loaded, text)
        scales.append(scale_row(one.name, loaded, text))
    output, recorded = options.output or options.checkpoints[0].parent, record()
    write_json(output / "knockout.json", recorded, {}, losses=rows, scales=scales)
    shown = page(recorded, text, rows, scales)
    (output / "knockout.md").write_text(shown, encoding="utf-8")
    print(shown)


if __name__ == "__main__":
    sys.exit(main())
