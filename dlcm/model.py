"""The Dynamic Large Concept Model (section 3): four stages, read top to bottom.

    H = Encoder(x)                            token width, causal
    b = Detect(H);  C = Pool(H, b)            tokens to concepts
    Z = Backbone(C)                           concept width, causal, M << L
    y = Decoder(H + CrossAttend(H, Smooth(Z)))  concepts back to tokens, causal

Two invariants come before everything: logits at position t depend on tokens <= t only, in training and in
evaluation; and packed documents do not see each other. Legend: T tokens, M concepts, E = d_token, C = d_concept,
V vocabulary, B x L padded rows, D documents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers.utils import ModelOutput

from dlcm.blocks import TransformerStack, concept_block_shape, token_block_shape
from dlcm.boundary import DETECTORS, Boundaries, LearnedDetector
from dlcm.causal_lm import PackedCausalLM
from dlcm.concepts import SMOOTHERS, ConceptPooling
from dlcm.config import DLCMConfig
from dlcm.cross_attention import CrossAttention
from dlcm.global_parser import ParserStatistics, RunningStatistics, global_parser_loss
from dlcm.layout import ConceptLayout, ConceptRooms, PackedLayout


@dataclass
class DLCMOutput(ModelOutput):
    """What a forward pass gives; (B, L) tensors are zero on padding.

    Attributes:
        loss: ce_loss + aux_loss_weight * aux_loss, if labels were given.
        logits: (B, L, V), unless declined.
        ce_loss: next-token cross-entropy in nats.
        aux_loss: ratio loss of the Global Parser (Eq. 10); zero for fixed boundaries.
        boundary_probs: (B, L), p_t.
        boundaries: (B, L) bool, b_t.
        concept_lengths: (M,) tokens in each concept, document after document.
        cu_concepts: (D + 1,) where each document's concepts begin.
        parser_statistics: sums behind F and G of this batch.
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


class DLCMForCausalLM(PackedCausalLM):
    """Encoder, boundary detector, concept backbone and decoder under a language-model head, strictly causal.

    Attributes:
        concept_rooms: how much room concepts are given, and whether the host waits to know (see `dlcm.compilation`).
    """

    config_class = DLCMConfig
    config: DLCMConfig

    def __init__(self, config: DLCMConfig):
        super().__init__(config)
        token_shape = token_block_shape(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.d_token)
        self.encoder = TransformerStack(token_shape, config.encoder_layers)
        self.detector = DETECTORS[config.segmenter](config)
        self.pooling = ConceptPooling(config)
        self.backbone = TransformerStack(concept_block_shape(config), config.backbone_layers)
        self.backbone_norm = nn.RMSNorm(config.d_concept, config.rms_norm_eps)
        self.smoothing = SMOOTHERS[config.smoothing](config)
        self.cross_attention = CrossAttention(config)
        self.decoder = TransformerStack(token_shape, config.decoder_layers)
        self.decoder_norm = nn.RMSNorm(config.d_token, config.rms_norm_eps)
        self.lm_head = nn.Linear(config.d_token, config.vocab_size, bias=False)
        self.concept_rooms = ConceptRooms()
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
            return_logits: False leaves logits out and the loss never holds more than a chunk of them; needs labels.
            return_dict: False returns a tuple.

        Raises:
            ValueError: inputs that do not fit together (see `open_rows`), or neither logits nor labels.
            AttentionBackendError: the configured attention backend cannot run here.
        """
        input_ids_T, rows, tokens = self.open_rows(input_ids, attention_mask, cu_seqlens, max_seqlen)

        h_TE = self.encoder(self.embed_tokens(input_ids_T), tokens)
        decided: Boundaries = self.detector(h_TE, tokens, generator)
        h_TE, layout = self.through_concepts(h_TE, decided, tokens)
        h_TE = self.decoder_norm(h_TE)
        logits, ce_loss = self.read_out(h_TE, labels, rows, tokens, num_items_in_batch, return_logits)

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

    def through_concepts(self, h_TE: Tensor, decided: Boundaries, tokens: PackedLayout) -> tuple[Tensor, ConceptLayout]:
        """From the encoder to the end of the decoder, (T, E) to (T, E), and the geometry of the concepts.

        The one wait of a forward pass for the device is here: at the end, where room for the concepts was foreseen.
        """
        rooms, visibility = self.concept_rooms, self.config.visibility
        room = rooms.foresee(tokens, self.training)
        if isinstance(next(self.backbone.parameters()), DTensor):
            room = None  # sharded: all ranks must run the same passes, so that none may have to run one again
        layout = ConceptLayout.from_boundaries(tokens, decided.boundary_T, visibility, rooms.bucket, room)
        y_TE = self.through_concepts_of(layout, h_TE)
        rooms.saw(tokens, self.training, layout.counts)
        if not layout.fits:
            rooms.misses += 1
            del y_TE
            layout = ConceptLayout.from_boundaries(tokens, decided.boundary_T, visibility, rooms.bucket)
            y_TE = self.through_concepts_of(layout, h_TE)
        return y_TE, layout

    def through_concepts_of(self, layout: ConceptLayout, h_TE: Tensor) -> Tensor:
        """Pooling, backbone, cross-attention and decoder."""
        c_MC = self.pooling(h_TE, layout)
        z_MC = self.smooth(self.backbone(c_MC, layout.concepts), layout.concepts)
        h_TE = self.cross_attention(h_TE, z_MC, layout)
        return self.decoder(h_TE, layout.tokens)

    def smooth(self, z_MC: Tensor, concepts: PackedLayout) -> Tensor:
        """What cross-attention reads: concepts of the backbone, normed, then blended with their predecessors."""
        return self.smoothing(self.backbone_norm(z_MC), concepts)

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
        h_TE = self.encoder(self.embed_tokens(input_ids_T), tokens)
        return ParserStatistics.of(self.detector(h_TE, tokens, generator), tokens)

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
        if self.config.segmenter == "fixed":
            return decided.probability_T.new_zeros(())
        if isinstance(total, RunningStatistics):
            total = total.next(own)
        elif total is None:
            total = own.all_reduce() if self.training else own
        ranks = 1
        if averaged and self.training and torch.distributed.is_initialized():
            ranks = torch.distributed.get_world_size()
        return global_parser_loss(
            decided, tokens, self.config.target_ratio, self.config.parser_scope, total, gradient_scale=ranks
        )
