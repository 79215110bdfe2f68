"""A linear layer some of whose rows and columns are not there."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PartialLinear(nn.Linear):
    """y = x W^T, x (T, I), y (T, O), of R rows and C columns of W: other rows of y are 0, other columns of x not read.

    Attributes:
        weight: (R, C).
        rows, columns: which of y and x they are, (R,) and (C,); None: all, R = O or C = I.
    """

    rows: Tensor | None
    columns: Tensor | None

    def __init__(self, weight: nn.Parameter):
        super().__init__(1, 1, bias=False, device="meta")  # sizes follow
        self.weight = weight
        self.place_(None, None)

    def place_(self, rows_O: Tensor | None, columns_I: Tensor | None) -> None:
        """Says which rows of y and columns of x the weights stand for; None: all, as many as there are.

        Args:
            rows_O, columns_I: bool, on the CPU; True R and C times.
        """
        self._places = rows_O, columns_I
        self.out_features, self.in_features = (
            size if kept is None else len(kept) for size, kept in zip(self.weight.shape, self._places, strict=True)
        )
        self.place_again_()

    def place_again_(self) -> None:
        """Makes the buffers anew, which no checkpoint holds."""
        device = torch.device("cpu") if self.weight.is_meta else self.weight.device
        for name, kept in zip(("rows", "columns"), self._places, strict=True):
            index = None if kept is None or kept.all() else kept.nonzero().squeeze(1).to(device)
            self.register_buffer(name, index, persistent=False)

    def used_weight(self) -> Tensor:
        return self.weight

    def placed(self, weight_RC: Tensor) -> Tensor:
        """W, (O, I), of what is there of it."""
        weight_OI = weight_RC
        if self.rows is not None:
            weight_OI = weight_OI.new_zeros(self.out_features, weight_OI.shape[1]).index_copy(0, self.rows, weight_OI)
        if self.columns is not None:
            weight_OI = weight_OI.new_zeros(len(weight_OI), self.in_features).index_copy(1, self.columns, weight_OI)
        return weight_OI

    def forward(self, input: Tensor) -> Tensor:
        y_TR = F.linear(input if self.columns is None else input.index_select(-1, self.columns), self.used_weight())
        if self.rows is None:
            return y_TR
        return y_TR.new_zeros(*y_TR.shape[:-1], self.out_features).index_copy(-1, self.rows, y_TR)
