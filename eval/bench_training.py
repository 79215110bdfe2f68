"""A training step's speed on one GPU: each DLCM beside its LLaMA, in one process.

    python -m eval.bench_training [--pairs small medium table3] [--models dlcm llama]
                                   [--parts throughput accumulation breakdown length]
                                   [--set KEY=VALUE ...] [--output docs/results]
    python -m eval.bench_training --merge EARLIER/training.json ...

Every part may be measured alone; `--merge` adds what earlier calls measured, and alone measures nothing. Writes
training.csv, training.json, training.md and training.png to `--output`. `--set batch.rows=1`, for example, overrides
the configurations of all models: such rows stand beside the others, and no bar looks at them.

    throughput     steps of one micro-batch, else as the pair is configured: tokens/s, TFLOP/s, MFU, peak memory
    accumulation   the same in steps of as many micro-batches as configured, where that is more than one; ragged alone
    breakdown      steps of one micro-batch, stage by stage
    length         the Table 3 pair on documents of 1K to 64K tokens

A step is the trainer's own (train/step.py): forward, backward, clipping and AdamW under bf16 autocast, compiled. Its
input is random tokens in windows of full length, one document each, as pretraining packs them.
An untrained detector is far from its ratio, so boundaries are drawn with probability 1 / R after the learned scores
have been computed: concepts are ragged, and what the detector costs is in the time.

FLOPs are 3 forwards of `dlcm.flops` at the tokens per concept that the steps really had; MFU is of the datasheet's peak
(train/utilisation.py). What is computed besides is not counted: replication, room for concepts that stays empty, passes
that ran again because there was too little of it (`misses`), recomputed activations.

`length` keeps T at 65,536 tokens in a step, one document of 64K or 64 of 1K: so nothing but attention changes with the
length, and one compilation serves all. Blocks are recomputed in the backward pass (activation_checkpointing=full), for
both models at every length, since nothing else would fit at this T.
"""

import argparse
import functools
import gc
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dlcm import DLCMConfig, DLCMForCausalLM, LlamaBaselineForCausalLM
from dlcm.attention import resolve_backend
from dlcm.blocks import TransformerStack, recompute_blocks_, token_block_shape
from dlcm.boundary import LearnedDetector
from dlcm.compilation import compile_blocks_
from dlcm.config import CrossAttentionBackend
from dlcm.layout import PackedLayout
from eval.bench import Row, bars_table, merge_records, one_line, record, tell, write_csv, write_json
from eval.bench_training_report import (
    PAIRS,
    PARTS,
    merge_rows,
    must_show,
    page,
    plot,
    summary,
)
from eval.loading import EvaluationError, report_errors
from train.config import build_model_config, load_run_config
from train.data import PackedBatch
from train.distributed import Ranks
from train.parallel import distribute
from train.pretrain import build_optimizer
from train.step import (
    Model,
    StepSums,
    collector_whole_afterwards,
    forward_backward,
    model_flops,
    over_ranks,
    spare_the_collector,
    update_parameters,
    uses_bf16,
)
from train.utilisation import datasheet_peak, utilisation

CONFIGS = Path(__file__).parent.parent / "configs"
CROSS_ATTENTIONS: dict[str, tuple[CrossAttentionBackend | None, ...]] = {
    "dlcm": ("ragged", "replicated"),
    "llama": (None,),
}
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768, 65536)
LENGTH_TOKENS = 65536  # in a step of the length part
WARM_UP_STEPS, STEPS, SECONDS = 4, 12, 2  # measured are at least so many steps, and at least for so long
BATCHES = 4  # different ones, in turn


class RatioDetector(LearnedDetector):
    """A learned detector's work, but boundaries with probability 1 / R whatever it finds."""

    def __init__(self, config: DLCMConfig):
        super().__init__(config)
        self.ratio = config.target_ratio

    def decide(self, probability_T: Tensor, tokens: PackedLayout, generator: torch.Generator | None) -> Tensor:
        uniform_T = torch.rand(tokens.total, generator=generator, device=probability_T.device)
        return (uniform_T < 1 / self.ratio) | tokens.is_first_T


class StageClock:
    """Where the device's time goes: what lies between two marks is charged to what the later one names."""

    def __init__(self, device: torch.device):
        self._on_gpu = device.type == "cuda"
        self._marks: list[tuple[tuple[str, str] | None, Any]] = []

    def mark(self, which: str, stage: str) -> None:
        """The end of a stage."""
        self._marks.append(((which, stage), self._now()))

    def start(self) -> None:
        """What lies before is nobody's."""
        self._marks.append((None, self._now()))

    def read(self) -> dict[tuple[str, str], float]:
        """Milliseconds of each stage, since the last reading."""
        if self._on_gpu:
            torch.cuda.synchronize()
        totals: dict[tuple[str, str], float] = {}
        for (_, before), (charged, now) in zip(self._marks, self._marks[1:], strict=False):
            if charged is not None:
                ms = before.elapsed_time(now) if self._on_gpu else 1000 * (now - before)
                totals[charged] = totals.get(charged, 0.0) + ms
        self._marks.clear()
        return totals

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


