"""AdamW, and beside it row-wise Adagrad for tables of which a step reads few rows.

Row-wise Adagrad (Adagrad of Duchi et al., JMLR 2011, with one number a row, as in Mudigere et al., ISCA 2022, and
TorchRec) keeps the sum of each row's mean squared gradient, 4 bytes, where AdamW keeps two numbers for each weight and
moves all of them at every step. Plain torch.

Shapes: R rows of a table · U rows that a step reads · D width.
"""

from __future__ import annotations

from typing import Any

import torch

ROW_SUM = "row_sum"
EPSILON = 1e-10
_ROWS_AT_A_TIME = 65_536


class RowwiseAdamW(torch.optim.AdamW):
    """AdamW in which the groups with `rowwise` True move by row-wise Adagrad: without weight decay or momentum, and
    only the rows that their sparse gradient names."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            if not group.get("rowwise"):
                continue
            for table in group["params"]:
                if table.grad is not None:
                    self._move_rows(table, group["lr"])
                    table.grad = None  # AdamW leaves it alone
        return super().step(closure)

    def _move_rows(self, table: torch.Tensor, rate: float) -> None:
        gradient = table.grad.coalesce()  # type: ignore[union-attr]
        rows, values = gradient.indices()[0], gradient.values()  # (U,), (U, D)
        sums = self.state[table].setdefault(ROW_SUM, torch.zeros(len(table), device=table.device))
        for at in range(0, len(rows), _ROWS_AT_A_TIME):
            some, moved = rows[at : at + _ROWS_AT_A_TIME], values[at : at + _ROWS_AT_A_TIME]
            total = sums[some] + moved.square().mean(1)
            sums[some] = total
            table.index_add_(0, some, moved / (total.sqrt() + EPSILON).unsqueeze(1), alpha=-rate)
