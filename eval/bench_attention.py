"""Attention from tokens to concepts on one GPU: concept replication, FlexAttention, and the ragged kernel.

    python -m eval.bench_attention [--parts errors times] [--paths flex ragged ...] [--ratios 4 ...] [--quick]
                                   [--output docs/results]
    python -m eval.bench_attention --merge EARLIER/attention.json ...


The paper's Table 6 and Fig. 9, with the path it does not have. All paths compute the same function, attention of every
token over the slots it may see, each counted as often as replication would (see dlcm/cross_attention.py): batch 1, 32
heads, bf16, 2K to 32K tokens. Writes attention.csv, attention_errors.csv, attention.json, attention.md, attention.png.
`--merge` adds what earlier calls measured, and alone measures nothing.

    replication   keys and values gathered to token length, then causal varlen attention by each FlashAttention there is
    flex          FlexAttention over T x S, compiled: block mask, and the log-count bias as score_mod
    flex_static   the same compiled for one T and one S, padded to a multiple of 128: faster, if S never changed
    ragged        dlcm/kernels/ragged_attention.py

A path begins with what the model has, a ConceptLayout. So `ms` includes FlexAttention's block mask and bias vectors,
and ragged's SlotGeometry; `prepared_ms` leaves them out. Times are those of kernels: CUDA graphs replayed where the
path can be captured, otherwise events around the calls; medians of 12 or more, over two sets of random inputs in turn,
the L2 cache overwritten before each. `eager_ms` is the time from call to end with the launches in it. Forward means
the forward of training, which keeps what the backward needs. TFLOP/s are those of the function (2 products of 2 FLOPs
for each pair of token and visible slot, 3.5 times that with the backward): what else replication does is not counted.
"""

import argparse
import functools
import gc
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from dlcm.attention import importable
from dlcm.config import AttentionBackend, SlotWeighting
from dlcm.cross_attention import masked_attention, replicated_attention
from dlcm.layout import ConceptLayout, PackedLayout, SlotGeometry
from eval.bench import Row, merge_records, one_line, record, write_csv, write_json
from eval.bench_attention_report import LABELS, PARTS, RESULTS, merge_rows, must_show, page, plot, summary
from eval.loading import EvaluationError, report_errors

HEADS = 32
LENGTHS = (2048, 4096, 8192, 16384, 32768)
EAGER_LENGTHS = (2048, 8192)
INPUT_SETS = 2
FLEX_BLOCK = 128  # FlexAttention's blocks are so large
BACKWARD_FLOPS = 2.5  # of the forward's: five products instead of two
FEWEST, MOST, ENOUGH_MS = 12, 40, 120  # repetitions of a timing, and the time after which only the fewest are made
Pass = Literal["forward", "forward_backward"]
PASSES: tuple[Pass, ...] = ("forward", "forward_backward")


@dataclass(frozen=True, slots=True)
class Case:
    """One document of `length` tokens with a boundary every `ratio` tokens, or with probability 1 / ratio at each."""

    length: int
    boundaries: Literal["random", "regular"]
    ratio: int
    head_dim: int
    heads: int = HEADS

    def boundary_T(self, seed: int) -> Tensor:
        """b_t of the document, (T,) bool; its first token is a boundary."""
        index_T = torch.arange(self.length)
        if self.boundaries == "regular":
            return index_T % self.ratio == 0
        uniform_T = torch.rand(self.length, generator=torch.Generator().manual_seed(seed))
        return (uniform_T < 1 / self.ratio) | (index_T == 0)


def all_cases(lengths: Sequence[int] = LENGTHS, quick: bool = False) -> list[Case]:
    """Random boundaries at R = 2, 4, 8, and the paper's interval of 6; at head dimension 128, R = 4 alone.

    What is to be shown comes first. `quick` keeps R = 4 at head dimension 64.
    """
    if quick:
        return [Case(length, "random", 4, 64) for length in lengths]
    settings: list[tuple[Literal["random", "regular"], int, int]] = [("random", 4, 64), ("random", 4, 128)]
    settings += [("regular", 6, 64), ("random", 8, 64), ("random", 2, 64)]
    return [Case(length, kind, ratio, head_dim) for kind, ratio, head_dim in settings for length in lengths]


