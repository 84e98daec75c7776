"""Counter-based noise: each random number is a function of its use, not of call order.

Philox4x32-10 after Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC'11). The key is
a stable hash of (seed, series, origin), the counter is (path, step). The two levels of a step use
the first two of a block's four words. Therefore no draw depends on the batch, the horizon or the
number of paths, and each path can be recomputed alone.
"""

from __future__ import annotations

import hashlib
from operator import index

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10
_MASK = 0xFFFFFFFF


def noise_key(seed: int, series: str, origin: int) -> tuple[int, int, int, int]:
    """Hash a forecast's identity (UTF-8, BLAKE2b) to 128 stable bits, as four 32-bit words."""
    text = f"{index(seed)}\x00{series}\x00{origin}".encode()
    digest = hashlib.blake2b(text, digest_size=16, person=b"kronos-noise-v1").digest()
    words = [int.from_bytes(digest[i : i + 4], "little") for i in range(0, 16, 4)]
    return words[0], words[1], words[2], words[3]


def uniforms(keys: Tensor, first_path: int, paths: int, steps: int) -> Tensor:
    """Uniform float32 in (0, 1): keys (C, 4) int64 to (steps, 2, C, paths), on the keys' device."""
    device = keys.device
    step = torch.arange(steps, device=device).view(-1, 1, 1)
    path = torch.arange(first_path, first_path + paths, device=device)
    k0, k1, c2, c3 = (keys[:, i].view(1, -1, 1) for i in range(4))
    shape = steps, len(keys), paths
    words = philox((path.expand(shape), step.expand(shape), c2, c3), (k0, k1))
    return torch.stack([_unit_interval(word) for word in words[:2]], dim=1)


def philox(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Compute Philox4x32-10 on int64 tensors of unsigned 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _MASK, (k1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _multiply(a: Tensor, b: int) -> tuple[Tensor, Tensor]:
    # The product wraps in int64, but its 64 bits are correct; the mask undoes the sign extension.
    product = a * b
    return (product >> 32) & _MASK, product & _MASK


def _unit_interval(word: Tensor) -> Tensor:
    # 23 bits plus a half: exact in float32, never 0 and never 1.
    return ((word >> 9).float() + 0.5) * 2.0**-23
