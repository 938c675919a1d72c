"""Row-wise Adagrad beside AdamW: what moves, by how much, and what is kept."""

import torch

from pixrec.model.rowwise import RowwiseAdamW


def test_rows_move_by_their_own_history_of_gradients():
    """The step of a row is rate * g / sqrt(sum of mean squares of g), also where a row comes twice in one gradient."""
    table = torch.nn.Embedding(5, 2, sparse=True).weight
    start = table.detach().clone()
    optimizer = RowwiseAdamW([{"params": [table], "lr": 0.5, "rowwise": True}])
    sums = torch.zeros(5)
    expected = start.clone()
    for rows, gradient in (([1, 3, 1], [[1.0, 2.0], [0.5, 0.0], [2.0, 1.0]]), ([3], [[4.0, 4.0]])):
        table.grad = torch.sparse_coo_tensor(
            torch.tensor([rows]), torch.tensor(gradient), (5, 2), check_invariants=True
        )
        dense = table.grad.to_dense()
        for row in set(rows):
            sums[row] += dense[row].square().mean()
            expected[row] -= 0.5 * dense[row] / sums[row].sqrt()
        optimizer.step()
        assert table.grad is None
    torch.testing.assert_close(table.detach(), expected)
    torch.testing.assert_close(optimizer.state[table]["row_sum"], sums)


def test_other_groups_move_as_adamw_moves_them():
    ours, theirs = (torch.nn.Parameter(torch.tensor([1.0, -2.0])) for _ in range(2))
    both = RowwiseAdamW([ours], lr=0.1), torch.optim.AdamW([theirs], lr=0.1)
    for weight, optimizer in zip((ours, theirs), both, strict=True):
        for _ in range(3):
            weight.grad = torch.tensor([0.3, 0.1])
            optimizer.step()
    assert torch.equal(ours, theirs)
