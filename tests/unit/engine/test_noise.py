"""Noise: published Philox vectors, and stable keys."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from kronos_stream.engine.noise import _unit_interval, noise_key, philox, uniforms

ALL_ONES = 0xFFFFFFFF
WORDS = st.lists(st.integers(0, ALL_ONES), min_size=6, max_size=6)


def words(counter: list[int], key: list[int]) -> list[int]:
    """One Philox block."""
    c, k = ([torch.tensor(word) for word in part] for part in (counter, key))
    return [int(word) for word in philox((c[0], c[1], c[2], c[3]), (k[0], k[1]))]


def plain_philox(counter: list[int], key: list[int]) -> list[int]:
    """Philox4x32-10 in Python's integers, from its paper."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & ALL_ONES, (p0 >> 32) ^ c3 ^ k1, p0 & ALL_ONES
        k0, k1 = (k0 + 0x9E3779B9) & ALL_ONES, (k1 + 0xBB67AE85) & ALL_ONES
    return [c0, c1, c2, c3]


@pytest.mark.parametrize(
    ("counter", "key", "answer"),
    [
        ([0] * 4, [0] * 2, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        ([ALL_ONES] * 4, [ALL_ONES] * 2, "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            "d16cfe09 94fdcceb 5001e420 24126ea1",
        ),
    ],
)
def test_philox_known_answers(counter: list[int], key: list[int], answer: str) -> None:
    """The known-answer vectors that Random123 publishes."""
    assert words(counter, key) == [int(word, 16) for word in answer.split()]


@given(WORDS)
def test_philox_on_any_words(block: list[int]) -> None:
    """int64 tensors multiply 32-bit words without losing bits."""
    assert words(block[:4], block[4:]) == plain_philox(block[:4], block[4:])


def test_uniforms_are_philox_of_path_and_step() -> None:
    """Counter (path, step, two key words), the first two words of a block for the two levels."""
    keys = [[1, 2, 3, 4], [ALL_ONES, 0, 5, ALL_ONES]]
    got = uniforms(torch.tensor(keys), first_path=7, paths=3, steps=2)
    assert got.shape == (2, 2, 2, 3)
    for step in range(2):
        for i, (k0, k1, c2, c3) in enumerate(keys):
            for path in range(3):
                block = plain_philox([7 + path, step, c2, c3], [k0, k1])
                for level in range(2):
                    wanted = ((block[level] >> 9) + 0.5) / 2**23
                    assert got[step, level, i, path].item() == wanted


@pytest.mark.parametrize("word", [0, 511, 512, 0x7FFFFFFF, 0x80000000, ALL_ONES])
def test_uniform_numbers_are_never_0_or_1(word: int) -> None:
    """Exact in float32, and inside (0, 1) even for the least and the greatest word."""
    unit = _unit_interval(torch.tensor(word))
    assert unit.dtype == torch.float32
    assert 0 < unit.item() < 1
    assert unit.item() == ((word >> 9) + 0.5) / 2**23


def test_uniforms_are_evenly_distributed() -> None:
    """Over 160,000 numbers, each of 16 equal bins holds its share within 5 standard errors."""
    keys = torch.tensor([noise_key(0, "venue:A/B:1m", 1_700_000_000_000)])
    numbers = uniforms(keys, 0, 20_000, 4).flatten()
    counts = torch.histc(numbers, bins=16, min=0, max=1)
    share = len(numbers) / 16
    assert (counts - share).abs().max().item() < 5 * share**0.5


@pytest.mark.parametrize(
    ("seed", "series", "origin", "key"),
    [
        (0, "binance:BTC/USDT:5m", 1700000000000, (1916426125, 4019554132, 2355915080, 2737969879)),
        (-1, "0", 0, (1106103779, 3331840558, 2980067745, 386905534)),
        (
            4611686018427387904,
            "börse:Ω/円:1M",
            -86400000,
            (487808249, 1446592571, 4013440220, 349785887),
        ),
    ],
)
def test_noise_keys_are_stable(seed: int, series: str, origin: int, key: tuple[int, ...]) -> None:
    """A published forecast can be recomputed by any later version, process or machine."""
    assert noise_key(seed, series, origin) == key


@given(
    st.lists(st.tuples(st.integers(-9, 99), st.text(max_size=4), st.integers(-9, 99)), unique=True)
)
def test_different_forecasts_have_different_keys(identities: list[tuple[int, str, int]]) -> None:
    """Seed, series and origin cannot be confused by concatenation."""
    assert len({noise_key(*identity) for identity in identities}) == len(identities)
