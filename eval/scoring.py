"""Log-likelihoods of text under a model: what question files, benchmarks and perplexity are made of.

How text becomes tokens is decided here, once:

- A text begins as `train.prepare` lays documents out: behind the tokenizer's bos, if it has one. Where it has none, and
  a context has no token, eos stands for it.
- White space at the end of a context goes over to the continuation, as in lm-eval. Both are then tokenised as one text;
  what begins like the context alone, up to the first token that differs, is the context. So a token that straddles the
  two is scored (lm-eval counts tokens, and would leave it out); where none does, this is lm-eval's split.
- Text that spells a special token is text.
- What is longer than the model's positions loses its beginning, bos included. A continuation that does not fit is an
  error; a document is read in windows.

Texts are read as packed documents, which do not see each other: there is no padding, and a score depends on nothing but
its own tokens. Texts that differ in their last token alone, such as the letters that may answer a question, are read
once. Logits exist only where a token is scored, and for so many of these at a time.

Legend: T tokens that are read, D documents, K tokens that are scored, V vocabulary, E width.
"""

import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dlcm import DLCMForCausalLM, LlamaBaselineForCausalLM
from eval.loading import EvaluationError
from train.prepare import DocumentTokenizer
from train.tokenizer import token_byte_lengths, vocabulary_size

BATCH_TOKENS = 16_384
BATCH_ROWS = 256
LOGITS = 2**27  # held at once: 0.5 GB in fp32
TOKEN_DTYPE = np.dtype(np.int64)

