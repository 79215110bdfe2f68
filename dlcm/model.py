"""The Dynamic Large Concept Model (section 3): four stages, read top to bottom.

    H = Encoder(x)                            token width, causal
    b = Detect(H);  C = Pool(H, b)            tokens to concepts
    Z = Backbone(C)                           concept width, causal, M << L
    y = Decoder(H + CrossAttend(H, Smooth(Z)))  concepts back to tokens, causal

(`clean_start`, `injection` and `cross_attention_every` add to that, see their comments in `dlcm.config`.)

Two invariants come before everything: logits at position t depend on tokens <= t only, in training and in
evaluation; and packed documents do not see each other. Legend: T tokens, M concepts, E = d_token, C = d_concept,
V vocabulary, B x L padded rows, D documents.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.utils import ModelOutput

from dlcm.blocks import LayerPast, Rope, TransformerStack, concept_block_shape, token_block_shape
from dlcm.boundary import DETECTORS, Boundaries, LearnedDetector
from dlcm.cache import Appending, ConceptCache, Stepping
from dlcm.causal_lm import PackedCausalLM
from dlcm.concepts import SMOOTHERS, ConceptPooling, segment_sum
from dlcm.config import DLCMConfig
from dlcm.cross_attention import CrossAttention
from dlcm.decoding import Call, directly
from dlcm.global_parser import ParserStatistics, RunningStatistics, global_parser_loss
from dlcm.host import OnHost
from dlcm.injection import Injection
from dlcm.layout import (
    CLOSING_LAG,
    ClosedSegments,
    ConceptLayout,
    ConceptRooms,
    Extension,
    PackedLayout,
    closing,
)
from dlcm.selfcompress.quantiser import quantise_linears_
from dlcm.selfcompress.removal import leave_channels_
from dlcm.sharding import sharing_ranks


@dataclass
class DLCMOutput(ModelOutput):
    """What a forward pass gives; (B, L) tensors are zero on padding.

    Attributes:
        loss: ce_loss + aux_loss_weight * aux_loss, if labels were given.
        logits: (B, L, V), unless declined.
        ce_loss: next-token cross-entropy in nats.
        aux_loss: ratio loss of the Global Parser (Eq. 10); zero where no probability is learned ("fixed", "words").
        boundary_probs: (B, L), p_t.
        boundaries: (B, L) bool, b_t.
        concept_lengths: (M,) tokens in each concept, document after document.
        cu_concepts: (D + 1,) where each document's concepts begin.
        parser_statistics: sums behind F and G of this batch.
        past_key_values: the cache, where one was used; then there are logits, probabilities, boundaries, no more.
    """

    loss: Tensor | None = None
    logits: Tensor | None = None
    ce_loss: Tensor | None = None
    aux_loss: Tensor | None = None
    boundary_probs: Tensor | None = None
    boundaries: Tensor | None = None
    concept_lengths: Tensor | None = None
    cu_concepts: Tensor | None = None
    parser_statistics: ParserStatistics | None = None
    past_key_values: ConceptCache | None = None


@dataclass(frozen=True, slots=True)
class Read:
    """What the first part of a step leaves to the others.

    Attributes:
        active_B: rows that have a token in this step.
        h_BE: what goes on to cross-attention.
        decided: probabilities and boundaries, none for rows that are not active.
        closing_B: whether the row's open segment ends.
        pooled_BE: what stands for that segment's states, before projection.
        end_B: position of its last token.
    """

    active_B: Tensor
    h_BE: Tensor
    decided: Boundaries
    closing_B: Tensor
    pooled_BE: Tensor
    end_B: Tensor


class DLCMForCausalLM(PackedCausalLM[ConceptCache]):
    """Encoder, boundary detector, concept backbone and decoder under a language-model head, strictly causal.

    Attributes:
        target_ratio: R of the ratio loss, for schedules; the configuration's unless set.
        concept_rooms: how much room concepts are given, and whether the host waits to know (see `dlcm.compilation`).
    """

    config_class = DLCMConfig
    config: DLCMConfig
    cache_class = ConceptCache

    def __init__(self, config: DLCMConfig):
        super().__init__(config)
        token_shape = token_block_shape(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_token)
        self.encoder = TransformerStack(token_shape, config.windows("encoder"))
        if config.clean_start:
            self.encoder_norm = nn.RMSNorm(config.d_token, config.rms_norm_eps)
            self.skip_proj = nn.Linear(config.d_token, config.d_token, bias=False)
        self.detector = DETECTORS[config.segmenter](config)
        self.pooling = ConceptPooling(config)
        self.backbone = TransformerStack(concept_block_shape(config), config.windows("backbone"))
        self.backbone_norm = nn.RMSNorm(config.d_concept, config.rms_norm_eps)
        self.smoothing = SMOOTHERS[config.smoothing](config)
        self.cross_attention = CrossAttention(config) if config.cross_attention else None
        self.later_cross_attention = nn.ModuleList(
            CrossAttention(config) for _ in range(1, config.num_cross_attentions)
        )
        self.injection = None if config.injection == "off" else Injection(config)
        self.decoder = TransformerStack(token_shape, config.windows("decoder"))
        self.decoder_norm = nn.RMSNorm(config.d_token, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.d_token, config.vocab_size, bias=False)
        self.target_ratio = config.target_ratio
        self.concept_rooms = ConceptRooms()
        quantise_linears_(self, config)
        leave_channels_(self)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        num_items_in_batch: int | Tensor | None = None,
        generator: torch.Generator | None = None,
        parser_total: ParserStatistics | RunningStatistics | None = None,
        past_key_values: ConceptCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        return_logits: bool = True,
        return_dict: bool = True,
    ) -> DLCMOutput | tuple:
        """Runs the four stages.

        Args:
            input_ids: (B, L), or one packed row (1, T) with `cu_seqlens`.
            attention_mask: (B, L), 0 on padding, left or right.
            labels: (B, L), the same ids as `input_ids` (shifted here, inside each document), -100 where ignored.
            cu_seqlens: (D + 1,) where each document of the packed row begins. On the CPU it costs no device sync.
            max_seqlen: length of the longest document, to spare a sync where `cu_seqlens` lies on a GPU.
            num_items_in_batch: number of valid targets in the *global* batch. Losses are then this micro-batch's
                share: over ranks and micro-batches, gradients of `.loss` add up to those of one big batch.
            generator: source of the training-time boundary draws; None is torch's default generator.
            parser_total: boundary statistics of the global batch, needed where it consists of several micro-batches:
                exact (see `boundary_statistics`), or running. None: this batch, summed over ranks while training.
            past_key_values: a cache (`new_cache`): `input_ids` are the columns that follow what it has seen, and
                `attention_mask` is of these, or of all. Without gradients, and without labels.
            use_cache: True makes a cache where none is given. None and False make none.
            logits_to_keep: of how many columns, the last ones, there are logits; 0 is all.
            return_logits: False leaves logits out and the loss never holds more than a chunk of them; needs labels.
            return_dict: False returns a tuple.

        Raises:
            ValueError: inputs that do not fit together (see `open_rows` and `decode`), or neither logits nor labels.
            AttentionBackendError: the configured attention backend cannot run here.
        """
        cache = self.cache_to_use(past_key_values, use_cache, labels, cu_seqlens)
        if cache is not None:
            kept, probs, boundaries = self.decode(input_ids, attention_mask, cache, logits_to_keep)
            answer = DLCMOutput(logits=kept, boundary_probs=probs, boundaries=boundaries, past_key_values=cache)
            return answer if return_dict else answer.to_tuple()
        input_ids_T, rows, tokens = self.open_rows(input_ids, attention_mask, cu_seqlens, max_seqlen)

        h_TE, s_TE = self.leave_encoder(self.encoder(self.embed_tokens(input_ids_T), tokens))
        decided: Boundaries = self.detector(self.detector.seen(input_ids_T, s_TE), tokens, generator)
        h_TE, layout = self.through_concepts(h_TE, s_TE, decided, tokens)
        h_TE = self.decoder_norm(h_TE)
        logits, ce_loss = self.read_out(h_TE, labels, rows, tokens, num_items_in_batch, return_logits, logits_to_keep)

        statistics = ParserStatistics.of(decided, tokens)
        aux_loss = self._aux_loss(decided, tokens, statistics, parser_total, averaged=num_items_in_batch is None)
        output = DLCMOutput(
            loss=None if ce_loss is None else ce_loss + self.config.aux_loss_weight * aux_loss,
            logits=logits,
            ce_loss=ce_loss,
            aux_loss=aux_loss,
            boundary_probs=rows.unpack(decided.probability_T),
            boundaries=rows.unpack(decided.boundary_T),
            concept_lengths=layout.real_length_M,
            cu_concepts=layout.real_cu_concepts_D1,
            parser_statistics=statistics,
        )
        return output if return_dict else output.to_tuple()

    def leave_encoder(self, h_TE: Tensor) -> tuple[Tensor, Tensor]:
        """What goes on to the decoder, and the states that the detector sees and segments are the mean of; (T, E)."""
        if not self.config.clean_start:
            return h_TE, h_TE
        s_TE = self.encoder_norm(h_TE)
        return h_TE + self.skip_proj(s_TE), s_TE

    def through_concepts(
        self, h_TE: Tensor, s_TE: Tensor, decided: Boundaries, tokens: PackedLayout
    ) -> tuple[Tensor, ConceptLayout]:
        """From the encoder to the end of the decoder, (T, E) to (T, E), and the geometry of the concepts.

        The one wait of a forward pass for the device is here: at the end, where room for the concepts was foreseen.
        """
        rooms, visibility = self.concept_rooms, self.config.visibility
        room = rooms.foresee(tokens, self.training)
        # Ranks that share parameters run the same passes: where one must run one again, all do. Without foresight, that
        # all have or none has, nobody must.
        together = sharing_ranks(next(self.backbone.parameters())) if rooms.foresight else None
        layout = ConceptLayout.from_boundaries(tokens, decided.boundary_T, visibility, rooms.bucket, room, together)
        y_TE = self.through_concepts_of(layout, h_TE, s_TE)
        rooms.saw(tokens, self.training, layout.counts)
        if not layout.fits:
            rooms.misses += 1
            del y_TE
            layout = ConceptLayout.from_boundaries(tokens, decided.boundary_T, visibility, rooms.bucket)
            y_TE = self.through_concepts_of(layout, h_TE, s_TE)
        return y_TE, layout

    def through_concepts_of(self, layout: ConceptLayout, h_TE: Tensor, s_TE: Tensor) -> Tensor:
        """Pooling, backbone, cross-attention and decoder."""
        c_MC = self.pooling(s_TE, layout)
        z_MC = self.smooth(self.backbone(c_MC, layout.concepts), layout.concepts)
        newest_TE = None
        if self.injection is not None:
            injected_ME = self.injection(z_MC)
            injected_SE = injected_ME.new_zeros(layout.num_slots, injected_ME.shape[1])
            newest_TE = injected_SE.index_copy(0, layout.slot_M, injected_ME).index_select(0, layout.slot_T)
            newest_TE = self.injection.seen_by(newest_TE, lambda: layout.closing_T)

        def attend(number: int, x_TE: Tensor) -> Tensor:
            return self.cross_attentions[number](x_TE, z_MC, layout)

        return self.through_decoder(h_TE, layout.tokens, attend, newest_TE)

    @property
    def cross_attentions(self) -> list[CrossAttention]:
        """All of them, in the order of the decoder's layers."""
        return [] if self.cross_attention is None else [self.cross_attention, *self.later_cross_attention]

    def slot_rope(self, position: Tensor) -> Rope | None:
        """Of cross-attention, at these positions; None where there is none, or none is wanted."""
        return None if self.cross_attention is None else self.cross_attention.rope(position)

    def through_decoder(
        self,
        h_TE: Tensor,
        tokens: PackedLayout,
        attend: Callable[[int, Tensor], Tensor],
        newest_TE: Tensor | None,
        past: Sequence[LayerPast] | None = None,
    ) -> Tensor:
        """Cross-attention, where there is any, and the decoder; (T, E) to (T, E).

        Args:
            h_TE: what goes on from the encoder.
            tokens: the documents.
            attend: makes of a cross-attention's number and the residual stream before it the one behind it.
            newest_TE: what is injected of the newest concept that each token sees; None without injection.
            past: of the decoder's layers.
        """
        every = self.config.cross_attention_every

        def enter(layer: int, x_TE: Tensor) -> Tensor:
            if every is not None and layer > 0 and layer % every == 0:
                x_TE = attend(layer // every, x_TE)
            if self.injection is not None and newest_TE is not None:
                x_TE = self.injection.enter(newest_TE, layer, x_TE)
            return x_TE

        return self.decoder(h_TE if self.cross_attention is None else attend(0, h_TE), tokens, past, enter)

    def smooth(self, z_MC: Tensor, concepts: PackedLayout, past_DC: Tensor | None = None) -> Tensor:
        """What cross-attention reads: concepts of the backbone, normed, then blended with their predecessors."""
        past_DC = None if past_DC is None else self.backbone_norm(past_DC)
        return self.smoothing(self.backbone_norm(z_MC), concepts, past_DC)

    # Decoding: the same stages, with a past (see `PackedCausalLM.decode`).

    def start(self, cache: ConceptCache) -> None:
        """Slot 0 of every row is "no concept yet"."""
        rope = self.slot_rope(torch.zeros(1, dtype=torch.long, device=cache.length_B.device))
        for number, cross in enumerate(self.cross_attentions):
            k_1KN, v_1KN = cross.keys_and_values(cross.null_slot[None], rope)
            cache.slots["cross_keys"][number][:, 0], cache.slots["cross_values"][number][:, 0] = k_1KN, v_1KN

    def extend(self, input_ids_T: Tensor, new: Extension, cache: ConceptCache) -> tuple[Tensor, Boundaries]:
        where, tokens, row_D = Appending(new), new.layout, new.row_D
        past = cache.stack("encoder", cache.tokens, where)
        h_TE, s_TE = self.leave_encoder(self.encoder(self.embed_tokens(input_ids_T), tokens, past))
        decided = self._decide(input_ids_T, s_TE, where, cache.last_seen()[row_D], cache)

        past_D = cache.concepts_B[row_D]
        segments = ClosedSegments.from_boundaries(new, decided.boundary_T, self.config.visibility)
        mean_ME = self._segment_means(s_TE, segments, row_D, cache) if self.config.pooling == "mean" else None
        if len(segments.closed_M):
            closed_B = torch.zeros_like(cache.concepts_B).index_copy_(0, row_D, segments.closed_T[new.last_D])
            closed = Extension.of(closed_B.cpu(), cache.concepts_B.cpu(), h_TE.device)
            cache.reserve_concepts(closed.layout.max_seqlen)
            pooled_ME = cache.states_at(closed.row_T, segments.end_M) if mean_ME is None else mean_ME
            self._reason(pooled_ME, segments.end_M, Appending(closed), cache.last_concept()[closed.row_D], cache)
            cache.concepts_B += closed_B
            cache.most_concepts += closed.layout.max_seqlen

        slot_T = past_D[tokens.document_T] + segments.closed_T
        seen, slot_S = cache.slots_seen(new, slot_T)
        rope = self.slot_rope(tokens.position_T)

        def attend(number: int, x_TE: Tensor) -> Tensor:
            cross = self.cross_attentions[number]
            k_SKN, v_SKN = (cache.slots[name][number][slot_S] for name in ("cross_keys", "cross_values"))
            return cross.after_attention(x_TE, cross.attend(cross.queries(x_TE, rope), k_SKN, v_SKN, seen))

        newest_TE = None
        if self.injection is not None:
            newest_TE = self.injection.seen_by(
                cache.slots["injected"][0][new.row_T, slot_T],
                lambda: closing(decided.boundary_T, tokens, self.config.visibility),
            )
        h_TE = self.through_decoder(h_TE, tokens, attend, newest_TE, cache.stack("decoder", cache.tokens, where))
        return self.decoder_norm(h_TE), decided

    def extend_by_nothing(self) -> tuple[Tensor, Boundaries]:
        h_TE, _ = super().extend_by_nothing()
        probability_T = h_TE.new_zeros(0, dtype=torch.promote_types(h_TE.dtype, torch.float32))
        return h_TE, Boundaries(probability_T, probability_T.bool())

    def _decide(
        self, input_ids_T: Tensor, s_TE: Tensor, where: Appending | Stepping, past_D: Tensor, cache: ConceptCache
    ) -> Boundaries:
        """Boundaries behind a past, and what later ones and `crop` need of these tokens into the cache."""
        seen_T = self.detector.seen(input_ids_T, s_TE)
        where.write(cache.tokens["states"][0], s_TE)
        if seen_T is not s_TE:
            where.write(cache.seen_BS, seen_T)
        return self.detector(seen_T, where.layout, None, past_D)

    def _segment_means(self, s_TE: Tensor, segments: ClosedSegments, row_D: Tensor, cache: ConceptCache) -> Tensor:
        """Means of the states of those that close, (M, E), with what was open before; leaves in the cache the sums and
        numbers of those that are open now.
        """
        sum_GE = segment_sum(s_TE, segments.length_G).index_add_(0, segments.first_D, cache.open_sum_BE[row_D])
        count_G = segments.length_G.index_add(0, segments.first_D, cache.open_count_B[row_D])
        cache.open_sum_BE[row_D], cache.open_count_B[row_D] = sum_GE[segments.open_D], count_G[segments.open_D]
        closed_M = segments.closed_M
        return (sum_GE[closed_M] / count_G[closed_M, None]).to(s_TE.dtype)

    def step(
        self, input_ids_B: Tensor, active_B: Tensor, cache: ConceptCache, call: Call = directly, whole: bool = False
    ) -> tuple[Tensor, Boundaries]:
        """See `PackedCausalLM.step`. The host waits to know whether a segment closed in any row: mostly none does at
        batch 1, and the backbone need not be read.
        """
        read = call(self.read, input_ids_B, active_B, cache)
        if whole or any(OnHost(read.closing_B).read()):
            call(self.reason, read, cache)
            cache.most_concepts += not whole
        return call(self.answer, read, cache), read.decided

    def read(self, input_ids_B: Tensor, active_B: Tensor, cache: ConceptCache) -> Read:
        """A step's first part: encoder, boundary, and the bookkeeping of segments."""
        where = Stepping.of(cache.length_B, active_B, cache.tokens)
        past = cache.stack("encoder", cache.tokens, where)
        h_BE, s_BE = self.leave_encoder(self.encoder(self.embed_tokens(input_ids_B), where.layout, past))
        decided = self._decide(input_ids_B, s_BE, where, cache.last_seen(), cache)
        decided = Boundaries(decided.probability_T.masked_fill(~active_B, 0), decided.boundary_T & active_B)

        closing_B = closing(decided.boundary_T, where.layout, self.config.visibility)
        end_B = cache.length_B - CLOSING_LAG[self.config.visibility]
        if self.config.pooling == "mean":
            pooled_BE = self._open_means(s_BE, active_B, closing_B, cache).to(s_BE.dtype)
        else:
            pooled_BE = cache.states_at(where.layout.document_T, end_B.clamp(min=0))
        return Read(active_B, h_BE, decided, closing_B, pooled_BE, end_B)

    def _open_means(self, s_BE: Tensor, active_B: Tensor, closing_B: Tensor, cache: ConceptCache) -> Tensor:
        """Means of the segments that were open, (B, E), and leaves those in the cache that are open now."""
        lag = CLOSING_LAG[self.config.visibility]
        if lag == 0:
            self._add_to_open(s_BE, active_B, cache)
        mean_BE = cache.open_sum_BE / cache.open_count_B.clamp(min=1)[:, None]
        cache.open_sum_BE.masked_fill_(closing_B[:, None], 0)
        cache.open_count_B.masked_fill_(closing_B, 0)
        if lag:
            self._add_to_open(s_BE, active_B, cache)
        return mean_BE

    def _add_to_open(self, s_BE: Tensor, active_B: Tensor, cache: ConceptCache) -> None:
        cache.open_sum_BE += s_BE.masked_fill(~active_B[:, None], 0)
        cache.open_count_B += active_B

    def reason(self, read: Read, cache: ConceptCache) -> None:
        """A step's second part, where segments closed: their concepts."""
        where = Stepping.of(cache.concepts_B, read.closing_B, cache.concepts)
        self._reason(read.pooled_BE, read.end_B, where, cache.last_concept(), cache)
        cache.concepts_B += read.closing_B

    def _reason(
        self, pooled_ME: Tensor, end_M: Tensor, where: Appending | Stepping, past_DC: Tensor, cache: ConceptCache
    ) -> None:
        """From what stands for closed segments, which end at these positions, to what cross-attention reads."""
        concepts = where.layout
        z_MC = self.backbone(self.pooling.project(pooled_ME), concepts, cache.stack("backbone", cache.concepts, where))
        where.write(cache.concepts["reasoned"][0], z_MC)
        smooth_MC = self.smooth(z_MC, concepts, past_DC)
        rope = self.slot_rope(end_M)
        for number, cross in enumerate(self.cross_attentions):
            k_MKN, v_MKN = cross.keys_and_values(smooth_MC, rope)
            where.write(cache.slots["cross_keys"][number], k_MKN, shift=1)
            where.write(cache.slots["cross_values"][number], v_MKN, shift=1)
        where.write(cache.slots["end"][0], end_M, shift=1)
        if self.injection is not None:
            where.write(cache.slots["injected"][0], self.injection(smooth_MC), shift=1)

    def answer(self, read: Read, cache: ConceptCache) -> Tensor:
        """A step's last part: cross-attention, decoder, and logits (B, V)."""
        active_B = read.active_B
        where = Stepping.of(cache.length_B, active_B, cache.tokens)
        cache.count_newest(active_B)
        rope = self.slot_rope(where.layout.position_T)

        def attend(number: int, x_BE: Tensor) -> Tensor:
            cross = self.cross_attentions[number]
            return cross.after_attention(x_BE, cache.read_slots(number, cross.queries(x_BE, rope), active_B))

        newest_BE = None
        if self.injection is not None:
            newest_BE = self.injection.seen_by(cache.newest_injected(), lambda: read.closing_B)
        past = cache.stack("decoder", cache.tokens, where)
        h_BE = self.through_decoder(read.h_BE, where.layout, attend, newest_BE, past)
        cache.length_B += active_B
        return self.last_logits(self.decoder_norm(h_BE)[:, None])[:, 0]

    @torch.no_grad()
    def boundary_statistics(
        self,
        input_ids: Tensor,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        generator: torch.Generator | None = None,
    ) -> ParserStatistics:
        """Boundary statistics of one micro-batch: encoder and detector only, no gradient.

        Summed over a step's micro-batches and ranks, they are the `parser_total` that each of its forwards needs.
        With the same `generator` state, the forward draws the same boundaries.
        """
        input_ids_T, _, tokens = self.open_rows(input_ids, None, cu_seqlens, max_seqlen)
        _, s_TE = self.leave_encoder(self.encoder(self.embed_tokens(input_ids_T), tokens))
        return ParserStatistics.of(self.detector(self.detector.seen(input_ids_T, s_TE), tokens, generator), tokens)

    def set_sharpening(self, sharpening: float) -> None:
        """Sets the sharpness of the training-time draw, for schedules.

        Raises:
            ValueError: the segmenter does not sample.
        """
        if not isinstance(self.detector, LearnedDetector):
            raise ValueError(f"segmenter='{self.config.segmenter}' draws no boundaries: nothing to sharpen")
        self.detector.sharpening = sharpening

    def _aux_loss(
        self,
        decided: Boundaries,
        tokens: PackedLayout,
        own: ParserStatistics,
        total: ParserStatistics | RunningStatistics | None,
        averaged: bool,
    ) -> Tensor:
        if not self.config.has_ratio_loss:
            return decided.probability_T.new_zeros(())
        if isinstance(total, RunningStatistics):
            total = total.next(own)
        elif total is None:
            total = own.all_reduce() if self.training else own
        ranks = 1
        if averaged and self.training and torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
        return global_parser_loss(
            decided, tokens, self.target_ratio, self.config.parser_scope, total, gradient_scale=ranks
        )
