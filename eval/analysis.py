"""Where a DLCM's loss and its boundaries lie, token by token, beside a baseline's loss on the same tokens.

    python -m eval.analysis RUN_DLCM --baseline RUN_LLAMA
    python -m eval.analysis RUN_R2 RUN_R4 RUN_R8 --baseline RUN_LLAMA --output DIR
    python -m eval.analysis CHECKPOINT --text novel.txt more.jsonl.xz --max-tokens 100000

The text is the validation split of the first run's data, or files, and is read as training reads it: documents end to
end, in windows of the first run's `sequence_length`. What a window has of a document is a part, and sees no other. With
boundaries thresholded and the run's own precision, means are those of `train.evaluate`.

    scored      tokens that something predicts, about which the detector decides: all but those that open a part
    loss        of a token: -log p(token | those before it in its part), in nats
    position    of a token: how many tokens of its concept come before it (see `positions`)
    surprisal   of a token: the baseline's loss, or the DLCM's own where there is no baseline
    errors      documents are the units: standard errors are those of ratios of sums over documents, intervals (95 %)
                resample documents; losses of two models are compared token by token

Writes report.md and report.json, a CSV of the numbers of each section, and plots.

Legend: T tokens, K tokens of interest, D documents, P parts, M concepts, V vocabulary.
"""

import argparse
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import rankdata
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from dlcm import DLCMConfig
from eval.analysis_report import Findings, write_report
from eval.bench import Row
from eval.held_out import held_out
from eval.loading import (
    EvaluationError,
    LoadedCheckpoint,
    checkpoint_directory,
    load_checkpoint,
    report_errors,
)
from eval.perplexity import read_texts
from eval.report import labels_of
from eval.token_classes import TOKEN_CLASSES, token_classes
from eval.uncertainty import Ratio, paired_difference
from train.checkpoint import TrainingState, load_state
from train.config import RunConfig, build_model_config, load_run_config
from train.metrics import read_metrics
from train.prepare import DocumentTokenizer
from train.step import autocast
from train.tokenizer import load_tokenizer, tokenizer_hash

POSITIONS = 16  # that stand alone; the others are one
BINS = 10  # of surprisal, of equally many tokens
GROUPS = 50  # of documents at most, of which one at a time is left out
LOGITS = 2**25  # held at once, or those of one window: 0.13 GB in fp32
IDS = np.dtype(np.int64)


# Text