Dtype = Literal["float32", "bfloat16"]
DTYPES: tuple[Dtype, ...] = get_args(Dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Span:
    """Tokens, of which the last `scored` (at least 1) are scored, given those before them (at least 1)."""

    ids_T: np.ndarray
    scored: int
    is_cut: bool = False  # whether more came before, which did not fit


@dataclass(frozen=True, slots=True)
class Request:
    """A text to score.

    Attributes:
        spans: log-likelihoods of these add up: one, the windows of a long document, or none for the empty text.
        num_bytes: of UTF-8, for which the scored tokens stand.
    """

    spans: tuple[Span, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, eq=False)
class Score:
    """What a model makes of a request.

    Attributes:
        log_likelihood: of all scored tokens, in nats; 0 for the empty text.
        is_greedy: whether each scored token is the likeliest there.
        scored: number of scored tokens.
        is_cut: whether the beginning did not fit.
        tokens, concepts: how many were read, and what these formed (0 for a model without concepts).
        boundaries_T: (T,) bool, of the tokens that were read, on the CPU; empty for a model without concepts.
    """

    log_likelihood: float
    is_greedy: bool
    scored: int
    is_cut: bool
    tokens: int
    concepts: int
    boundaries_T: Tensor


class Scorer:
    """A model that is asked how likely texts are.

    Args:
        model: in evaluation mode, where boundaries are thresholded.
        tokenizer: the one that it was trained with.
        dtype: "bfloat16" is autocast. Logits are in fp32 in any case.
        batch_tokens, batch_rows: at most so much is read at a time (a document of more tokens is read alone).

    Raises:
        EvaluationError: the model is in training mode, the tokenizer has ids that it has not, or a bound is below 1.
    """

    def __init__(
        self,
        model: DLCMForCausalLM | LlamaBaselineForCausalLM,
        tokenizer: PreTrainedTokenizerFast,
        dtype: Dtype = "float32",
        batch_tokens: int = BATCH_TOKENS,
        batch_rows: int = BATCH_ROWS,
    ):
        if model.training:
            raise EvaluationError("the model is in training mode, where boundaries are drawn; call model.eval() first")
        ids, known = vocabulary_size(tokenizer), model.config.vocab_size
        if ids > known:
            raise EvaluationError(
                f"the tokenizer has {ids} ids and the model a vocabulary of {known}; give the tokenizer that the model "
                "was trained with"
            )
        if batch_tokens < 1 or batch_rows < 1:
            raise EvaluationError(f"batch_tokens={batch_tokens} and batch_rows={batch_rows} must be at least 1")
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.batch_tokens, self.batch_rows = batch_tokens, batch_rows
        self.positions: int = model.config.max_position_embeddings
        self._encode = DocumentTokenizer(tokenizer.backend_tokenizer.to_str(), TOKEN_DTYPE)
        self._bytes_V = token_byte_lengths(tokenizer)

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    # From text to tokens

    def pairs(self, pairs: Sequence[tuple[str, str]]) -> list[Request]:
        """Continuations, each with its context before it.

        Raises:
            EvaluationError: nothing comes before a continuation: no context, no bos, no eos.
        """
        moved = [_move_white_space(context, continuation) for context, continuation in pairs]
        texts = list(dict.fromkeys(text for context, more in moved for text in (context, context + more)))
        ids_of = {text: encoded.ids for text, encoded in zip(texts, self._encode(texts), strict=True)}
        return [self._pair(ids_of[context], ids_of[context + more], more) for context, more in moved]

    def _pair(self, context_ids: np.ndarray, ids: np.ndarray, continuation: str) -> Request:
        given = _common_prefix(context_ids, ids)
        scored = ids[given:]
        if not len(scored):
            return Request((), 0)
        num_bytes = len(continuation.encode()) if self._bytes_V is None else int(self._bytes_V[scored].sum())
        return Request((Span(self._opened(ids, given), len(scored)),), num_bytes)

    def documents(self, texts: Sequence[str], window: int | None = None, stride: int | None = None) -> list[Request]:
        """Whole texts (see `document`)."""
        encoded = self._encode(list(texts))
        return [self.document(text.ids, text.text_bytes, window, stride) for text in encoded]

    def document(
        self, ids: np.ndarray, num_bytes: int, window: int | None = None, stride: int | None = None
    ) -> Request:
        """A whole text, each of its tokens scored once.

        Args:
            ids: its tokens, without bos and eos.
            num_bytes: its size.
            window: how many tokens are read at a time; None is as many as the model has positions.
            stride: by how many a window is ahead of the one before it, which are those it scores; None is `window`. The
                last window reaches back as far as it can, as in lm-eval.

        Raises:
            EvaluationError: a window or a stride out of range, or nothing comes before the text: neither bos nor eos.
        """
        window = self.positions if window is None else window
        stride = window if stride is None else stride
        if not 1 <= stride <= window <= self.positions:
            raise EvaluationError(
                f"window={window} and stride={stride} must be at least 1, and at most the model's {self.positions} "
                "positions and the window"
            )
        return Request(tuple(_windows(self._opened(ids), window, stride)) if len(ids) else (), num_bytes)

    def beginnings(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Tokens of texts to go on from."""
        return [self._opened(text.ids, len(text.ids)) for text in self._encode(list(texts))]

    def _opened(self, ids: np.ndarray, given: int = 0) -> np.ndarray:
        """The tokens behind what opens a document; the first `given` are context."""
        opening = self.tokenizer.bos_token_id
        if opening is None and not given:
            opening = self.tokenizer.eos_token_id
            if opening is None:
                raise EvaluationError(
                    "nothing comes before the first token: the tokenizer has neither bos nor eos; give a context"
                )
        return ids if opening is None else np.insert(ids, 0, opening)

    # From tokens to scores

    @torch.no_grad()
    def score(self, requests: Sequence[Request], description: str = "scoring") -> list[Score]:
        """Scores, in the order of the requests; shows a bar on a terminal.

        Raises:
            EvaluationError: a continuation has more tokens than the model positions.
        """
        scores = iter(self._score_spans([span for request in requests for span in request.spans], description))
        return [_sum([next(scores) for _ in request.spans]) for request in requests]

    def _score_spans(self, spans: list[Span], description: str) -> list[Score]:
        spans = [self._fit(span) for span in spans]
        same: dict[bytes, list[int]] = {}  # spans that read the same tokens
        for index, span in enumerate(spans):
            same.setdefault(span.ids_T[:-1].tobytes(), []).append(index)
        # The longest first: if memory is short, it shows at once.
        groups = sorted(same.values(), key=lambda group: -len(spans[group[0]].ids_T))
        lengths = [len(spans[group[0]].ids_T) - 1 for group in groups]
        found: dict[int, Score] = {}
        with progress_bar(sum(lengths), description, "token") as progress:
            for start, stop in self._batches(lengths):
                batch = groups[start:stop]
                scores = self._score_batch([[spans[index] for index in group] for group in batch])
                found |= zip(itertools.chain(*batch), scores, strict=True)
                progress.update(sum(lengths[start:stop]))
        return [found[index] for index in range(len(spans))]

    def _fit(self, span: Span) -> Span:
        if span.scored > self.positions:
            beginning = self.tokenizer.decode(span.ids_T[-span.scored :][:16], clean_up_tokenization_spaces=False)
            raise EvaluationError(
                f"a continuation ({beginning!r}...) has {span.scored} tokens, the model {self.positions} positions "
                "(max_position_embeddings); shorten it"
            )
        kept = span.ids_T[-(self.positions + 1) :]
        return Span(kept, span.scored, is_cut=len(kept) < len(span.ids_T))

    def _batches(self, lengths: list[int]) -> Iterator[tuple[int, int]]:
        """Where batches start and stop."""
        start = tokens = 0
        for index, length in enumerate(lengths):
            if index > start and (tokens + length > self.batch_tokens or index - start == self.batch_rows):
                yield start, index
                start, tokens = index, 0
            tokens += length
        if lengths:
            yield start, len(lengths)

    def _score_batch(self, groups: list[list[Span]]) -> list[Score]:
        """Scores of all spans, group after group, reading what those of a group have in common once."""
        read = [group[0].ids_T[:-1] for group in groups]
        h_TE, boundaries, concepts = self._states(read)

        spans = [(row, span) for row, group in enumerate(groups) for span in group]
        numbers, ends_D = [span.scored for _, span in spans], np.cumsum([len(ids_T) for ids_T in read])
        index_K = np.concatenate([np.arange(ends_D[row] - span.scored, ends_D[row]) for row, span in spans])
        target_K = np.concatenate([span.ids_T[-span.scored :] for _, span in spans])
        log_p_K, greedy_K = self._log_probabilities(h_TE, torch.from_numpy(index_K), torch.from_numpy(target_K))
        return [
            Score(
                log_likelihood=float(log_p_k.sum()),
                is_greedy=bool(greedy_k.all()),
                scored=span.scored,
                is_cut=span.is_cut,
                tokens=len(read[row]),
                concepts=concepts[row],
                boundaries_T=boundaries[row],
            )
            for (row, span), log_p_k, greedy_k in zip(
                spans, log_p_K.split(numbers), greedy_K.split(numbers), strict=True
            )
        ]

    def _states(self, read: list[np.ndarray]) -> tuple[Tensor, Sequence[Tensor], list[int]]:
        """What logits are made of, (T, E), and boundaries and number of concepts of each document."""
        lengths, caught = [len(ids_T) for ids_T in read], []
        device = self.model.device
        # A forward pass does not give away what logits are made of, and to make all of them takes too much memory.
        hook = self.model.decoder_norm.register_forward_hook(lambda module, args, h_TE: caught.append(h_TE))
        try:
            with self.autocast():
                output = self.model(
                    input_ids=torch.from_numpy(np.concatenate(read))[None].to(device),
                    cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
                    max_seqlen=max(lengths),
                    logits_to_keep=1,
                )
        finally:
            hook.remove()
        if "boundaries" not in output:
            return caught[0], [torch.zeros(0, dtype=torch.bool)] * len(read), [0] * len(read)
        return caught[0], output.boundaries[0].cpu().split(lengths), output.cu_concepts.diff().tolist()

    def _log_probabilities(self, h_TE: Tensor, index_K: Tensor, target_K: Tensor) -> tuple[Tensor, Tensor]:
        """Of each target after the token at its index: the log-probability, fp64, and whether no token has more."""
        weight_VE = self.model.lm_head.weight
        index_K, target_K = index_K.to(h_TE.device), target_K.to(h_TE.device)
        log_p_K, greedy_K = [], []
        at_once = max(1, LOGITS // len(weight_VE))
        for index_k, target_k in zip(index_K.split(at_once), target_K.split(at_once), strict=True):
            logits_kV = self.model.last_logits(h_TE[index_k][None].to(weight_VE.dtype))[0]
            logits_kV = logits_kV.to(torch.promote_types(logits_kV.dtype, torch.float32))
            log_p_K.append(logits_kV.gather(1, target_k[:, None])[:, 0].double() - logits_kV.logsumexp(1))
            greedy_K.append(logits_kV.argmax(1) == target_k)
        return torch.cat(log_p_K).cpu(), torch.cat(greedy_K).cpu()


def _move_white_space(context: str, continuation: str) -> tuple[str, str]:
    kept = context.rstrip()
    return kept, context[len(kept) :] + continuation


def _common_prefix(left: np.ndarray, right: np.ndarray) -> int:
    shorter = min(len(left), len(right))
    differs = np.flatnonzero(left[:shorter] != right[:shorter])
    return int(differs[0]) if len(differs) else shorter


def _windows(ids: np.ndarray, window: int, stride: int) -> Iterator[Span]:
    """Spans of at most `window` tokens to read, that score all tokens but the first once."""
    last = len(ids) - 1
    end = min(window, last)
    yield Span(ids[: end + 1], end)
    while end < last:
        scored = min(stride, last - end)
        end += scored
        yield Span(ids[end - window : end + 1], scored)


def _sum(scores: list[Score]) -> Score:
    return Score(
        log_likelihood=math.fsum(score.log_likelihood for score in scores),
        is_greedy=all(score.is_greedy for score in scores),
        scored=sum(score.scored for score in scores),
        is_cut=any(score.is_cut for score in scores),
        tokens=sum(score.tokens for score in scores),
        concepts=sum(score.concepts for score in scores),
        boundaries_T=torch.cat([torch.zeros(0, dtype=torch.bool), *(score.boundaries_T for score in scores)]),
    )


def progress_bar(total: int, description: str, unit: str) -> tqdm:
    """A bar with tqdm's own estimate of the time left; only on a terminal."""
    shown = sys.stderr.isatty()
    return tqdm(total=total, desc=description, unit=unit, unit_scale=True, disable=not shown, dynamic_ncols=True)
