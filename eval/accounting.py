"""Whether this project's FLOPs can be believed, and which of the paper's claims they bear out.

    python -m eval.accounting [--output docs]

Writes docs/accounting.md, docs/accounting.png and docs/results/accounting.json: the closed forms of dlcm/flops.py
against every built model and against torch's own counter, stage by stage; Table 3 under both of its readings; at which
tokens per concept "34 % fewer FLOPs" and "matched inference FLOPs" hold; and the mean of Table 2, from its rows.
Seconds on a CPU.
"""

import argparse
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineConfig, LlamaBaselineForCausalLM
from dlcm.boundary import Boundaries
from dlcm.flops import TABLES, Config, cache_bytes_per_token, forward_flops, parameter_counts, training_flops
from eval.bench import PALETTE, Bar, bars_table, finish, markdown_table, record, record_lines, write_json
from eval.benchmarks import PAPER
from eval.loading import report_errors
from train.config import build_model_config, load_run_config

CONFIGS = Path(__file__).parent.parent / "configs"
LENGTH = 8192  # positions of Table 3
RATIOS = (2.0, 4.0, 8.0)
CLAIMED_SAVING = 0.34
READINGS = {"token SwiGLU 4,096": 4096, "token SwiGLU 6,144": 6144}

# Section 5 of the project's specification, computed by hand from Table 3: what, and the value.
BY_HAND = {
    "LLaMA, parameters without embedding and head": 906e6,
    "LLaMA, forward FLOPs per token": 3.01e9,
    "DLCM, token SwiGLU 4,096, R = 4, forward FLOPs per token": 2.39e9,
    "DLCM, token SwiGLU 4,096, R = 8, forward FLOPs per token": 2.01e9,
    "DLCM, token SwiGLU 6,144, R = 4, forward FLOPs per token": 2.69e9,
    "DLCM, token SwiGLU 6,144, parameters": 2.34e9,
}

# Table 2: zero-shot accuracy after 1T tokens, DLCM and baseline, per cent.
TABLE_2 = {row.label: (row.dlcm, row.baseline) for row in PAPER}
TABLE_2_AVERAGE = (43.92, 41.23)  # as printed

# Models small enough to be counted by torch, with grouped heads and widths that differ.
SMALL: dict[str, Any] = dict(vocab_size=160, d_token=64, token_heads=4, token_kv_heads=2, token_ffn=96)
SMALL_CONCEPTS: dict[str, Any] = dict(d_concept=96, concept_heads=4, concept_kv_heads=2, concept_ffn=160, d_scan=48)


def build(config: Config) -> DLCMForCausalLM | LlamaBaselineForCausalLM:
    return DLCMForCausalLM(config) if isinstance(config, DLCMConfig) else LlamaBaselineForCausalLM(config)


# Against built models and torch's counter


def parameters_built(path: Path) -> tuple[int, int]:
    """Parameters of a run's model: by the closed form, and built (on no device)."""
    config = build_model_config(load_run_config(path))
    with torch.device("meta"):
        return sum(parameter_counts(config).values()), build(config).num_parameters()


