"""Joint decisions of the ranks: an error on one is raised on all."""

from __future__ import annotations

import torch
import torch.distributed as dist
from launch import launch

from cdssl_dist.train.engine import init_distributed
from cdssl_dist.train.setup import SetupError
from cdssl_dist.train.together import on_all_ranks, on_rank_0


def said(failing: tuple[int, ...]) -> list[str]:
    """What one rank makes of both ways, where some ranks fail."""
    init_distributed(torch.device("cpu"))
    rank = dist.get_rank()

    def act() -> str:
        if rank in failing:
            raise SetupError(f"rank {rank} has none")
        return f"rank {rank}"

    found = []
    for together in (on_rank_0, on_all_ranks):
        try:
            found.append(together(act))
        except SetupError as why:
            found.append(f"error: {why}")
    dist.barrier()  # nobody is left behind
    return found


def test_all_ranks_hear_of_what_one_met() -> None:
    assert launch(2, said, ()) == [["rank 0", "rank 0"], ["rank 0", "rank 1"]]
    assert launch(2, said, (0,)) == [["error: rank 0 has none"] * 2] * 2
    assert launch(2, said, (1,)) == [["rank 0", "error: rank 1 has none"]] * 2
