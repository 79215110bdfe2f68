"""Where concepts begin: boundary probabilities and decisions (section 3.3.1, Eq. 5-6).

A boundary is a discrete decision on p_t, the cosine distance between a projection of the previous token's state
and one of this token's. No gradient of the language-model loss flows through the decision: the projections learn
through the ratio loss on p alone (see global_parser.py).

    learned  p from projections W_q, W_k; sharpened Bernoulli draw in training, threshold at inference
    rule     p from the encoder states themselves, threshold always (section 8.1)
    fixed    every R tokens; the control
    words    where runs of spaces and punctuation begin or end, a rule on the tokens themselves
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dlcm.config import DLCMConfig, Visibility
from dlcm.layout import PackedLayout


@dataclass(frozen=True, slots=True)
class Boundaries:
    """What a detector decides. The first token of a document has p = 1 and is a boundary.

    Attributes:
        probability_T: p_t, fp32 or wider, with gradient.
        boundary_T: b_t, bool.
    """

    probability_T: Tensor
    boundary_T: Tensor


def cosine_boundary_probability(q_TS: Tensor, k_TS: Tensor, tokens: PackedLayout) -> Tensor:
    """p_t = (1 - cos(q_{t-1}, k_t)) / 2 (Eq. 5), 1 at the first token of every document; in fp32 or wider.

    Args:
        q_TS: q_{t-1} for each t.
        k_TS: k_t.
        tokens: the documents.
    """
    q_TS, k_TS = (x.float() if x.dtype.itemsize < 4 else x for x in (q_TS, k_TS))
    cosine_T = F.cosine_similarity(q_TS, k_TS, dim=-1)
    probability_T = ((1 - cosine_T) / 2).clamp(0, 1)  # rounding may leave the interval
    return torch.where(tokens.is_first_T, torch.ones_like(probability_T), probability_T)


def sharpen(probability_T: Tensor, sharpening: float) -> Tensor:
    """Raises the odds p / (1 - p) to a power: 1 leaves p as it is, large values approach the threshold at 1/2."""
    return torch.sigmoid(sharpening * torch.logit(probability_T))


class CosineDetector(nn.Module):
    """Scores neighbouring tokens by their distance, then decides; by a threshold, unless a subclass knows better."""

    def __init__(self, config: DLCMConfig):
        super().__init__()
        self.threshold = config.threshold

    def seen(self, input_ids_T: Tensor, h_TE: Tensor) -> Tensor:
        """What decides, of each token and the one before."""
        return h_TE

    def score(self, h_TE: Tensor, tokens: PackedLayout, past_DE: Tensor | None = None) -> Tensor:
        """p_t; a document's tokens may have others before them, of which `past_DE` is the last one's state."""
        raise NotImplementedError

    def decide(self, probability_T: Tensor, tokens: PackedLayout, generator: torch.Generator | None) -> Tensor:
        """b_t."""
        return probability_T >= self.threshold

    def forward(
        self,
        h_TE: Tensor,
        tokens: PackedLayout,
        generator: torch.Generator | None = None,
        past_DE: Tensor | None = None,
    ) -> Boundaries:
        probability_T = self.score(h_TE, tokens, past_DE)
        return Boundaries(probability_T, self.decide(probability_T, tokens, generator))


class LearnedDetector(CosineDetector):
    """Eq. 5-6. Sampling needs no state of its own: draws come from the generator that `forward` is given."""

    def __init__(self, config: DLCMConfig):
        super().__init__(config)
        self.q_proj = nn.Linear(config.d_token, config.scan_width, bias=False)
        self.k_proj = nn.Linear(config.d_token, config.scan_width, bias=False)
        self.sharpening = config.sharpening

    def score(self, h_TE: Tensor, tokens: PackedLayout, past_DE: Tensor | None = None) -> Tensor:
        return cosine_boundary_probability(self.q_proj(tokens.previous(h_TE, past_DE)), self.k_proj(h_TE), tokens)

    @torch.no_grad()
    def decide(self, probability_T: Tensor, tokens: PackedLayout, generator: torch.Generator | None) -> Tensor:
        if not self.training:
            return super().decide(probability_T, tokens, generator)
        device = probability_T.device if generator is None else generator.device
        uniform_T = torch.rand(tokens.total, generator=generator, device=device).to(probability_T.device)
        return uniform_T < sharpen(probability_T, self.sharpening)


class RuleDetector(CosineDetector):
    """Section 8.1: distance of neighbouring encoder states against a threshold, no projection, no sampling."""

    def score(self, h_TE: Tensor, tokens: PackedLayout, past_DE: Tensor | None = None) -> Tensor:
        return cosine_boundary_probability(tokens.previous(h_TE, past_DE), h_TE, tokens)


class FixedDetector(nn.Module):
    """A boundary every R tokens, R not necessarily whole; probabilities are 0 or 1."""

    def __init__(self, config: DLCMConfig):
        super().__init__()
        self.ratio = config.target_ratio

    def seen(self, input_ids_T: Tensor, h_TE: Tensor) -> Tensor:
        return h_TE

    def forward(
        self,
        h_TE: Tensor,
        tokens: PackedLayout,
        generator: torch.Generator | None = None,
        past_DE: Tensor | None = None,
    ) -> Boundaries:
        position_T = tokens.position_T.double()
        boundary_T = (position_T / self.ratio).floor() > ((position_T - 1) / self.ratio).floor()
        dtype = torch.promote_types(h_TE.dtype, torch.float32)
        return Boundaries(boundary_T.to(dtype), boundary_T)


class WordDetector(nn.Module):
    """Segments end where words do; probabilities are 0 or 1.

    Some tokens end words: spaces, punctuation. Of a run of them, its first token tells that it has begun, and the token
    after it that it has ended; nobody knows earlier. So with the one boundary that each visibility can use, the newest
    word is seen from its first space on (`inclusive`), or from the next word on, with all of the run in it (`closed`):

        inclusive   w o r d , | _ n e x t
        closed      w o r d , _ | n e x t

    Raises:
        ValueError: the configuration does not say which tokens end words.
    """

    def __init__(self, config: DLCMConfig):
        super().__init__()
        if config.word_end_ids is None:
            raise ValueError(
                "segmenter='words' needs word_end_ids, which training takes from the tokenizer: "
                "train.tokenizer.word_end_ids(tokenizer)"
            )
        self.visibility: Visibility = config.visibility
        # No buffer: it follows from the configuration, whatever weights are loaded.
        ends_word_V = torch.zeros(config.vocab_size, dtype=torch.bool, device="cpu")
        self._ends_word_V = ends_word_V.index_fill(0, torch.tensor(config.word_end_ids, device="cpu"), True)

    def seen(self, input_ids_T: Tensor, h_TE: Tensor) -> Tensor:
        """Whether each token ends a word, (T,) bool."""
        if self._ends_word_V.device != input_ids_T.device:  # once
            self._ends_word_V = self._ends_word_V.to(input_ids_T.device)
        return self._ends_word_V[input_ids_T]

    def forward(
        self,
        ends_word_T: Tensor,
        tokens: PackedLayout,
        generator: torch.Generator | None = None,
        past_D: Tensor | None = None,
    ) -> Boundaries:
        before_T = tokens.previous(ends_word_T, past_D)
        begins_T, ended_T = ends_word_T & ~before_T, before_T & ~ends_word_T
        boundary_T = tokens.is_first_T | (begins_T if self.visibility == "inclusive" else ended_T)
        return Boundaries(boundary_T.float(), boundary_T)


Detector = LearnedDetector | RuleDetector | FixedDetector | WordDetector
DETECTORS: dict[str, type[Detector]] = {
    "learned": LearnedDetector,
    "rule": RuleDetector,
    "fixed": FixedDetector,
    "words": WordDetector,
}