@dataclass(frozen=True, slots=True)
class Problem:
    """Random inputs of one cross-attention, and the gradient of its output."""

    q_THN: Tensor
    k_SKN: Tensor
    v_SKN: Tensor
    dout_THN: Tensor
    layout: ConceptLayout

    @property
    def inputs(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.q_THN, self.k_SKN, self.v_SKN


def draw_problem(
    lengths: Sequence[int],
    boundary_T: Tensor,
    heads: int,
    kv_heads: int,
    head_dim: int,
    *,
    seed: int,
    device: torch.device,
    dtype: torch.dtype,
) -> Problem:
    """Documents of the given lengths, cut at `boundary_T`, under standard normal queries, keys, values and gradient."""
    cu_seqlens_D1 = torch.tensor([0, *lengths]).cumsum(0)
    tokens = PackedLayout.from_cu_seqlens(cu_seqlens_D1, len(boundary_T), device=device)
    layout = ConceptLayout.from_boundaries(tokens, boundary_T.to(device), "closed")
    generator = torch.Generator(device).manual_seed(seed)

    def normal(rows: int, number: int) -> Tensor:
        return torch.randn(rows, number, head_dim, generator=generator, device=device).to(dtype)

    q_THN, dout_THN = normal(tokens.total, heads), normal(tokens.total, heads)
    k_SKN, v_SKN = normal(layout.num_slots, kv_heads), normal(layout.num_slots, kv_heads)
    for x in (q_THN, k_SKN, v_SKN):
        x.requires_grad_()
    return Problem(q_THN, k_SKN, v_SKN, dout_THN, layout)


def visible_pairs(layout: ConceptLayout) -> int:
    """Pairs of a token and a slot that it sees: the products of queries and keys that the function needs."""
    return int((layout.slot_T - layout.cu_slots_D1[layout.tokens.document_T] + 1).sum())


@dataclass(frozen=True, slots=True)
class AttentionPath:
    """One way to attend.

    Attributes:
        prepare: what depends on the layout alone; None where there is nothing of the kind.
        attend: (problem, what was prepared) to (T, H, N).
        package: a module it needs, which not everybody has.
        active: context that it runs in.
    """

    prepare: Callable[[ConceptLayout], Any] | None
    attend: Callable[[Problem, Any], Tensor]
    package: str | None = None
    active: Callable[[], AbstractContextManager[None]] = nullcontext

    @property
    def is_installed(self) -> bool:
        return self.package is None or importable(self.package)

    def run(self, which: Pass, problem: Problem, prepared: Any = None) -> tuple[Tensor, ...]:
        """(out,), or (out, dQ, dK, dV). Prepares first, unless that is given."""
        if prepared is None and self.prepare is not None:
            prepared = self.prepare(problem.layout)
        out_THN = self.attend(problem, prepared)
        if which == "forward":
            return (out_THN,)
        return (out_THN, *torch.autograd.grad(out_THN, problem.inputs, problem.dout_THN))


def replication(
    backend: AttentionBackend,
    package: str | None = None,
    active: Callable[[], AbstractContextManager[None]] = nullcontext,
) -> AttentionPath:
    """Concept replication with one of the causal varlen attentions."""

    def attend(problem: Problem, _: Any) -> Tensor:
        return replicated_attention(*problem.inputs, problem.layout, backend)

    return AttentionPath(None, attend, package, active)


@contextmanager
def torch_flash_attention(version: Literal["FA3", "FA4"]) -> Iterator[None]:
    """torch's own attention runs another FlashAttention meanwhile."""
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    activate_flash_attention_impl(version)
    try:
        yield
    finally:
        restore_flash_attention_impl()


class FlexPreparation(NamedTuple):
    """What FlexAttention is told about a layout."""

    block_mask: BlockMask
    score_mod: Callable[..., Tensor]
    padding: int  # slots that nobody sees, behind all others


def flex(compiled: Literal["dynamic", "static"] | None = "dynamic") -> AttentionPath:
    """FlexAttention from tokens to slots. Uncompiled it is slow and plain, and runs anywhere."""
    multiple = FLEX_BLOCK if compiled == "static" else 1

    def prepare(layout: ConceptLayout) -> FlexPreparation:
        geometry = SlotGeometry.from_layout(layout)
        oldest_T, newest_T = geometry.oldest_T, geometry.newest_T
        log_count_S, log_newest_T = (math.log(2) * x for x in (geometry.log2_count_S, geometry.log2_newest_T))
        padding = -layout.num_slots % multiple
        log_count_S = F.pad(log_count_S, (0, padding))

        def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return (s >= oldest_T[t]) & (s <= newest_T[t])

        def weighted(score: Tensor, b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
            return score + torch.where(s == newest_T[t], log_newest_T[t], log_count_S[s])

        build: Callable[..., BlockMask] = _compiled_create_block_mask() if compiled else create_block_mask
        shape = (len(newest_T), len(log_count_S))
        return FlexPreparation(build(sees, None, None, *shape, str(newest_T.device)), weighted, padding)

    def attend(problem: Problem, prepared: FlexPreparation) -> Tensor:
        q_1HTN, k_1KSN, v_1KSN = (x.transpose(0, 1)[None] for x in problem.inputs)
        if prepared.padding:
            k_1KSN, v_1KSN = (F.pad(x, (0, 0, 0, prepared.padding)) for x in (k_1KSN, v_1KSN))
        grouped = q_1HTN.shape[1] != k_1KSN.shape[1]
        attention: Any = _compiled_flex_attention(compiled == "dynamic") if compiled else flex_attention
        out_1HTN = attention(q_1HTN, k_1KSN, v_1KSN, prepared.score_mod, prepared.block_mask, enable_gqa=grouped)
        return out_1HTN[0].transpose(0, 1)

    # One compilation serves all lengths, or every length has its own, of which torch otherwise allows eight.
    active = functools.partial(torch._dynamo.config.patch, recompile_limit=1000)
    return AttentionPath(prepare, attend, active=active if compiled == "static" else nullcontext)


@functools.cache
def _compiled_flex_attention(dynamic: bool) -> Callable[..., Any]:
    return torch.compile(flex_attention, dynamic=dynamic)


@functools.cache
def _compiled_create_block_mask() -> Callable[..., Any]:
    return torch.compile(create_block_mask, dynamic=True)


def ragged(weighting: SlotWeighting = "replication") -> AttentionPath:
    """The fused kernel, and the small tensors it reads the layout from."""
    from dlcm.kernels.ragged_attention import ragged_attention  # needs triton

    def attend(problem: Problem, geometry: SlotGeometry) -> Tensor:
        return ragged_attention(*problem.inputs, geometry)

    return AttentionPath(functools.partial(SlotGeometry.from_layout, weighting=weighting), attend)


def all_paths() -> dict[str, AttentionPath]:
    """Every path of the tables, installed or not."""
    fa3, fa4 = (functools.partial(torch_flash_attention, version) for version in ("FA3", "FA4"))
    return {
        "replicated_fa2": replication("torch_varlen"),
        "replicated_flash_attn": replication("flash_attn", "flash_attn.flash_attn_interface"),
        "replicated_fa3": replication("torch_varlen", "flash_attn_interface", fa3),
        "replicated_fa4_torch": replication("torch_varlen", "flash_attn.cute", fa4),
        "replicated_fa4": replication("flash_attn_4", "flash_attn.cute"),
        "flex": flex(),
        "flex_static": flex("static"),
        "ragged": ragged(),
    }


class Stopwatch:
    """Times on one GPU, in milliseconds."""

    def __init__(self, device: torch.device, quick: bool):
        self.fewest = 5 if quick else FEWEST
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._cover = torch.empty(2 * l2_bytes, dtype=torch.uint8, device=device)

    def kernels(self, runs: Sequence[Callable[[], Any]]) -> tuple[float, Literal["graph", "events"]]:
        """Median time of the runs' kernels, and how it was taken."""
        try:
            graphs = [_captured(run) for run in runs]
        except Exception:  # whatever keeps a path from being captured: it is timed with its launches
            torch.cuda.synchronize()
            return self._median(runs), "events"
        return self._median([graph.replay for graph in graphs]), "graph"

    def eager(self, runs: Sequence[Callable[[], Any]]) -> float:
        """Median time from the call of a run to the end of its last kernel, the GPU being idle at the call."""

        def once(run: Callable[[], Any]) -> float:
            self._cover.zero_()
            torch.cuda.synchronize()
            start = time.perf_counter()
            run()
            torch.cuda.synchronize()
            return 1000 * (time.perf_counter() - start)

        for run in runs:
            run()
        return statistics.median(once(runs[index % len(runs)]) for index in range(self.fewest))

    def _median(self, runs: Sequence[Callable[[], Any]]) -> float:
        def once(run: Callable[[], Any]) -> float:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            self._cover.zero_()  # also keeps the GPU busy while the run is being launched
            start.record()
            run()
            end.record()
            end.synchronize()
            return start.elapsed_time(end)

        first = statistics.median(once(run) for run in [*runs, *runs])
        repetitions = max(self.fewest, min(MOST, round(ENOUGH_MS / first)))
        return statistics.median(once(runs[index % len(runs)]) for index in range(repetitions))


def _captured(run: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    warm_up = torch.cuda.Stream()
    warm_up.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(warm_up):
        for _ in range(2):
            run()
    torch.cuda.current_stream().wait_stream(warm_up)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


def extra_bytes(run: Callable[[], tuple[Tensor, ...]]) -> int:
    """The most memory that a run held at once, beyond its inputs and what it returns."""
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before - sum(result.nbytes for result in results)


def measure(case: Case, path: AttentionPath, problems: Sequence[Problem], stopwatch: Stopwatch) -> Row:
    """The numbers of one path in one case."""
    row: Row = {}
    flops = 4 * case.heads * case.head_dim * visible_pairs(problems[0].layout)
    for which in PASSES:
        whole = [functools.partial(path.run, which, problem) for problem in problems]
        whole[0]()  # compiles
        ms, timed_by = stopwatch.kernels(whole)
        row["timed_by"] = "events" if "events" in (timed_by, row.get("timed_by")) else "graph"
        row[f"{which}_ms"] = row[f"{which}_prepared_ms"] = ms
        if path.prepare is not None:
            prepared = [
                functools.partial(path.run, which, problem, path.prepare(problem.layout)) for problem in problems
            ]
            row[f"{which}_prepared_ms"], _ = stopwatch.kernels(prepared)
        if case.length in EAGER_LENGTHS:
            row[f"{which}_eager_ms"] = stopwatch.eager(whole)
        work = flops * (1 if which == "forward" else 1 + BACKWARD_FLOPS)
        row[f"{which}_tflops"] = work / row[f"{which}_prepared_ms"] / 1e9
    row["extra_bytes"] = extra_bytes(functools.partial(path.run, "forward_backward", problems[0]))
    return row


def bench(
    cases: Sequence[Case], paths: dict[str, AttentionPath], device: torch.device, quick: bool
) -> Iterator[list[Row]]:
    """Case by case, a row for every path. What a path cannot do is told in its `note`; the others go on."""
    stopwatch, given_up = Stopwatch(device, quick), set()
    for case in cases:
        problems = [
            draw_problem(
                [case.length],
                case.boundary_T(seed),
                case.heads,
                case.heads,
                case.head_dim,
                seed=seed,
                device=device,
                dtype=torch.bfloat16,
            )
            for seed in range(INPUT_SETS)
        ]
        rows = []
        for name, path in paths.items():
            row: Row = {"path": name, **asdict(case), "slots": problems[0].layout.num_slots}
            if not path.is_installed:
                row["note"] = f"{path.package} is not installed"
            elif name in given_up:
                row["note"] = "not tried again"
            else:
                try:
                    with path.active():
                        row |= measure(case, path, problems, stopwatch)
                except Exception as error:  # one broken build of an optional package must not cost the others' results
                    row["note"] = one_line(error)
                    given_up |= {name} if path.package else set()
            rows.append(row)
            print(progress_line(row), flush=True)
            torch.cuda.empty_cache()
        yield rows


def progress_line(row: Row) -> str:
    times = row.get("note") or "  ".join(f"{row[f'{which}_ms']:8.3f}" for which in PASSES)
    return f"{row['length']:6,} {row['boundaries']:8} {row['ratio']} x {row['head_dim']:3} {row['path']:22} {times}"


@dataclass(frozen=True, slots=True)
class ErrorCase:
    """Documents on which a path is held against float64."""

    lengths: tuple[int, ...]
    boundary_T: Tensor
    heads: int = 8
    kv_heads: int = 8


def error_cases() -> dict[str, ErrorCase]:
    """Ragged, one-concept, all-boundary and many-short-document inputs, a plain document, and grouped heads."""
    generator = torch.Generator().manual_seed(0)

    def drawn(tokens: int) -> Tensor:
        return torch.rand(tokens, generator=generator) < 1 / 4

    ragged_lengths = (700, 33, 1, 450, 864)
    short_lengths = tuple(torch.randint(1, 8, (256,), generator=generator).tolist())
    return {
        "ragged documents": ErrorCase(ragged_lengths, drawn(sum(ragged_lengths))),
        "one concept": ErrorCase((1024,), torch.arange(1024) == 0),
        "all boundary": ErrorCase((700, 324), torch.ones(1024, dtype=torch.bool)),
        "documents of 1 to 7 tokens": ErrorCase(short_lengths, drawn(sum(short_lengths))),
        "one document": ErrorCase((2048,), drawn(2048)),
        "grouped heads, 4 to 1": ErrorCase((2048,), drawn(2048), kv_heads=2),
    }


def relative_errors(actual: Sequence[Tensor], exact: Sequence[Tensor], dout_THN: Tensor) -> dict[str, float]:
    """|x - exact| / |exact| of out, dQ, dK, dV; |x - exact| / |dO| of a gradient that is exactly zero.

    Raises:
        EvaluationError: an error is not finite.
    """
    scale = dout_THN.double().norm()
    errors = {}
    for name, x, reference in zip(RESULTS, actual, exact, strict=True):
        size = reference.norm()
        errors[name] = float((x.double() - reference).norm() / (size if size > 1e-9 * scale else scale))
        if not math.isfinite(errors[name]):
            raise EvaluationError(f"{name} is not finite")
    return errors


def exact_results(problem: Problem, weighting: SlotWeighting) -> tuple[Tensor, ...]:
    """(out, dQ, dK, dV) by the dense masked softmax in float64, on the very inputs."""
    q_THN, k_SKN, v_SKN = (x.detach().double().requires_grad_() for x in problem.inputs)
    out_THN = masked_attention(q_THN, k_SKN, v_SKN, problem.layout, weighting)
    return (out_THN, *torch.autograd.grad(out_THN, (q_THN, k_SKN, v_SKN), problem.dout_THN.double()))


def bench_errors(device: torch.device) -> Iterator[list[Row]]:
    """Input by input, a row for each head dimension, dtype, weighting and path: relative errors against float64."""
    for name, case in error_cases().items():
        rows: list[Row] = []
        for head_dim, dtype in itertools.product((64, 128), (torch.bfloat16, torch.float16, torch.float32)):
            problem = draw_problem(
                case.lengths, case.boundary_T, case.heads, case.kv_heads, head_dim, seed=1, device=device, dtype=dtype
            )
            weightings: tuple[SlotWeighting, ...] = ("replication", "uniform")
            for weighting in weightings:
                exact = exact_results(problem, weighting)
                for path_name, path in paths_with_errors(weighting, dtype).items():
                    row: Row = {"input": name, "head_dim": head_dim, "dtype": str(dtype).removeprefix("torch.")}
                    row |= {"weighting": weighting, "path": path_name}
                    try:
                        row |= relative_errors(path.run("forward_backward", problem), exact, problem.dout_THN)
                    except Exception as error:
                        row["note"] = one_line(error)
                    rows.append(row)
        print(f"errors: {name}", flush=True)
        yield rows


def paths_with_errors(weighting: SlotWeighting, dtype: torch.dtype) -> dict[str, AttentionPath]:
    """Paths that can compute the function."""
    paths = {"ragged": ragged(weighting)}
    if weighting == "replication" and dtype != torch.float32:  # FlashAttention has half precision alone
        paths["replicated_fa2"] = replication("torch_varlen")
    return paths


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    parts: Sequence[str] = options.parts if options.parts is not None else () if options.merge else PARTS
    sources = [json.loads(path.read_text(encoding="utf-8")) for path in options.merge]
    rows, errors = (
        merge_rows([{"commit": source["commit"], **row} for row in source[name]] for source in sources)
        for name in ("rows", "errors")
    )
    if parts:
        if not torch.cuda.is_available():
            raise EvaluationError("bench_attention times GPU kernels, but torch sees no CUDA device; run it on a GPU")
        sources.append(record(options.commit))
    recorded, output = merge_records(sources), Path(options.output)
    began = time.perf_counter()

    def add(to: list[Row], measured: list[Row]) -> None:
        to[:] = merge_rows([to, [{"commit": sources[-1]["commit"], **row} for row in measured]])
        write_json(output / "attention.json", recorded, must_show(rows, errors), rows=rows, errors=errors)

    if "errors" in parts:
        for of_input in bench_errors(torch.device("cuda")):
            add(errors, of_input)  # at once, should the rest not come to an end
    if "times" in parts:
        cases = all_cases((2048, 8192), quick=True) if options.quick else all_cases()
        cases = [case for case in cases if case.ratio in options.ratios]
        paths = {name: path for name, path in all_paths().items() if name in options.paths}
        for of_case in bench(cases, paths, torch.device("cuda"), options.quick):
            add(rows, of_case)

    bars = must_show(rows, errors)
    write_json(output / "attention.json", recorded, bars, rows=rows, errors=errors)
    write_csv(output / "attention.csv", rows)
    write_csv(output / "attention_errors.csv", errors)
    (output / "attention.md").write_text(page(recorded, bars, rows, errors), encoding="utf-8")
    plot(output / "attention.png", rows)
    print(f"\n{summary(rows, errors, bars)}\n\n{time.perf_counter() - began:.0f} s; files are in {output}")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench_attention", description="Times attention from tokens to concepts on one GPU."
    )
    paths, ratios = list(LABELS), sorted({case.ratio for case in all_cases()})
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: all, or none with --merge")
    parser.add_argument("--paths", nargs="+", choices=paths, default=paths, help="of the times")
    parser.add_argument("--ratios", nargs="+", type=int, choices=ratios, default=ratios, help="of the times")
    parser.add_argument("--quick", action="store_true", help="2K and 8K tokens, R = 4, few repetitions")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], metavar="JSON", help="results of earlier calls")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="where to write (%(default)s)")
    parser.add_argument("--commit", help="of the code, where it does not run in its git checkout")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
