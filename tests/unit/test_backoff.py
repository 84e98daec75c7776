"""Exponential backoff and errors of exception groups."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from kronos_stream.backoff import Backoff
from kronos_stream.errors import first_error


@given(st.integers(0, 1_000), st.floats(0.1, 10), st.floats(10, 1_000))
def test_delays_double_up_to_the_maximum(seed: int, initial: float, maximum: float) -> None:
    backoff = Backoff(Random(seed), initial=initial, maximum=maximum)
    for attempt in range(30):
        bound = min(initial * 2**attempt, maximum)
        assert 0.5 * bound <= backoff.next_delay() <= bound
    assert backoff.attempts == 30


def test_reset_starts_again_from_the_initial_delay() -> None:
    backoff = Backoff(Random(0), initial=1, maximum=60, jitter=(1, 1))
    assert [backoff.next_delay() for _ in range(8)] == [1, 2, 4, 8, 16, 32, 60, 60]
    backoff.reset()
    assert backoff.next_delay() == 1


def test_first_error_looks_into_nested_groups() -> None:
    cause = ValueError("first")
    inner = ExceptionGroup("inner", [cause, KeyError("second")])
    assert first_error(ExceptionGroup("outer", [inner, OSError("third")])) is cause