@dataclass(frozen=True, slots=True, eq=False)
class Text:
    """Documents end to end, in windows.

    Attributes:
        name: what it is, in words.
        ids_T: tokens.
        document_T: the document of each.
        opens_T: bool, whether it opens a part.
        domain_D, source_D: labels of each document; a domain may be None.
        window: tokens of a window.
    """

    name: str
    ids_T: np.ndarray
    document_T: np.ndarray
    opens_T: np.ndarray
    domain_D: list[str | None]
    source_D: list[str]
    window: int

    @classmethod
    def of(
        cls,
        name: str,
        ids_T: np.ndarray,
        start_D: np.ndarray,
        labels_D: Sequence[tuple[str | None, str]],
        window: int,
        max_tokens: int | None = None,
    ) -> "Text":
        """The first `max_tokens` (None: all) of documents that begin at `start_D` and have these domains and sources.

        Raises:
            EvaluationError: that leaves nothing to predict.
        """
        ids_T = ids_T if max_tokens is None else ids_T[: max(0, max_tokens)]
        index_T = np.arange(len(ids_T))
        start_D = start_D[start_D < len(ids_T)]
        opens_T = index_T % window == 0
        opens_T[start_D] = True
        if opens_T.all():
            raise EvaluationError(
                f"{name}: {len(ids_T)} tokens leave nothing to predict; give more text or --max-tokens"
            )
        document_T = np.searchsorted(start_D, index_T, side="right") - 1
        read_D = labels_D[: len(start_D)]
        domain_D, source_D = [domain for domain, _ in read_D], [source for _, source in read_D]
        return cls(name, ids_T, document_T, opens_T, domain_D, source_D, window)

    def batches(self, windows: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Packed rows of so many windows: ids (T,) and cu_seqlens (P + 1,) of parts, on the CPU."""
        size = windows * self.window
        for start in range(0, len(self.ids_T), size):
            ids_T, opens_T = self.ids_T[start : start + size], self.opens_T[start : start + size]
            cu_seqlens = np.append(np.flatnonzero(opens_T), len(ids_T)).astype(np.int32)
            yield torch.from_numpy(ids_T), torch.from_numpy(cu_seqlens)


def validation_text(run: RunConfig, state: TrainingState, max_tokens: int | None) -> Text:
    """The validation split of a run's data; of a mixture, those of all sources, each by its share of `max_tokens`.

    Raises:
        DataError: the prepared data is gone, damaged, or no longer what the run was trained on.
    """
    ids, starts = [np.array([], dtype=IDS)], [np.array([], dtype=IDS)]
    labels_D: list[tuple[str | None, str]] = []
    sources, length = held_out(run, state, "--text"), 0
    for source in sources:
        if most := source.most(max_tokens):
            ids_T, start_D = source.shards.window(0, most)
            ids.append(ids_T)
            starts.append(start_D + length)
            labels_D += [(row["domain"], row["source"]) for row in source.rows[: len(start_D)]]
            length += most
    name = f"validation split of {', '.join(str(source.shards.path) for source in sources)}"
    return Text.of(name, np.concatenate(ids), np.concatenate(starts), labels_D, run.data.sequence_length)


def text_of_files(
    files: Sequence[str], tokenizer: PreTrainedTokenizerFast, window: int, max_tokens: int | None
) -> Text:
    """Files, laid out as `train.prepare` does.

    Raises:
        EvaluationError: a document cannot be used, or there is none.
        DataError: a file cannot be read.
    """
    documents = read_texts(files)
    encoded = DocumentTokenizer(tokenizer.backend_tokenizer.to_str(), IDS)([document.text for document in documents])
    bos, eos = (
        np.array([] if special is None else [special], dtype=IDS)
        for special in (tokenizer.bos_token_id, tokenizer.eos_token_id)
    )
    ids = [np.concatenate([bos, document.ids, eos]) for document in encoded]
    start_D = np.cumsum([0, *map(len, ids[:-1])])
    labels_D = [(document.domain, document.source) for document in documents]
    return Text.of(" ".join(files), np.concatenate(ids), start_D, labels_D, window, max_tokens)


# What models make of it


@dataclass(frozen=True, slots=True, eq=False)
class Concepts:
    """What a DLCM decides, over all parts of a text.

    Attributes:
        probability_T, boundary_T: p_t and b_t.
        length_M: tokens in each concept.
    """

    probability_T: np.ndarray
    boundary_T: np.ndarray
    length_M: np.ndarray

    @property
    def first_M(self) -> np.ndarray:
        """Index of each concept's first token."""
        return np.cumsum(self.length_M) - self.length_M


def positions(concepts: Concepts) -> np.ndarray:
    """(T,) how many tokens of its concept come before each.

    Where a boundary opens a concept (`closed`), its token is at 0: the one whose p reached the threshold. Where it ends
    one (`inclusive`), that token is the last, and the next one at 0. The first token of a part is at 0 in any case.
    """
    return np.arange(concepts.length_M.sum()) - np.repeat(concepts.first_M, concepts.length_M)


@torch.no_grad()
def measure(loaded: LoadedCheckpoint, text: Text) -> tuple[np.ndarray, Concepts | None]:
    """Losses (T,) in nats, NaN for tokens that open a part, and what a DLCM decides; one forward pass a batch.

    Raises:
        EvaluationError: losses are not finite.
    """
    model = loaded.model
    found = []
    for ids_T, cu_seqlens in text.batches(max(1, LOGITS // (text.window * model.config.vocab_size))):
        ids_T = ids_T.to(model.device)
        with autocast(loaded.run, model.device):
            output = model(input_ids=ids_T[None], cu_seqlens=cu_seqlens, max_seqlen=int(cu_seqlens.diff().max()))
        batch = [token_losses(output.logits[0], ids_T, cu_seqlens)]
        if "boundaries" in output:
            batch += [output.boundary_probs[0], output.boundaries[0], output.concept_lengths]
        found.append([x.cpu().numpy() for x in batch])
        del output  # before the next one takes memory
    loss_T, *decided = (np.concatenate(x) for x in zip(*found, strict=True))
    if not np.isfinite(loss_T[~text.opens_T]).all():
        raise EvaluationError(f"{loaded.path}: gives losses that are not finite; choose an earlier checkpoint")
    return loss_T, Concepts(*decided) if decided else None


def token_losses(logits_TV: Tensor, ids_T: Tensor, cu_seqlens: Tensor) -> Tensor:
    """(T,) float64, what each token cost the logits before it, in nats; NaN for the first of each part."""
    logits_TV = logits_TV[:-1].to(torch.promote_types(logits_TV.dtype, torch.float32))
    loss_T = F.pad(F.cross_entropy(logits_TV, ids_T[1:], reduction="none").double(), (1, 0))
    loss_T[cu_seqlens[:-1].long().to(loss_T.device)] = torch.nan
    return loss_T


@dataclass(frozen=True, slots=True, eq=False)
class Measured:
    """A DLCM, what it made of the text, and who is compared.

    Attributes:
        name, config, state: which checkpoint.
        loss_T, concepts: its own.
        baseline_T: losses of the baseline, if there is one.
        text: what was read.
    """

    name: str
    config: DLCMConfig
    state: TrainingState
    loss_T: np.ndarray
    concepts: Concepts
    baseline_T: np.ndarray | None
    text: Text

    @property
    def surprisal_T(self) -> np.ndarray:
        return self.loss_T if self.baseline_T is None else self.baseline_T


# Kinds of text (Table 5)


@dataclass(frozen=True, slots=True)
class ContentType:
    """Text of a domain, from all sources (None) or some, and the paper's tokens per concept at R = 2, 4 and 8."""

    name: str
    domain: str
    sources: tuple[str, ...] | None
    paper: tuple[float, float, float]

    def has(self, domain: str | None, source: str) -> bool:
        return domain == self.domain and (self.sources is None or source in self.sources)


# Casual is running text that is not technical. Encyclopaedias, dictionaries and lists of packages are neither.
EN = ("anarchism", "austen", "cdda-en", "henry", "kjv-bible", "sotu-moby", "spurgeon", "web-bible")
ZH = ("cdda-zh", "poetry-zh")
TECHNICAL_ZH = ("handbook-zh", "linux-doc-zh", "lo-help-zh", "man-zh", "reference-zh")
CONTENT = (
    ContentType("casual English", "en", EN, (1.76, 3.53, 7.47)),
    ContentType("casual Chinese", "zh", ZH, (1.76, 4.36, 8.38)),
    ContentType("technical English", "tech", None, (1.92, 3.85, 10.58)),
    ContentType("technical Chinese", "zh", TECHNICAL_ZH, (1.76, 3.27, 6.09)),
    ContentType("code", "code", None, (1.98, 3.66, 6.14)),
    ContentType("mathematics", "math", None, (1.91, 4.41, 7.42)),
)
OTHER = "other"


def content_of(domain: str | None, source: str) -> str:
    """The type of a document by its labels, `OTHER` where these do not say."""
    return next((content.name for content in CONTENT if content.has(domain, source)), OTHER)


# Numbers


def over_documents(values_K: np.ndarray, document_K: np.ndarray) -> Ratio:
    """The mean over tokens (at least one), whose sums over documents are what varies."""
    count_D = np.bincount(document_K)
    sum_D = np.bincount(document_K, values_K)
    return Ratio(sum_D[count_D > 0], count_D[count_D > 0].astype(np.float64))


def mean(name: str, values_K: np.ndarray, document_K: np.ndarray) -> Row:
    """A mean over tokens and its standard error; None of no token."""
    if not len(values_K):
        return {name: None, f"{name}_error": None}
    ratio = over_documents(values_K, document_K)
    return {name: ratio.value, f"{name}_error": ratio.error}


def losses(of: Measured, chosen_T: np.ndarray, name: str) -> Row:
    """Mean losses of the scored among chosen tokens (bool), and how much the DLCM's differ from the baseline's.

    Args:
        name: of the choice, from which the bootstrap draws.
    """
    chosen_T = chosen_T & ~of.text.opens_T
    document_K = of.text.document_T[chosen_T]
    ours_K = of.loss_T[chosen_T]
    row = {"tokens": len(ours_K), **mean("loss", ours_K, document_K)}
    if of.baseline_T is None:
        return row
    theirs_K = of.baseline_T[chosen_T]
    row |= mean("baseline_loss", theirs_K, document_K) | mean("difference", ours_K - theirs_K, document_K)
    row |= {"low": None, "high": None}
    if len(ours_K):
        ours, theirs = (over_documents(x_K, document_K) for x_K in (ours_K, theirs_K))
        interval = paired_difference(ours, theirs, name)
        row |= {"low": interval.low, "high": interval.high}
    return row


def position_rows(of: Measured) -> list[Row]:
    """Losses by position in the concept (Fig. 7), and of all tokens."""
    place_T = np.minimum(positions(of.concepts), POSITIONS)
    names = [*map(str, range(POSITIONS)), f"{POSITIONS}+"]
    rows = [
        {"checkpoint": of.name, "position": name, **losses(of, place_T == place, f"position {name}")}
        for place, name in enumerate(names)
    ]
    return [*rows, {"checkpoint": of.name, "position": "all", **losses(of, place_T >= 0, "all")}]


def content_rows(of: Measured) -> list[Row]:
    """Tokens per concept by type of text (Table 5), of other text, and of all."""
    num_documents = len(of.text.source_D)
    tokens_D = np.bincount(of.text.document_T, minlength=num_documents)
    concepts_D = np.bincount(of.text.document_T[of.concepts.first_M], minlength=num_documents)
    contents = [content_of(*labels) for labels in zip(of.text.domain_D, of.text.source_D, strict=True)]
    paper = {content.name: content.paper for content in CONTENT}
    rows = []
    for name in (*paper, OTHER, "all"):
        has_D = np.array([name in (content, "all") for content in contents])
        ratio = Ratio(tokens_D[has_D], concepts_D[has_D]) if has_D.any() else None
        labels = zip(of.text.domain_D, of.text.source_D, has_D, strict=True)
        rows.append(
            {
                "checkpoint": of.name,
                "content": name,
                "sources": None if name == "all" else ", ".join(sorted({source for _, source, has in labels if has})),
                "documents": int(has_D.sum()),
                "tokens": int(tokens_D[has_D].sum()),
                "concepts": int(concepts_D[has_D].sum()),
                "tokens_per_concept": ratio and ratio.value,
                "tokens_per_concept_error": ratio and ratio.error,
                **dict(zip(("paper_r2", "paper_r4", "paper_r8"), paper.get(name, (None,) * 3), strict=True)),
            }
        )
    return rows


def length_rows(of: Measured) -> list[Row]:
    """How many concepts have how many tokens, and how many would if each token were a boundary as often as any."""
    count_N = np.bincount(of.concepts.length_M)
    concepts = len(of.concepts.length_M)
    rate = concepts / of.concepts.length_M.sum()
    return [
        {
            "checkpoint": of.name,
            "length": length,
            "concepts": int(count_N[length]),
            "geometric": float(concepts * rate * (1 - rate) ** (length - 1)),
        }
        for length in range(1, len(count_N))
    ]


def length_numbers(of: Measured) -> Row:
    """What is typical of concepts' lengths, each concept counting once; and of that geometric distribution's."""
    length_M = of.concepts.length_M
    rate = len(length_M) / length_M.sum()
    row: Row = {"checkpoint": of.name, "concepts": len(length_M), "mean": 1 / rate, "longest": int(length_M.max())}
    for name, share in (("median", 0.5), ("percentile_99", 0.99)):
        row[name] = int(np.quantile(length_M, share, method="inverted_cdf"))
        row[f"geometric_{name}"] = math.ceil(math.log1p(-share) / math.log1p(-rate)) if rate < 1 else 1
    return row


def surprisal_rows(of: Measured) -> list[Row]:
    """Boundaries in bins of equally many scored tokens, from the least to the most surprising."""
    scored_K = np.flatnonzero(~of.text.opens_T)
    rising_K = scored_K[np.argsort(of.surprisal_T[scored_K], kind="stable")]
    bins = [bin_K for bin_K in np.array_split(rising_K, BINS) if len(bin_K)]
    return [
        {
            "checkpoint": of.name,
            "bin": number,
            "tokens": len(bin_K),
            "surprisal_from": float(of.surprisal_T[bin_K[0]]),
            "surprisal_to": float(of.surprisal_T[bin_K[-1]]),
            "surprisal": float(of.surprisal_T[bin_K].mean()),
            **boundaries(of, bin_K),
        }
        for number, bin_K in enumerate(bins, 1)
    ]


def boundaries(of: Measured, index_K: np.ndarray) -> Row:
    """Mean p and share of boundaries of some tokens."""
    document_K = of.text.document_T[index_K]
    return mean("probability", of.concepts.probability_T[index_K], document_K) | mean(
        "boundary_rate", of.concepts.boundary_T[index_K], document_K
    )


def surprisal_correlation(of: Measured) -> Row:
    """Spearman's correlation of p and surprisal, of scored tokens."""
    scored_T = ~of.text.opens_T
    value, error = rank_correlation(
        of.concepts.probability_T[scored_T], of.surprisal_T[scored_T], of.text.document_T[scored_T]
    )
    return {"checkpoint": of.name, "rank_correlation": value, "rank_correlation_error": error}


def rank_correlation(x_K: np.ndarray, y_K: np.ndarray, document_K: np.ndarray) -> tuple[float | None, float | None]:
    """Spearman's, and its standard error by the jackknife: documents are left out in turn, or groups of them.

    None where one of the two does not vary; no error of one document.
    """
    group_K = document_K % GROUPS
    groups = np.unique(group_K)
    value = _spearman(x_K, y_K)
    without_G = np.array([_spearman(x_K[group_K != group], y_K[group_K != group]) for group in groups])
    spread = ((without_G - without_G.mean()) ** 2).mean()
    error = float(np.sqrt((len(groups) - 1) * spread)) if len(groups) > 1 else np.nan
    return value if np.isfinite(value) else None, error if np.isfinite(error) else None


def _spearman(x_K: np.ndarray, y_K: np.ndarray) -> float:
    """NaN where one of the two does not vary."""
    if not len(x_K) or np.ptp(x_K) == 0 or np.ptp(y_K) == 0:
        return np.nan
    return float(np.corrcoef(rankdata(x_K), rankdata(y_K))[0, 1])


def class_rows(of: Measured, class_T: np.ndarray) -> list[Row]:
    """Losses and boundaries by class of token; boundaries are those that fall on such a token."""
    rows = []
    for index, name in enumerate(TOKEN_CLASSES):
        chosen_T = class_T == index
        row = {"checkpoint": of.name, "class": name, **losses(of, chosen_T, name)}
        rows.append(row | boundaries(of, np.flatnonzero(chosen_T & ~of.text.opens_T)))
    return rows


def compression_rows(name: str, directory: Path, state: TrainingState) -> list[Row]:
    """Tokens per concept over training, as the run recorded them up to the checkpoint; none without its metrics."""
    return [
        {
            "checkpoint": name,
            "boundaries": "sampled" if line["kind"] == "train" else "thresholded",
            "training_tokens": line["tokens"],
            "tokens_per_concept": line["tokens_per_concept"],
        }
        for line in read_metrics(directory.resolve().parents[1])
        if line["step"] <= state.step and line.get("tokens_per_concept") is not None
    ]


def checkpoint_rows(measured: Sequence[Measured], baseline: Row | None) -> list[Row]:
    """What was compared: R, training, and means over the text."""
    rows = []
    for of in measured:
        of_all = content_rows(of)[-1]
        rows.append(
            {
                "checkpoint": of.name,
                "target_ratio": of.config.target_ratio,
                "visibility": of.config.visibility,
                "training_tokens": of.state.tokens,
                **{name: of_all[name] for name in ("tokens_per_concept", "tokens_per_concept_error")},
                **losses(of, ~of.text.opens_T, "all"),
            }
        )
    return rows if baseline is None else [*rows, baseline]


# Command


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint before its model is loaded."""

    name: str
    directory: Path
    run: RunConfig
    config: Any
    state: TrainingState
    tokenizer: PreTrainedTokenizerFast


def open_checkpoints(dlcms: Sequence[Path], baseline: Path | None) -> list[Opened]:
    """Checkpoints that can be compared on the same tokens, in windows of the first one's.

    Raises:
        EvaluationError: they cannot, or one is given twice; names the remedy.
        CheckpointError: one cannot be read.
    """
    paths = [*dlcms, *([] if baseline is None else [baseline])]
    opened = []
    for name, path in labels_of(paths).items():
        directory = checkpoint_directory(path)
        run = load_run_config(directory / "run.yaml")
        tokenizer = load_tokenizer(str(directory))
        opened.append(Opened(name, directory, run, build_model_config(run), load_state(directory), tokenizer))
    first, window = opened[0], opened[0].run.data.sequence_length
    for path, one in zip(paths, opened, strict=True):
        if path is not baseline and not isinstance(one.config, DLCMConfig):
            raise EvaluationError(f"{path}: forms no concepts; give a DLCM, and a LLaMA as --baseline")
        if tokenizer_hash(one.tokenizer) != tokenizer_hash(first.tokenizer):
            raise EvaluationError(
                f"{path}: has another tokenizer than {paths[0]}, and losses are compared token by token; give "
                "checkpoints that were trained on the same prepared data"
            )
        if one.config.max_position_embeddings < window:
            raise EvaluationError(
                f"{path}: has {one.config.max_position_embeddings} positions, and {paths[0]} was trained in windows of "
                f"{window} tokens; give first the checkpoint of the shortest windows"
            )
    return opened


def text_for(opened: Sequence[Opened], files: Sequence[str], max_tokens: int | None) -> Text:
    """Files, or the validation split of the first checkpoint's data, in its windows; warns of others trained on it.

    Raises:
        EvaluationError, DataError: see `text_of_files` and `validation_text`.
    """
    first = opened[0]
    if files:
        return text_of_files(files, first.tokenizer, first.run.data.sequence_length, max_tokens)
    for one in opened[1:]:
        if one.state.data_fingerprint != first.state.data_fingerprint:
            print(f"warning: {one.name} was trained on other data, which may include this text", file=sys.stderr)
    return validation_text(first.run, first.state, max_tokens)


@report_errors
def main(arguments: Sequence[str] | None = None) -> None:
    options = parse_arguments(arguments)
    opened = open_checkpoints(options.checkpoints, options.baseline)
    first = opened[0]
    text = text_for(opened, options.text, options.max_tokens)
    found = [measure(load_checkpoint(one.directory), text) for one in opened]
    baseline_T, baseline = None, None
    if options.baseline:
        baseline_T, _ = found[-1]
        overall = mean("loss", baseline_T[~text.opens_T], text.document_T[~text.opens_T])
        baseline = {"checkpoint": opened[-1].name, "training_tokens": opened[-1].state.tokens, **overall}
    measured = [
        Measured(one.name, one.config, one.state, loss_T, concepts, baseline_T, text)
        for one, (loss_T, concepts) in zip(opened[: len(options.checkpoints)], found, strict=False)
        if concepts is not None
    ]
    class_T = token_classes(first.tokenizer, text.ids_T)
    findings = Findings(
        text={
            "name": text.name,
            "tokens": len(text.ids_T),
            "scored": int((~text.opens_T).sum()),
            "documents": len(text.source_D),
            "parts": int(text.opens_T.sum()),
            "window": text.window,
        },
        checkpoints=checkpoint_rows(measured, baseline),
        positions=[row for of in measured for row in position_rows(of)],
        content=[row for of in measured for row in content_rows(of)],
        lengths=[row for of in measured for row in length_rows(of)],
        length_numbers=[length_numbers(of) for of in measured],
        surprisal=[row for of in measured for row in surprisal_rows(of)],
        correlations=[surprisal_correlation(of) for of in measured],
        classes=[row for of in measured for row in class_rows(of, class_T)],
        compression=[
            row for one in opened[: len(measured)] for row in compression_rows(one.name, one.directory, one.state)
        ],
    )
    write_report(options.output or options.checkpoints[0].parent / "analysis", findings)


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m eval.analysis", description="Where a DLCM's loss and its boundaries lie."
    )
    parser.add_argument(
        "checkpoints", nargs="+", type=Path, metavar="CHECKPOINT", help="run directories or checkpoints of DLCMs"
    )
    parser.add_argument("--baseline", type=Path, metavar="CHECKPOINT", help="whose loss on the same tokens is compared")
    parser.add_argument(
        "--text", nargs="+", default=[], metavar="FILE", help="jsonl, text or parquet (default: the first run's split)"
    )
    parser.add_argument("--max-tokens", type=int, metavar="N", help="read no more than the first N (default: all)")
    parser.add_argument("--output", type=Path, help="where to write (default: `analysis` beside the first CHECKPOINT)")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
