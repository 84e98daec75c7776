"""One connection to Binance as a machine: no socket, no clock; times are seconds."""

from __future__ import annotations

from itertools import pairwise

import orjson
import pytest

from kronos_connectors.binance.frames import Answer
from kronos_connectors.binance.session import Session


def session(now: float = 0.0) -> Session:
    return Session(now, stall_seconds=30, lifetime_seconds=3_600)


def streams(count: int) -> set[str]:
    return {f"s{i:04}usdt@kline_1m" for i in range(count)}


def drive(one: Session, until: float, *, answers: bool = True) -> list[tuple[float, str, set[str]]]:
    """Ask for requests every 10 ms: (when, method, streams) each; answered at once."""
    sent = []
    for tick in range(int(until * 100)):
        now = tick / 100
        for raw in one.requests(now):
            request = orjson.loads(raw)
            sent.append((now, request["method"], set(request["params"])))
            if answers:
                one.answered(Answer(request["id"], ""))
    return sent


def test_streams_are_asked_for_in_steps_slower_than_five_a_second() -> None:
    one = session()
    one.want(streams(1_024))
    sent = drive(one, 10)
    assert set.union(*(asked for _, _, asked in sent)) == streams(1_024)
    assert sum(len(asked) for _, _, asked in sent) == 1_024
    times = [now for now, _, _ in sent]
    assert all(later - earlier >= 0.3 for earlier, later in pairwise(times))
    assert one.live


def test_changes_ask_for_the_difference_alone() -> None:
    one = session()
    one.want({"a", "b"})
    drive(one, 1)
    one.want({"b", "c"})
    assert not one.live
    sent = [(method, asked) for _, method, asked in drive(one, 3)]
    assert sent == [("SUBSCRIBE", {"c"}), ("UNSUBSCRIBE", {"a"})]
    assert drive(one, 3) == []


def test_a_request_without_an_answer_breaks_the_connection() -> None:
    one = session()
    one.want({"a"})
    drive(one, 0.02, answers=False)
    assert not one.live
    one.heard(9)
    assert one.broken(9) == ""
    assert "no answer" in one.broken(10.1)


def test_a_refused_request_breaks_the_connection_with_the_venues_words() -> None:
    one = session()
    one.want({"a"})
    drive(one, 0.02, answers=False)
    one.answered(Answer(1, "Invalid request"))
    assert one.broken(0.1) == "request refused: Invalid request"


def test_an_error_without_a_number_counts_too() -> None:
    one = session()
    one.answered(Answer(None, "too many messages"))
    assert "too many messages" in one.broken(0)


def test_silence_breaks_the_connection_and_frames_end_the_silence() -> None:
    one = session()
    assert one.broken(29.9) == ""
    assert "nothing heard" in one.broken(30)
    one.heard(30)
    assert one.broken(59) == ""


def test_age_and_a_servers_farewell_tire_without_breaking() -> None:
    old, told = session(), session()
    assert not old.tired(3_599)
    assert old.tired(3_600)
    told.shut_down()
    assert told.tired(1)
    assert told.broken(1) == ""


@pytest.mark.parametrize("now", [0.0, 12_345.678])
def test_it_wakes_no_later_than_something_is_due(now: float) -> None:
    one = session(now)
    assert one.wake(now) == pytest.approx(30)
    one.want({"a"})
    assert one.wake(now) == 0
    one.requests(now)
    assert one.wake(now) == pytest.approx(10)
