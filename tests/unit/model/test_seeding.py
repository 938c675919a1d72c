"""The random streams of torch, set to a seed."""

from __future__ import annotations

import torch

from pixrec.model.seeding import reseed, seed_of, seeded


def test_the_stream_is_that_of_torch():
    with seeded(0):
        torch.manual_seed(5)
        theirs = torch.rand(3)
        reseed(5, torch.device("cpu"))
        assert torch.equal(torch.rand(3), theirs)


def test_the_stream_outside_goes_on_where_it_was():
    with seeded(1):
        undisturbed = torch.rand(4)
    with seeded(1):
        first = torch.rand(2)
        with seeded(2):
            torch.rand(7)
        assert torch.equal(torch.cat([first, torch.rand(2)]), undisturbed)


def test_near_numbers_give_unlike_seeds():
    seeds = {seed_of([0, step, rank]) for step in range(50) for rank in range(4)}
    assert len(seeds) == 200
    assert seed_of([0, 1, 2]) == seed_of([0, 1, 2]) != seed_of([0, 2, 1])