def counted_stages(model: DLCMForCausalLM | LlamaBaselineForCausalLM, ids_BL: Tensor) -> tuple[dict[str, float], float]:
    """FLOPs per token of forward and backward as torch counts them: of each stage run alone, and of the whole model.

    Attention takes its naive path, where its products are visible, as the only batched ones. Causality makes half of
    them count. Cross-attention is to be replicated, at one token per concept: there replication is the function.
    """
    stages = [stage for stage in parameter_counts(model.config) if stage != "embedding"]
    modules: dict[str, nn.Module] = {stage: getattr(model, "lm_head" if stage == "head" else stage) for stage in stages}
    inputs: dict[str, tuple[Any, ...]] = {}

    def remember(stage: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        return lambda _, given: inputs.update({stage: given})

    hooks = [module.register_forward_pre_hook(remember(stage)) for stage, module in modules.items()]
    whole = _counted(lambda: model.eval()(ids_BL, labels=ids_BL).loss, ids_BL.numel())
    for hook in hooks:
        hook.remove()

    def alone(stage: str) -> float:
        given = [
            x.detach().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x for x in inputs[stage]
        ]

        def run() -> Tensor:
            output = modules[stage](*given)
            return (output.probability_T if isinstance(output, Boundaries) else output).sum()

        return _counted(run, ids_BL.numel())

    return {stage: alone(stage) for stage in stages}, whole


def _counted(run: Callable[[], Tensor], tokens: int) -> float:
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run().backward()
    operations = counter.get_flop_counts()["Global"]
    return sum(flops / (2 if "bmm" in str(operation) else 1) for operation, flops in operations.items()) / tokens


@dataclass(frozen=True, slots=True)
class Counted:
    """FLOPs per token of a training step: torch's count, and the closed form."""

    model: str
    stage: str
    counter: float
    formula: float

    @property
    def deviation(self) -> float:
        return abs(self.counter / self.formula - 1)


def against_the_counter() -> list[Counted]:
    """Both models, stage by stage and in total."""
    torch.manual_seed(0)
    dlcm = DLCMForCausalLM(DLCMConfig(**SMALL, **SMALL_CONCEPTS, cross_attention_backend="replicated"))
    dlcm.detector.threshold = 0.0  # every token a boundary
    llama = LlamaBaselineForCausalLM(LlamaBaselineConfig(**SMALL, num_layers=3))
    rows = []
    for name, model in (("DLCM", dlcm), ("LLaMA", llama)):
        stages, whole = counted_stages(model, torch.randint(SMALL["vocab_size"], (3, 64)))
        expected = training_flops(model.config, 64, 1.0)
        rows += [Counted(name, stage, flops, expected.stages[stage]) for stage, flops in stages.items()]
        rows.append(Counted(name, "all", whole, expected.total))
    return rows


# Table 3


@functools.cache
def table_3(token_ffn: int | None = None) -> Config:
    """The LLaMA baseline, or the DLCM under one reading of its SwiGLU width."""
    if token_ffn is None:
        return build_model_config(load_run_config(CONFIGS / "table3" / "llama.yaml"))
    return build_model_config(load_run_config(CONFIGS / "table3" / "dlcm.yaml", [f"model.token_ffn={token_ffn}"]))


def by_formula() -> dict[str, float]:
    """What `BY_HAND` says, by the closed forms."""
    llama, (narrow, wide) = table_3(), (table_3(width) for width in READINGS.values())
    counts = parameter_counts(llama)
    values = [
        sum(count for stage, count in counts.items() if stage not in TABLES),
        forward_flops(llama, LENGTH).total,
        forward_flops(narrow, LENGTH, 4.0).total,
        forward_flops(narrow, LENGTH, 8.0).total,
        forward_flops(wide, LENGTH, 4.0).total,
        sum(parameter_counts(wide).values()),
    ]
    return dict(zip(BY_HAND, values, strict=True))


def _all(config: Config, ratio: float | None) -> float:
    return forward_flops(config, LENGTH, ratio).total


def _without_head(config: Config, ratio: float | None) -> float:
    return _all(config, ratio) - forward_flops(config, LENGTH, ratio).stages["head"]


def _parameters_alone(config: Config, ratio: float | None) -> float:
    """2 FLOPs per parameter and use, embedding and head left out: documents of no length."""
    stages = forward_flops(config, 0, ratio).stages
    return sum(stages.values()) - stages["head"]


def _own_size(config: Config, ratio: float | None) -> float:
    """The DLCM against its own parameters, all at work on every token."""
    counts = parameter_counts(config)
    return 2 * sum(count for stage, count in counts.items() if stage not in TABLES)


Accounting = Callable[[Config, float | None], float]
# How FLOPs may be counted: of the DLCM, and of what it is compared with (given the DLCM for its own size).
ACCOUNTINGS: dict[str, tuple[Accounting, Accounting | None]] = {
    "everything, against the LLaMA": (_all, None),
    "without the head, against the LLaMA": (_without_head, None),
    "2 per parameter, against the LLaMA": (_parameters_alone, None),
    "2 per parameter, against a plain model of the DLCM's size": (_parameters_alone, _own_size),
}


def flops_ratio(name: str, token_ffn: int, ratio: float) -> float:
    """The DLCM's forward FLOPs over those of what it is compared with."""
    ours, theirs = ACCOUNTINGS[name]
    dlcm = table_3(token_ffn)
    return ours(dlcm, ratio) / (ours(table_3(), None) if theirs is None else theirs(dlcm, None))


def tokens_per_concept_at(name: str, token_ffn: int, wanted: float) -> float | None:
    """R at which the ratio of FLOPs is `wanted`; None where no R from 1 to 1,000 gives it. FLOPs fall with R."""
    low, high = 1.0, 1000.0
    if not flops_ratio(name, token_ffn, high) <= wanted <= flops_ratio(name, token_ffn, low):
        return None
    for _ in range(40):
        middle = (low * high) ** 0.5
        low, high = (middle, high) if flops_ratio(name, token_ffn, middle) > wanted else (low, middle)
    return low


# The page


def must_show(built: dict[str, tuple[int, int]], counted: Sequence[Counted]) -> dict[str, Bar]:
    formula = by_formula()
    llama, dlcm = table_3(), table_3(READINGS["token SwiGLU 6,144"])
    cache = cache_bytes_per_token(dlcm, 4.0).total / cache_bytes_per_token(llama).total
    return {
        "parameters that differ from built models, all configurations": Bar(
            float(sum(abs(ours - theirs) for ours, theirs in built.values())), 0, at_most=True
        ),
        "FLOPs of forward and backward against torch's counter, largest deviation of a stage or a model": Bar(
            max(row.deviation for row in counted), 0.02, at_most=True
        ),
        "Table 3 against arithmetic by hand, largest deviation": Bar(
            max(abs(formula[name] / value - 1) for name, value in BY_HAND.items()), 0.01, at_most=True
        ),
        "cache bytes per token, DLCM over LLaMA, Table 3, R = 4": Bar(cache, 0.5, at_most=True),
    }


def page(recorded: dict[str, Any], bars: dict[str, Bar], counted: Sequence[Counted]) -> str:
    """Everything as markdown."""
    formula = by_formula()
    parts = [
        "# FLOPs one can believe",
        record_lines(recorded),
        "Written by `eval/accounting.py`. The closed forms and their conventions are in `dlcm/flops.py`: 2 FLOPs per "
        "multiply-add, matrix products alone, causal attention at half, concepts at their realised number, cross-"
        "attention as the function needs it. `python -m eval.flops CONFIG` prints them for any configuration.",
        bars_table(bars),
        "## Against torch's counter",
        "A training step of two small models, MFLOP per token.",
        markdown_table(
            ("model", "stage", "counter", "formula", "deviation"),
            (
                (row.model, row.stage, f"{row.counter / 1e6:.4f}", f"{row.formula / 1e6:.4f}", f"{row.deviation:.2%}")
                for row in counted
            ),
        ),
        "## Table 3, two readings",
        'Table 3 gives the DLCM\'s SwiGLU width as "6,144 / 6,144" and calls the columns self and cross. If that is '
        "token and concept level, blocks at token level have 6,144; if token level has what the baseline has, 4,096. "
        f"Both have 2.2 to 2.3 B parameters. At {LENGTH:,} tokens:",
        markdown_table(
            ("quantity", "by formula", "by hand"),
            ((name, f"{formula[name] / 1e9:.3f} G", f"{value / 1e9:.3f} G") for name, value in BY_HAND.items()),
        ),
        'The paper says that the DLCM has "34 % fewer FLOPs", and that inference FLOPs are matched, both at R = 4. Its '
        "forward FLOPs per token over those of what it is compared with:",
        claims_table(),
        claims_in_words(),
        "![FLOPs over those of the LLaMA](accounting.png)",
        "## Table 2, the mean of its rows",
        markdown_table(
            ("task", "DLCM", "baseline", "difference"),
            [
                *((task, f"{a:.2f}", f"{b:.2f}", f"{a - b:+.2f}") for task, (a, b) in TABLE_2.items()),
                (
                    "**mean of the rows**",
                    *(f"**{mean:.2f}**" for mean in table_2_means()),
                    f"**{gain(table_2_means())}**",
                ),
                ("average as printed", *(f"{mean:.2f}" for mean in TABLE_2_AVERAGE), gain(TABLE_2_AVERAGE)),
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def table_2_means() -> tuple[float, float]:
    return fmean(ours for ours, _ in TABLE_2.values()), fmean(theirs for _, theirs in TABLE_2.values())


def gain(means: tuple[float, float]) -> str:
    return f"{means[0] - means[1]:+.2f}"


def claims_table() -> str:
    """Ratios of FLOPs at several R, and the R that the paper's two claims would need."""

    def line(name: str, reading: str) -> list[str | None]:
        width = READINGS[reading]
        needed = [tokens_per_concept_at(name, width, wanted) for wanted in (1 - CLAIMED_SAVING, 1.0)]
        return [
            name,
            reading,
            *(f"{flops_ratio(name, width, ratio):.3f}" for ratio in RATIOS),
            *(None if r is None else f"{r:.2f}" for r in needed),
        ]

    header = ("counted", "reading", *(f"R = {ratio:g}" for ratio in RATIOS))
    return markdown_table(
        (*header, "R for 34 % fewer", "R for equal FLOPs"), (line(name, r) for name in ACCOUNTINGS for r in READINGS)
    )


def claims_in_words() -> str:
    """Where the claims hold within 2 points, by the ratios."""

    def holds(wanted: float) -> str:
        found = [
            f"R = {ratio:g} with {reading}, counting {name}"
            for name in ACCOUNTINGS
            for reading, width in READINGS.items()
            for ratio in RATIOS
            if abs(flops_ratio(name, width, ratio) - wanted) <= 0.02
        ]
        return "; ".join(found) if found else "none of these"

    return (
        f'Within 2 points, "34 % fewer" holds for: {holds(1 - CLAIMED_SAVING)}.  \n'
        f'Within 2 points, "matched" holds for: {holds(1.0)}.'
    )


def plot(path: Path) -> None:
    """Writes a PNG: FLOPs over the LLaMA's against R, both readings, everything counted."""
    figure = Figure(figsize=(6.2, 4.0), dpi=150, layout="constrained")
    axes = figure.subplots()
    name, ratios = next(iter(ACCOUNTINGS)), [1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0]
    for colour, (reading, width) in zip(PALETTE, READINGS.items(), strict=False):
        values = [flops_ratio(name, width, ratio) for ratio in ratios]
        axes.plot(ratios, values, color=colour, marker="o", markersize=4, label=reading)
    for level, text in ((1.0, "matched"), (1 - CLAIMED_SAVING, "34 % fewer")):
        axes.axhline(level, color="black", linewidth=0.8, linestyle="--")
        axes.text(ratios[0], level, text, va="bottom", fontsize=8)
    axes.set_xscale("log", base=2)
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    finish(axes, "Table 3: forward FLOPs of the DLCM over the LLaMA's", "tokens per concept, R", "ratio")
    figure.savefig(path)


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m eval.accounting", description="Checks the closed forms of costs.")
    parser.add_argument("--output", type=Path, default=Path("docs"), help="where to write (%(default)s)")
    output = parser.parse_args(arguments).output
    recorded = record()
    runs = sorted(path for name in ("dlcm", "llama") for path in CONFIGS.glob(f"*/{name}.yaml"))
    built = {f"{path.parent.name}/{path.stem}": parameters_built(path) for path in runs}
    counted = against_the_counter()
    bars = must_show(built, counted)
    write_json(
        output / "results" / "accounting.json",
        recorded,
        bars,
        parameters={name: {"formula": ours, "built": theirs} for name, (ours, theirs) in built.items()},
        counter=[
            {"model": row.model, "stage": row.stage, "counter": row.counter, "formula": row.formula} for row in counted
        ],
        table_3=by_formula(),
        ratios={
            name: {
                reading: {str(r): flops_ratio(name, width, r) for r in RATIOS} for reading, width in READINGS.items()
            }
            for name in ACCOUNTINGS
        },
        table_2={"means": table_2_means(), "printed": TABLE_2_AVERAGE},
    )
    (output / "accounting.md").write_text(page(recorded, bars, counted), encoding="utf-8")
    plot(output / "accounting.png")
    print(f"{bars_table(bars)}\n\n{claims_table()}\n\n{claims_in_words()}\n\nfiles are in {output}")


if __name__ == "__main__":
    sys.exit(main())
