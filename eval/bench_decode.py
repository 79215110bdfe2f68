"""Decoding and prefill on one GPU: each DLCM beside its LLaMA, in one process, weights and caches in bf16.

    python -m eval.bench_decode [--parts decode prefill compiled trained] [--pairs table3 medium small]
                                 [--contexts 1024 8192 32768] [--batches 1 16 64] [--ratio R] [--steps 256]
                                 [--checkpoint RUN_DLCM [--baseline RUN_LLAMA] [--text FILE]] [--output docs/results]
    python -m eval.bench_decode --merge EARLIER/decode.json ...

Every part may be measured alone; `--merge` adds what earlier calls measured, and alone measures nothing. Writes
decode.csv, decode.json, decode.md and decode.png to `--output`, decode.json after every case. Without a GPU only
`--pairs demo` is measured, which is quick enough.

    decode     steps of one token of each row, greedy, through the model's own cache behind a context
    prefill    a whole prompt of each row in one pass into an empty cache, logits at the last token alone
    compiled   the same at batch 1 with compiled blocks (see dlcm/compilation.py); only if asked for
    trained    decode on a trained checkpoint's own validation text with its own boundaries, and threshold flips

A step is `model(input_ids, past_key_values=cache)` and an argmax on the device; on a GPU steps are CUDA graphs of
compiled blocks (see dlcm/decoding.py). It lasts from the end of the one before to its own, as the device sees it.
The context of `decode` is synthetic: random keys, values and states, and a boundary every R tokens before the steps.
An untrained detector is far from its ratio, so boundaries are read from a table after the learned scores have been
computed: what the detector costs is in the time. The table is random, but each 16 tokens of a row have 16 / R of them,
so that the steps that are measured have the ratio that is stated.

A model that cannot hold its weights and the cache of a case is passed over, and a note says what it would need. Where
that leaves small batches alone, the largest (a power of two) that both models hold is measured as well.

Bytes are what a step needs by `dlcm.flops.decode_bytes`: weights and keys and values. What they are over the step's
time is compared with the datasheet's bandwidth.

Threshold flips: a text is read by the parallel forward pass, and through a cache token by token and in chunks. A flip
is a token whose boundary decision differs: these are different ways to compute the same numbers, and p lies within
their rounding of the threshold. The cache keeps the decision that was made when a token was read and never revises it,
so everything later is consistent with it. p depends on no earlier decision, so no flip follows from another.
"""

import argparse
import functools
import gc
import itertools
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from dlcm import DLCMConfig, DLCMForCausalLM
from dlcm.attention import resolve_backend
from dlcm.blocks import token_block_shape
from dlcm.boundary import CosineDetector, LearnedDetector
from dlcm.cache import ConceptCache, DecodingCache, Room
from dlcm.compilation import compile_blocks_
from dlcm.flops import HALF, Config, cache_bytes_per_token, decode_bytes, parameter_counts, prefill_flops
from dlcm.layout import PackedLayout
from eval.accounting import CONFIGS, build
from eval.bench import Row, bars_table, merge_records, one_line, record, tell, write_csv, write_json
from eval.bench_decode_report import MODELS, PAIRS, merge_rows, must_show, page, plot, summary
from eval.bench_training import released_memory
from eval.held_out import held_out
from eval.loading import EvaluationError, LoadedCheckpoint, encode_document, load_checkpoint, positive, report_errors
from train.config import build_model_config, load_run_config
from train.step import Model
from train.utilisation import datasheet_peak, utilisation

PARTS = ("decode", "prefill", "compiled", "trained")
CONTEXTS, BATCHES = (1024, 8192, 32768), (1, 16, 64)
DTYPE = torch.bfloat16
SEED = 0
WARM_UP, STEPS = 16, 256
PREFILL_WARM_UP, PREFILLS = 2, 7
PREFILL_BATCH, PREFILL_TOKENS = 16, 2**17  # rows, and tokens of all rows, of one pass: at most
BLOCK = 16  # tokens of a row in which boundaries are exactly as many as they should be
SPARE = 3e9  # bytes of a GPU beside weights and cache: its context, graphs, logits, workspaces
FLIP_ROWS, FLIP_LENGTH, FLIP_CHUNK = 64, 1024, 96
MOST_TEXT = 2**24  # tokens of a validation split

