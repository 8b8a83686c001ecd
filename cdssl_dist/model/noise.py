"""Counter-based noise: the displacement of an atom depends on (seed, epoch, block, atom), and on nothing else.

Philox4x32-10 (Salmon et al., SC 2011) in integer tensor arithmetic, so that a CPU and a GPU draw the same numbers, at
any rank and after any restart, and no generator state has to be saved.
"""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor

_WORD: Final = 0xFFFFFFFF
_MULTIPLIERS: Final = (0xD2511F53, 0xCD9E8D57)
_WEYL: Final = (0x9E3779B9, 0xBB67AE85)
_ATOMS, _GRAPHS, _STRETCH, _SHEAR, _MASK = range(5)  # the last word of the counter tells the uses apart


def philox(counter: Tensor, key: tuple[int, int]) -> Tensor:
    """Philox4x32-10.

    Args:
        counter: (n, 4) i64, each a 32-bit word.
        key: two 32-bit words.

    Returns:
        (n, 4) i64, each a uniform 32-bit word.
    """
    c0, c1, c2, c3 = counter.unbind(1)
    k0, k1 = key
    for _ in range(10):
        # The product of two words fills 64 bits; as i64 it may be negative, so the high word is masked after the shift.
        p0, p1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((p1 >> 32) & _WORD) ^ c1 ^ k0,
            p1 & _WORD,
            ((p0 >> 32) & _WORD) ^ c3 ^ k1,
            p0 & _WORD,
        )
        k0, k1 = (k0 + _WEYL[0]) & _WORD, (k1 + _WEYL[1]) & _WORD
    return torch.stack([c0, c1, c2, c3], dim=1)


def _uniform(counter: Tensor, seed: int, use: int) -> Tensor:
    """(n, 4) uniform in (0, 1), f64, from (n, 3) counters."""
    words = torch.cat([counter & _WORD, torch.full_like(counter[:, :1], use)], dim=1)
    return (philox(words, (seed & _WORD, (seed >> 32) & _WORD)).to(torch.float64) + 0.5) * 2.0**-32


def gaussian(counter: Tensor, seed: int, use: int = _ATOMS) -> Tensor:
    """Standard normal vectors by Box and Muller (1958), in f64, so that all devices round to the same f32.

    Args:
        counter: (n, 3) i64 | epoch, block, atom in block.
        seed: of the noise.
        use: purpose of the numbers; each use draws different ones.

    Returns:
        (n, 3) f32.
    """
    u = _uniform(counter, seed, use)
    radius = torch.sqrt(-2.0 * torch.log(u[:, 0::2]))
    angle = 2.0 * math.pi * u[:, 1::2]
    normal = torch.cat([radius * torch.cos(angle), radius * torch.sin(angle)], dim=1)
    return normal[:, :3].to(torch.float32)


def sigma_of(counter: Tensor, low: float, high: float, seed: int) -> Tensor:
    """σ of each graph, log-uniform in [low, high]: (n, 3) counters → (n,) f32, Å."""
    u = _uniform(counter, seed, _GRAPHS)[:, 0]
    return torch.exp(math.log(low) + u * math.log(high / low)).to(torch.float32)


def strain_of(counter: Tensor, size: float, seed: int) -> Tensor:
    """Random symmetric strains, isotropic (Gaussian orthogonal ensemble).

    Args:
        counter: (G, 3) i64 | epoch, block, graph in block.
        size: standard deviation of a diagonal component; that of the others is smaller by √2.
        seed: of the noise.

    Returns:
        (G, 3, 3) f32, no unit.
    """
    stretch, shear = gaussian(counter, seed, _STRETCH), gaussian(counter, seed, _SHEAR) / math.sqrt(2.0)
    (a, b, c), (d, e, f) = stretch.unbind(1), shear.unbind(1)
    return size * torch.stack([a, d, e, d, b, f, e, f, c], dim=1).view(-1, 3, 3)


def masked(counter: Tensor, share: float, seed: int) -> Tensor:
    """Which atoms hide their element, each with probability ``share``: (N, 3) counters → (N,) bool."""
    return _uniform(counter, seed, _MASK)[:, 0] < share