@contextmanager
def watched(model: Model, clock: StageClock) -> Iterator[None]:
    """Marks the stages of every forward and backward pass meanwhile.

    A stack of blocks marks its own beginning and end; what lies between two stacks is one stage. In the backward pass a
    stage has ended when the gradient of its input is complete.
    """
    around = {
        "encoder": ("embedding", "segmentation and pooling"),
        "backbone": ("segmentation and pooling", "cross-attention"),
        "decoder": ("cross-attention" if isinstance(model, DLCMForCausalLM) else "embedding", "head and loss"),
    }

    def watch(name: str, stack: nn.Module) -> list[Any]:
        before, after = around[name]

        def enter(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            clock.mark("forward", before)
            inputs[0].register_hook(lambda _: clock.mark("backward", name))

        def leave(_: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            clock.mark("forward", name)
            output.register_hook(lambda _: clock.mark("backward", after))

        return [stack.register_forward_pre_hook(enter), stack.register_forward_hook(leave)]

    handles = [
        model.register_forward_pre_hook(lambda *_: clock.start()),
        model.register_forward_hook(lambda *_: clock.mark("forward", "head and loss")),
    ]
    for name, stack in model.named_children():
        if isinstance(stack, TransformerStack):
            handles += watch(name, stack)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Bench:
    """A model in training on random tokens."""

    def __init__(
        self,
        pair: str,
        architecture: str,
        overrides: Sequence[str],
        device: torch.device,
        ranks: Ranks | None = None,
    ):
        """Builds the model where it is to run.

        Args:
            pair: a directory of configs/.
            architecture: dlcm or llama.
            overrides: `key=value`, on top of the configuration.
            device: of everything, on this rank.
            ranks: those that train it together, as the run's `parallel` says; None: this process alone.

        Raises:
            ConfigError: overrides that do not fit the configuration.
        """
        run = load_run_config(CONFIGS / pair / f"{architecture}.yaml", overrides)
        self.configured_micro_batches = run.batch.accumulation
        self.run, self.device, self.ranks = run, device, Ranks() if ranks is None else ranks
        config = build_model_config(run)
        torch.manual_seed(run.seed)
        self.model: Model
        with device:
            if isinstance(config, DLCMConfig):
                self.model = DLCMForCausalLM(config)
                if isinstance(self.model.detector, LearnedDetector):
                    detector = RatioDetector(config)
                    detector.load_state_dict(self.model.detector.state_dict())
                    self.model.detector = detector
            else:
                self.model = LlamaBaselineForCausalLM(config)
        self.parallel = distribute(self.model, run.parallel, device, self.ranks, uses_bf16(run, device))
        self.optimizer = build_optimizer(run, self.model)
        recompute_blocks_(self.model, run.activation_checkpointing == "full")
        if run.compile:
            compile_blocks_(self.model)
        self.model.train()
        self.set_documents(run.batch.rows, run.data.sequence_length)
        self.set_micro_batches(1)
        self._steps = 0

    def set_cross_attention(self, backend: CrossAttentionBackend | None) -> None:
        """How the next steps attend to concepts; None for a model that has none."""
        if backend is not None:
            assert isinstance(self.model, DLCMForCausalLM)
            for cross in self.model.cross_attentions:
                cross.backend = backend

    def set_documents(self, documents: int, length: int) -> None:
        """What the next steps train on: so many documents of so many tokens."""
        generator = torch.Generator(self.device).manual_seed(self.run.seed + self.ranks.rank)
        self.documents, self.length = documents, length
        self.batches = []
        for _ in range(BATCHES):
            ids_T = torch.randint(
                self.model.config.vocab_size, (documents * length,), generator=generator, device=self.device
            )
            self.batches.append(
                PackedBatch(
                    input_ids=ids_T,
                    labels=ids_T,
                    cu_seqlens=torch.arange(documents + 1, dtype=torch.int32) * length,
                    max_seqlen=length,
                    num_targets=len(ids_T) - documents,
                    target_bytes=float(len(ids_T)),
                )
            )

    def set_micro_batches(self, number: int) -> None:
        """How many the next steps have."""
        self.run.batch.accumulation = number

    @property
    def misses(self) -> int:
        """Micro-batches whose concepts had not been given room enough, since the beginning."""
        return self.model.concept_rooms.misses if isinstance(self.model, DLCMForCausalLM) else 0

    def step(self, clock: StageClock | None = None) -> tuple[Tensor, Tensor]:
        """One optimiser step; its sums over ranks, and whether it was skipped, on the device."""
        first, number = self._steps, self.run.batch.accumulation
        batches = [self.batches[index % BATCHES] for index in range(first, first + number)]
        sums = over_ranks(forward_backward(self.run, self.parallel, batches, self._steps, self.ranks), self.ranks)
        if clock is not None:
            clock.mark("backward", "embedding")
        skipped = update_parameters(self.optimizer, sums, self.run.optimizer.clip_norm).skipped
        if clock is not None:
            clock.mark("update", "optimiser")
        self._steps += 1
        return sums, skipped

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def describe(self) -> Row:
        """The conditions of a measurement."""
        config, run = self.model.config, self.run
        dtype = torch.bfloat16 if uses_bf16(run, self.device) else torch.float32
        return {
            "sequence_length": self.length,
            "documents": self.documents,
            "micro_batches": run.batch.accumulation,
            "parameters": self.model.num_parameters(),
            "attention": resolve_backend(
                config.attention_backend, self.device, dtype, token_block_shape(config).head_dim
            ),
            "compiled": run.compile,
            "activation_checkpointing": run.activation_checkpointing,
        }


def measure_throughput(bench: Bench, warm_up: int, steps: int, seconds: float) -> Row:
    """Speed of all ranks and memory of this one, in at least `steps` steps, and at least `seconds`: 0, if there are
    several ranks, which must all do as many steps.

    Raises:
        EvaluationError: a step was skipped, which would have been cheaper than others.
        UtilisationError: an MFU above 1.
    """
    for _ in range(warm_up):
        bench.step()
    spare_the_collector()
    bench.synchronize()
    if bench.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    outcomes: list[tuple[Tensor, Tensor]] = []
    misses = bench.misses
    began = time.perf_counter()
    while len(outcomes) < steps or time.perf_counter() - began < seconds:
        outcomes.append(bench.step())
        if len(outcomes) % steps == 0:
            bench.synchronize()  # the host is not to run far ahead of what is measured
    bench.synchronize()
    step_seconds = (time.perf_counter() - began) / len(outcomes)
    if any(bool(skipped) for _, skipped in outcomes):
        raise EvaluationError("a measured step was skipped: its loss or gradient was not finite")
    sums = StepSums(*torch.stack([sums for sums, _ in outcomes]).mean(0).tolist())
    needed, peak = model_flops(sums, bench.model), datasheet_peak(bench.device)
    on_gpu = bench.device.type == "cuda"
    return {
        "steps": len(outcomes),
        "misses": bench.misses - misses,
        "step_ms": 1000 * step_seconds,
        "tokens_per_second": sums.tokens / step_seconds,
        "tokens_per_concept": sums.tokens / sums.concepts if sums.concepts else None,
        "flops_per_token": needed / sums.tokens,
        "tflops": needed / step_seconds / 1e12,
        "mfu": None if peak is None else utilisation(needed / step_seconds, peak * bench.ranks.size),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
        "reserved_gb": torch.cuda.max_memory_reserved() / 1e9 if on_gpu else None,
    }


def measure_breakdown(bench: Bench, warm_up: int, steps: int) -> list[Row]:
    """A row for each stage: milliseconds a step, on average."""
    clock = StageClock(bench.device)
    with watched(bench.model, clock):
        for _ in range(warm_up):
            bench.step(clock)
        clock.read()
        for _ in range(steps):
            bench.step(clock)
    return [{"pass": which, "stage": stage, "ms": ms / steps} for (which, stage), ms in clock.read().items()]


def bench_model(
    pair: str, architecture: str, parts: Sequence[str], overrides: Sequence[str], device: torch.device
) -> list[Row]:
    """All of one model of a pair but its lengths, the DLCM with each kind of cross-attention.

    What cannot be done is told in a row's `note`.
    """
    key: Row = {"pair": pair, "model": architecture}
    rows: list[Row] = []

    def add(part: str, cross_attention: CrossAttentionBackend | None, **values: Any) -> None:
        conditions = {"cross_attention": cross_attention, "overrides": " ".join(overrides)}
        rows.append({"part": part, **key, **conditions, **values})
        tell(rows[-1])

    usual, *_ = crosses = CROSS_ATTENTIONS[architecture]
    missing = [
        (part, cross)
        for cross in crosses
        for part in parts
        if part != "length" and (part != "accumulation" or cross == usual)
    ]
    try:
        bench = Bench(pair, architecture, overrides, device)
        while missing:
            part, cross_attention = missing[0]
            bench.set_cross_attention(cross_attention)
            bench.set_micro_batches(bench.configured_micro_batches if part == "accumulation" else 1)
            if part == "throughput":
                measured = [measure_throughput(bench, WARM_UP_STEPS, STEPS, SECONDS)]
            elif part == "accumulation":
                several = bench.configured_micro_batches > 1
                measured = [measure_throughput(bench, warm_up=1, steps=2, seconds=0)] if several else []
            else:
                measured = measure_breakdown(bench, WARM_UP_STEPS, STEPS)
            for values in measured:
                add(part, cross_attention, **bench.describe(), **values)
            del missing[0]
    except (RuntimeError, EvaluationError) as error:  # too little memory, a backend that is not there
        for part, cross_attention in missing:
            add(part, cross_attention, note=one_line(error))
    return rows


def bench_lengths(pair: str, architecture: str, overrides: Sequence[str], device: torch.device) -> list[Row]:
    """Throughput of one model of a pair on ever longer documents, `LENGTH_TOKENS` in a step."""
    cross_attention = CROSS_ATTENTIONS[architecture][0]
    key: Row = {"part": "length", "pair": pair, "model": architecture, "cross_attention": cross_attention}
    key["overrides"] = " ".join(overrides)
    settings = [f"data.sequence_length={LENGTH_TOKENS}", f"model.max_position_embeddings={LENGTH_TOKENS}"]
    settings += ["batch.rows=1", "activation_checkpointing=full"]
    rows: list[Row] = []
    try:
        bench = Bench(pair, architecture, [*settings, *overrides], device)
        bench.set_cross_attention(cross_attention)
        for length in LENGTHS:
            bench.set_documents(LENGTH_TOKENS // length, length)
            measured = measure_throughput(bench, warm_up=1 if rows else 3, steps=2, seconds=0)
            rows.append({**key, **bench.describe(), **measured})
            tell(rows[-1])
    except (RuntimeError, EvaluationError) as error:
        rows.append({**key, "sequence_length": LENGTHS[len(rows)], "note": one_line(error)})
        tell(rows[-1])
    return rows


@contextmanager
def released_memory() -> Iterator[None]:
    """What was allocated and compiled inside is gone afterwards."""
    with collector_whole_afterwards():
        yield
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    parts: Sequence[str] = options.parts if options.parts is not None else () if options.merge else PARTS
    sources = [json.loads(path.read_text(encoding="utf-8")) for path in options.merge]
    rows = merge_rows([{"commit": source["commit"], **row} for row in source["rows"]] for source in sources)
    if parts:
        if not torch.cuda.is_available():
            raise EvaluationError("bench_training times training on a GPU, but torch sees no CUDA device")
        sources.append(record(options.commit))
    recorded, output = merge_records(sources), Path(options.output)

    for measure in jobs(options.pairs, options.models, parts, options.set, torch.device("cuda")):
        with released_memory():
            rows = merge_rows([rows, [{"commit": sources[-1]["commit"], **row} for row in measure()]])
        write_json(
            output / "training.json", recorded, must_show(rows), rows=rows
        )  # should a later one not come to an end

    bars = must_show(rows)
    write_json(output / "training.json", recorded, bars, rows=rows)
    write_csv(output / "training.csv", rows)
    (output / "training.md").write_text(page(recorded, bars, rows), encoding="utf-8")
    plot(output / "training.png", rows)
    print(f"\n{summary(rows)}\n\n{bars_table(bars)}\n\nfiles are in {output}")


def jobs(
    pairs: Sequence[str], models: Sequence[str], parts: Sequence[str], overrides: Sequence[str], device: torch.device
) -> Iterator[Callable[[], list[Row]]]:
    """What is to be measured, model by model."""
    for pair, architecture in itertools.product(pairs, models):
        if set(parts) - {"length"}:
            yield functools.partial(bench_model, pair, architecture, parts, overrides, device)
    for architecture in models:
        if "length" in parts:
            yield functools.partial(bench_lengths, "table3", architecture, overrides, device)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench_training", description="Times training steps of DLCMs and their LLaMAs on one GPU."
    )
    parser.add_argument("--pairs", nargs="+", choices=PAIRS, default=PAIRS)
    parser.add_argument("--models", nargs="+", choices=CROSS_ATTENTIONS, default=list(CROSS_ATTENTIONS))
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all, or none with --merge")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], metavar="JSON", help="results of earlier calls")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="overrides of every configuration")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="where to write (%(default)s)")
    parser.add_argument("--commit", help="of the code, where it does not run in its git checkout")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