# Bytes per second of the memory, by NVIDIA's datasheets. The first that the device's name contains counts.
PEAK_BANDWIDTH = {
    "GH200 144G": 4.9e12,
    "GH200": 4.0e12,
    "H200": 4.8e12,
    "H100 NVL": 3.9e12,
    "H100 PCIe": 2.0e12,
    "H100": 3.35e12,
    "A100-SXM4-80GB": 2.039e12,
}


# Models


def model_config(pair: str, architecture: str, ratio: float | None, positions: int) -> Config:
    """The configuration of one model of a pair, with room for so many tokens and, if given, another R."""
    config = build_model_config(load_run_config(CONFIGS / pair / f"{architecture}.yaml"))
    config.max_position_embeddings = max(config.max_position_embeddings, positions)
    if ratio is not None and isinstance(config, DLCMConfig):
        config.target_ratio = ratio
    return config


class TableDetector(LearnedDetector):
    """A learned detector's work, but the boundaries of a table, whatever it finds: CUDA graphs can replay that."""

    boundary_BP: Tensor

    def __init__(self, config: DLCMConfig, boundary_BP: Tensor):
        """Takes the table: b_t for each row and position."""
        super().__init__(config)
        self.register_buffer("boundary_BP", boundary_BP, persistent=False)

    def decide(self, probability_T: Tensor, tokens: PackedLayout, generator: torch.Generator | None) -> Tensor:
        """All rows are to have new tokens: a document's number is then its row."""
        return self.boundary_BP[tokens.document_T, tokens.position_T]


def draw_boundaries(rows: int, positions: int, ratio: float, generator: torch.Generator) -> Tensor:
    """Random boundaries, (rows, positions) bool; every `BLOCK` tokens of a row have as many as they should have."""
    blocks = -(-positions // BLOCK)
    due = (torch.arange(blocks + 1, device=generator.device).double() * BLOCK / ratio).long().diff()
    noise = torch.rand(rows, blocks, BLOCK, generator=generator, device=generator.device)
    return (noise.argsort(2).argsort(2) < due[:, None]).flatten(1)[:, :positions]


def build_model(config: Config, rows: int, device: torch.device) -> Model:
    """A random model for up to so many rows; boundaries, if it has any, are those of a table."""
    torch.manual_seed(SEED)
    generator = torch.Generator(device).manual_seed(SEED)
    with device:
        model = build(config)
        if isinstance(model, DLCMForCausalLM):
            assert isinstance(config, DLCMConfig) and isinstance(model.detector, LearnedDetector)
            table_BP = draw_boundaries(rows, config.max_position_embeddings, config.target_ratio, generator)
            detector = TableDetector(config, table_BP)
            detector.load_state_dict(model.detector.state_dict())
            model.detector = detector
    nn.Module.to(model, DTYPE)
    return model.eval()


# Caches


@torch.no_grad()
def fill_(cache: DecodingCache, context: int, ratio: float, generator: torch.Generator) -> None:
    """Puts as many tokens into all rows of an empty cache, in place: random ones, with a boundary every `ratio` tokens.

    Args:
        cache: has rows, and room.
        context: tokens of each row.
        ratio: R; a cache without concepts ignores it.
        generator: on the cache's device.
    """
    for room in rooms(cache):
        for x_BS in itertools.chain.from_iterable(room.tensors.values()):
            if x_BS.is_floating_point():
                x_BS.normal_(generator=generator)
    cache.length_B.fill_(context)
    cache.seen["columns"][0][:, :context] = True
    cache.columns = cache.longest = context
    if not isinstance(cache, ConceptCache):
        return
    index_M = torch.arange(context + 1, device=cache.length_B.device).double()
    end_M = (index_M * ratio).ceil().long() - 1  # from 1 on; of the one before the first, -1
    end_M = end_M[end_M < context - 1]  # the token after a segment says that it closed
    concepts = len(end_M) - 1
    first_S = end_M + int(cache.config.visibility == "closed")  # token whose newest slot this one is
    first_S[0] = 0
    cache.slots["end"][0][:, 1 : concepts + 1] = end_M[1:].int()
    cache.slots["count"][0][:, : concepts + 1] = first_S.diff(append=first_S.new_tensor([context])).int()
    cache.concepts_B.fill_(concepts)
    cache.most_concepts = concepts
    if cache.config.pooling == "last":
        return
    start = int(end_M[-1]) + 1
    open_BSE = cache.tokens["states"][0][:, start:context]
    cache.open_count_B.fill_(context - start)
    cache.open_sum_BE.copy_(open_BSE.to(cache.open_sum_BE.dtype).sum(1))


def filled_cache(model: Model, batch: int, context: int, room: int) -> DecodingCache:
    """A cache of so many rows behind a synthetic context; on a GPU, steps on it are CUDA graphs."""
    device, dtype = model.device, model.lm_head.weight.dtype
    cache = model.new_cache(room, replayed=device.type == "cuda")
    cache.begin(batch, device, dtype, dtype)
    if isinstance(model, DLCMForCausalLM):
        assert isinstance(cache, ConceptCache)
        fill_(cache, context, model.config.target_ratio, torch.Generator(device).manual_seed(SEED))
        model.start(cache)
    else:
        fill_(cache, context, 1.0, torch.Generator(device).manual_seed(SEED))
    return cache


def rooms(cache: DecodingCache) -> list[Room]:
    """Where it keeps what grows."""
    return [value for value in vars(cache).values() if isinstance(value, Room)]


class Needed(NamedTuple):
    """Bytes of a case."""

    weights: int
    cache: int

    def fit(self, memory: float | None) -> bool:
        """Whether a device of so many bytes has room for them; None is one without limit."""
        return memory is None or self.weights + self.cache + SPARE <= memory

    def __str__(self) -> str:
        weights, cache, total = (x / 1e9 for x in (*self, sum(self)))
        return f"would need {total:.1f} GB: {weights:.1f} of weights, {cache:.1f} of cache"


def needed(config: Config, batch: int, room: int) -> Needed:
    """What weights and a cache of so many rows, with room for so many tokens each, would take."""
    cache_class = ConceptCache if isinstance(config, DLCMConfig) else DecodingCache
    cache = cache_class(config, room)  # type: ignore[arg-type]
    cache.begin(batch, torch.device("meta"), DTYPE, DTYPE)
    tensors = (x_BS for room in rooms(cache) for x_BS in itertools.chain.from_iterable(room.tensors.values()))
    return Needed(HALF * sum(parameter_counts(config).values()), sum(x_BS.nbytes for x_BS in tensors))


def plan(
    configs: Sequence[Config], contexts: Sequence[int], batches: Sequence[int], steps: int, memory: float | None
) -> list[tuple[int, int]]:
    """Contexts and batches to decode. Where not all batches fit all models, also the largest power of two that does,
    unless one of at least half as many rows is there already.
    """

    def fits(context: int, batch: int) -> bool:
        return all(needed(config, batch, context + steps).fit(memory) for config in configs)

    cases = []
    for context in contexts:
        fitting = [batch for batch in batches if fits(context, batch)]
        too_large = min(set(batches) - set(fitting), default=1)
        smaller = [2**power for power in range(too_large.bit_length()) if 2**power < too_large]
        largest = max((batch for batch in smaller if fits(context, batch)), default=0)
        more = [largest] if largest > 2 * max(fitting, default=0) else []
        cases += [(context, batch) for batch in sorted({*batches, *more})]
    return cases


# Measurements


def milliseconds(call: Callable[[], Any], warm_up: int, repetitions: int, device: torch.device) -> list[float]:
    """How long each of several calls takes, from the end of the one before to its own; the first few do not count."""
    on_gpu = device.type == "cuda"

    def mark() -> Any:
        if not on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    for _ in range(warm_up):
        call()
    gc.disable()
    try:
        if on_gpu:
            torch.cuda.synchronize()
        marks = [mark()]
        for _ in range(repetitions):
            call()
            marks.append(mark())
        if on_gpu:
            torch.cuda.synchronize()
    finally:
        gc.enable()
    return [
        before.elapsed_time(after) if on_gpu else 1000 * (after - before) for before, after in itertools.pairwise(marks)
    ]


@torch.no_grad()
def measure_steps(model: Model, cache: DecodingCache, steps: int, text_BX: Tensor | None = None) -> Row:
    """Speed, memory and bytes of `steps` steps, after `WARM_UP` others, behind what the cache has.

    Args:
        model: in eval mode.
        cache: its rows all have as many tokens.
        steps: to measure.
        text_BX: the tokens to read, (B, WARM_UP + steps); None reads what the model says.
    """
    device, config = model.device, model.config
    on_gpu = device.type == "cuda"
    batch, context = cache.batch_size, cache.columns
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    in_use = {"kv": cache.key_value_bytes(), "cache": cache.bytes_in_use()}
    generator = torch.Generator(device).manual_seed(SEED)
    said_B1 = torch.randint(config.vocab_size, (batch, 1), generator=generator, device=device)
    given = None if text_BX is None else iter(text_BX.split(1, 1))
    boundaries: list[Tensor] = []

    def step() -> None:
        nonlocal said_B1
        output = model(said_B1 if given is None else next(given), past_key_values=cache)
        said_B1 = output.logits[:, -1].argmax(-1, keepdim=True)
        if isinstance(model, DLCMForCausalLM):
            boundaries.append(output.boundaries)

    times = milliseconds(step, WARM_UP, steps, device)
    ratio = reasoning_share = None
    if boundaries:
        boundary_BS = torch.cat(boundaries[WARM_UP:], 1)
        ratio = boundary_BS.numel() / max(int(boundary_BS.sum()), 1)
        reasoning_share = float(boundary_BS.any(0).double().mean())
    mean_ms = statistics.fmean(times)
    before = context + WARM_UP + steps // 2  # tokens, in the middle
    read = batch * decode_bytes(config, before, batch, ratio).total
    weights = batch * decode_bytes(config, 0, batch, ratio).total
    bandwidth = read / mean_ms * 1000
    peak = peak_bandwidth(device)
    return {
        "steps": steps,
        "graphs": cache.replayed,
        "tokens_per_second": 1000 * batch / mean_ms,
        "mean_ms": mean_ms,
        "p50_ms": statistics.median(times),
        "tokens_per_concept": ratio,
        "reasoning_share": reasoning_share,
        "read_gb": read / 1e9,
        "read_weights_gb": weights / 1e9,
        "bandwidth_tbs": bandwidth / 1e12,
        "bandwidth_share": None if peak is None else bandwidth / peak,
        "kv_bytes_per_token": in_use["kv"] / (batch * context),
        "kv_bytes_per_token_closed_form": cache_bytes_per_token(config).total,
        "cache_bytes_per_token": in_use["cache"] / (batch * context),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }


def measure_decode(model: Model, context: int, batch: int, steps: int) -> Row:
    """See `measure_steps`; behind a synthetic context."""
    return measure_steps(model, filled_cache(model, batch, context, context + WARM_UP + steps), steps)


@torch.no_grad()
def measure_prefill(model: Model, context: int, batch: int, compiled: bool = False) -> Row:
    """Speed of random prompts of so many tokens, read in one pass into a cache that is made for them.

    Raises:
        CompilationError: compiled blocks were asked for, and there is no compiler.
        UtilisationError: an MFU above 1.
    """
    if compiled and not model.compiled:
        compile_blocks_(model)
    device, config = model.device, model.config
    on_gpu = device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    generator = torch.Generator(device).manual_seed(SEED)
    ids_BL = torch.randint(config.vocab_size, (batch, context), generator=generator, device=device)
    used: list[DecodingCache] = []

    def prefill() -> None:
        used.clear()
        used.append(model.new_cache(context))
        model(ids_BL, past_key_values=used[0], logits_to_keep=1)

    ms = statistics.median(milliseconds(prefill, PREFILL_WARM_UP, PREFILLS, device))
    ratio = None
    if isinstance(used[0], ConceptCache):
        ratio = batch * context / max(int(used[0].concepts_B.sum()), 1)
    achieved = batch * prefill_flops(config, context, ratio).total / ms * 1000
    peak = datasheet_peak(device)
    head_dim = token_block_shape(config).head_dim
    return {
        "attention": resolve_backend(config.attention_backend, device, model.lm_head.weight.dtype, head_dim),
        "tokens_per_second": 1000 * batch * context / ms,
        "ms": ms,
        "tokens_per_concept": ratio,
        "tflops": achieved / 1e12,
        "mfu": None if peak is None else utilisation(achieved, peak),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if on_gpu else None,
    }


def peak_bandwidth(device: torch.device) -> float | None:
    """Bytes per second of a known GPU's memory; None for a CPU or another GPU."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAK_BANDWIDTH.items() if known in name), None)


# Flips


def compare_decisions(
    parallel: tuple[Tensor, Tensor], read: tuple[Tensor, Tensor], difference_BL: Tensor, threshold: float
) -> Row:
    """What differs between two readings of a text.

    Args:
        parallel, read: probabilities and decisions, (B, L), of either.
        difference_BL: largest difference of each position's logits.
        threshold: of the decisions.
    """
    (probability_BL, boundary_BL), (read_probability_BL, read_boundary_BL) = parallel, read
    flipped_BL = boundary_BL != read_boundary_BL
    distance_BL = (probability_BL.double() - threshold).abs()
    distances = sorted(distance_BL[flipped_BL].tolist())
    unaffected_BL = flipped_BL.cumsum(1) == 0
    return {
        "tokens": flipped_BL.numel(),
        "boundaries": int(boundary_BL.sum()),
        "flips": len(distances),
        "largest_distance": max(distances, default=None),
        "tokens_within": int((distance_BL <= distances[-1]).sum()) if distances else 0,
        "largest_probability_difference": float((probability_BL - read_probability_BL).abs().max()),
        "tokens_before_flips": int(unaffected_BL.sum()),
        "largest_logit_difference": float(difference_BL[unaffected_BL].max()) if unaffected_BL.any() else None,
        "distances": distances,
    }


@torch.no_grad()
def measure_flips(model: DLCMForCausalLM, ids_BL: Tensor, piece: int) -> Row:
    """Decisions of the parallel forward pass against those made in reading so many columns at a time.

    Raises:
        EvaluationError: the model has no threshold.
    """
    if not isinstance(model.detector, CosineDetector):
        raise EvaluationError(f"segmenter='{model.config.segmenter}' has no threshold to flip at")
    parallel = model(ids_BL)
    cache = model.new_cache(ids_BL.shape[1], replayed=piece == 1 and model.device.type == "cuda")
    probabilities, decisions, differences = [], [], []
    for ids_Bl, logits_BlV in zip(ids_BL.split(piece, 1), parallel.logits.split(piece, 1), strict=True):
        output = model(ids_Bl, past_key_values=cache)
        probabilities.append(output.boundary_probs)
        decisions.append(output.boundaries)
        differences.append((output.logits.float() - logits_BlV.float()).abs().amax(2))
    read = torch.cat(probabilities, 1), torch.cat(decisions, 1)
    own = parallel.boundary_probs, parallel.boundaries
    return compare_decisions(own, read, torch.cat(differences, 1), model.detector.threshold)


# What is measured


def bench_model(
    pair: str, architecture: str, parts: Sequence[str], options: argparse.Namespace, device: torch.device
) -> Iterator[Row]:
    """All of one model of a pair, case by case. What cannot be done is told in a row's `note`."""
    memory = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None
    room = WARM_UP + options.steps
    positions = max(options.contexts) + room
    configs = {name: model_config(pair, name, options.ratio, positions) for name in MODELS}
    cases = plan(list(configs.values()), options.contexts, options.batches, room, memory)
    config = configs[architecture]
    ratio = config.target_ratio if isinstance(config, DLCMConfig) else None
    key: Row = {"pair": pair, "model": architecture, "ratio": ratio}
    held: list[Model] = []

    def model() -> Model:
        """Built when it is first needed, and again should that have failed."""
        if not held:
            held.append(build_model(config, max(batch for _, batch in cases), device))
        return held[0]

    def decode(context: int, batch: int) -> Row:
        if device.type == "cuda" and not model().compiled:
            compile_blocks_(model())  # steps are compiled when they are captured
        return measure_decode(model(), context, batch, options.steps)

    def prefill(context: int, batch: int, compiled: bool) -> Row:
        return measure_prefill(model(), context, batch, compiled)

    def prefilled(compiled: bool) -> Iterator[Row]:
        for context, batch in itertools.product(options.contexts, options.batches):
            if batch <= (1 if compiled else PREFILL_BATCH) and context * batch <= PREFILL_TOKENS:
                of_case = {"part": "prefill", **key, "context": context, "batch": batch, "compiled": compiled}
                yield attempt(of_case, functools.partial(prefill, context, batch, compiled))

    if "prefill" in parts:  # before anything is compiled
        yield from prefilled(compiled=False)
    for context, batch in cases if "decode" in parts else ():
        of_case = {"part": "decode", **key, "context": context, "batch": batch}
        need = needed(config, batch, context + room)
        if need.fit(memory):
            yield attempt(of_case, functools.partial(decode, context, batch))
        else:
            yield {**of_case, "needs_gb": sum(need) / 1e9, "note": str(need)}
    if "compiled" in parts:
        yield from prefilled(compiled=True)


def bench_trained(options: argparse.Namespace) -> Iterator[Row]:
    """A trained model, and its baseline if there is one, on text; the contexts are those that they have positions for.

    Raises:
        EvaluationError: a path holds another kind of model, or the text is too short.
        CheckpointError, DataError: something cannot be read.
    """
    for architecture, path in (("dlcm", options.checkpoint), ("llama", options.baseline)):
        if path is None:
            continue
        with released_memory():
            loaded = load_checkpoint(path)
            model, config = loaded.model, loaded.model.config
            if isinstance(model, DLCMForCausalLM) != (architecture == "dlcm"):
                raise EvaluationError(f"{path}: holds a {type(model).__name__}; give the DLCM as --checkpoint")
            text_T = read_text(loaded, options.text)
            ratio = config.target_ratio if isinstance(config, DLCMConfig) else None
            key: Row = {"pair": str(options.checkpoint), "model": architecture, "ratio": ratio}

            if isinstance(model, DLCMForCausalLM):
                length = min(FLIP_LENGTH, config.max_position_embeddings, len(text_T))
                rows = min(FLIP_ROWS, len(text_T) // length)
                ids_BL = windows(text_T, rows, length).to(model.device)
                for dtype in (torch.float32, DTYPE):
                    nn.Module.to(model, dtype)
                    for reading, piece in (("steps", 1), ("chunks", FLIP_CHUNK)):
                        row = {"part": "flips", **key, "context": length, "batch": rows, "reading": reading}
                        row |= {"dtype": str(dtype).removeprefix("torch."), "piece": piece}
                        yield attempt(row, functools.partial(measure_flips, model, ids_BL, piece))

            nn.Module.to(model, DTYPE)
            room = WARM_UP + options.steps
            longest = min(config.max_position_embeddings, len(text_T)) - room
            if longest < 1:
                raise EvaluationError(
                    f"{path}: {room} steps are more than its {config.max_position_embeddings} positions, or than the "
                    f"{len(text_T)} tokens of text: lower --steps"
                )
            contexts = dict.fromkeys(min(context, longest) for context in options.contexts)
            for context, batch in itertools.product(contexts, options.batches):
                ids_BL = windows(text_T, batch, context + room).to(model.device)
                row = {"part": "trained", **key, "context": context, "batch": batch}
                yield attempt(row, functools.partial(measure_text, model, ids_BL, context, options.steps))


@torch.no_grad()
def measure_text(model: Model, ids_BL: Tensor, context: int, steps: int) -> Row:
    """See `measure_steps`; behind and on a text."""
    cache = model.new_cache(ids_BL.shape[1], replayed=model.device.type == "cuda")
    model(ids_BL[:, :context], past_key_values=cache, logits_to_keep=1)
    return measure_steps(model, cache, steps, ids_BL[:, context:])


def read_text(loaded: LoadedCheckpoint, file: Path | None) -> Tensor:
    """(T,): the validation split of a checkpoint's run, documents end to end, or a file, as its tokenizer reads it.

    Raises:
        DataError: the prepared data is gone, damaged, or no longer what the checkpoint was trained on.
        EvaluationError: the file is empty or not UTF-8.
    """
    if file is not None:
        try:
            return encode_document(loaded.tokenizer, file.read_text(encoding="utf-8")).input_ids_1T[0]
        except UnicodeDecodeError as error:
            raise EvaluationError(f"{file} is not UTF-8 at byte {error.start}; convert it") from error
    sources = held_out(loaded.run, loaded.state, "--text")
    return torch.from_numpy(np.concatenate([source.shards.window(0, source.most(MOST_TEXT))[0] for source in sources]))


def windows(ids_T: Tensor, rows: int, length: int) -> Tensor:
    """(rows, length): evenly spread over a text from its beginning to its end; they overlap if they must."""
    starts = [row * (len(ids_T) - length) // max(rows - 1, 1) for row in range(rows)]
    return torch.stack([ids_T[start : start + length] for start in starts])


def attempt(key: Row, measure: Callable[[], Row]) -> Row:
    """A row of what was measured, or of why it was not: with too little memory, or a backend that is not there, the
    others go on. Nothing that was allocated meanwhile is left.
    """
    try:
        return {**key, **measure()}
    except Exception as error:
        traceback.print_exc()
        return {**key, "note": one_line(error)}
    finally:
        if torch.cuda.is_available():
            gc.collect()  # graphs and caches refer to each other
            torch.cuda.empty_cache()


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    parts = chosen_parts(options)
    sources = [json.loads(path.read_text(encoding="utf-8")) for path in options.merge]
    rows = merge_rows([{"commit": source["commit"], **row} for row in source["rows"]] for source in sources)
    if parts:
        sources.append(record(options.commit))
    recorded, output = merge_records(sources), Path(options.output)

    for row in measured(parts, options, torch.device("cuda" if torch.cuda.is_available() else "cpu")):
        tell({name: value for name, value in row.items() if name != "distances"})
        rows = merge_rows([rows, [{"commit": sources[-1]["commit"], **row}]])
        write_json(output / "decode.json", recorded, must_show(rows), rows=rows)  # should no later one come to an end

    bars = must_show(rows)
    write_json(output / "decode.json", recorded, bars, rows=rows)
    write_csv(output / "decode.csv", [{name: x for name, x in row.items() if not isinstance(x, list)} for row in rows])
    (output / "decode.md").write_text(page(recorded, bars, rows), encoding="utf-8")
    plot(output / "decode.png", rows)
    print(f"\n{summary(rows)}\n\n{bars_table(bars)}\n\nfiles are in {output}")


def measured(parts: Sequence[str], options: argparse.Namespace, device: torch.device) -> Iterator[Row]:
    """Everything that was asked for, row by row. What a user may have got wrong comes first."""
    if "trained" in parts:
        yield from bench_trained(options)
    if set(parts) - {"trained"}:
        for pair, architecture in itertools.product(options.pairs, MODELS):
            with released_memory():
                yield from bench_model(pair, architecture, parts, options, device)


def chosen_parts(options: argparse.Namespace) -> Sequence[str]:
    """The parts to measure.

    Raises:
        EvaluationError: one of them cannot be measured, for want of a checkpoint or a GPU, or at that R.
    """
    parts: Iterable[str] = ("decode", "prefill") if not options.merge else ()
    if options.parts is None and options.checkpoint is not None:
        parts = (*parts, "trained")
    elif options.parts is not None:
        parts = options.parts
    if options.ratio is not None and not options.ratio > 1:
        raise EvaluationError(f"--ratio {options.ratio:g} must be more than 1 token per concept")
    if "trained" in parts and options.checkpoint is None:
        raise EvaluationError("the part 'trained' needs a trained DLCM: give --checkpoint")
    if set(parts) - {"trained"} and set(options.pairs) != {"demo"} and not torch.cuda.is_available():
        raise EvaluationError(
            "bench_decode times decoding on a GPU, but torch sees no CUDA device: give --pairs demo to try it here"
        )
    return tuple(parts)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.bench_decode", description="Times decoding and prefill of DLCMs and their LLaMAs."
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, help="default: decode, prefill; trained with --checkpoint")
    parser.add_argument("--pairs", nargs="+", choices=(*PAIRS, "demo"), default=PAIRS[::-1])
    parser.add_argument("--contexts", nargs="+", type=positive, default=CONTEXTS, metavar="TOKENS")
    parser.add_argument("--batches", nargs="+", type=positive, default=BATCHES, metavar="ROWS")
    parser.add_argument("--ratio", type=float, metavar="R", help="tokens per concept (default: the configurations')")
    parser.add_argument("--steps", type=positive, default=STEPS, help="of decoding, in each case (%(default)s)")
    parser.add_argument("--checkpoint", type=Path, metavar="RUN", help="a trained DLCM, for the part 'trained'")
    parser.add_argument("--baseline", type=Path, metavar="RUN", help="its trained LLaMA")
    parser.add_argument("--text", type=Path, metavar="FILE", help="to read instead of the validation split")
    parser.add_argument("--merge", nargs="+", type=Path, default=[], metavar="JSON", help="results of earlier calls")
    parser.add_argument("--output", type=Path, default=Path("docs/results"), help="where to write (%(default)s)")
    parser.add_argument("--commit", help="of the code, where it does not run in its git checkout")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
