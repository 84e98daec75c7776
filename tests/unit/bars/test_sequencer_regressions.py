"""What trials of the whole daemon have found in the tape, each in its smallest form."""

from __future__ import annotations

from random import Random

from kronos_stream.bars.effects import Fetch, Revise
from kronos_stream.bars.sequencer import BarSequencer
from kronos_stream.market.candle import Bar, Candle
from kronos_stream.market.timeframe import Timeframe

START = 1_750_000_000_000


def bar(time: int) -> Candle:
    return Candle(time, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)


def test_a_debt_is_paid_though_the_venues_clock_is_behind_ours() -> None:
    """Fault seed 125: 4 s behind, so that each bar seems late and is asked for in vain."""
    behind = 4_000
    known = [Bar(bar(START + 1000 * i)) for i in range(-44, -4)]
    known[-5] = Bar(bar(known[-5].candle.time)._replace(volume=0.0), synthetic=True)  # owed
    tape = BarSequencer(
        Timeframe(1, "s"), Random(1), grace_seconds=2.0, history_lag_seconds=None, fills_empty=True,
        history_bars=40, bars=known, complete=True,
    )  # fmt: skip
    paid = []
    for now in range(START, START + 180_000, 100):
        if (now - behind - 1) // 1000 != (now - behind - 101) // 1000:  # a bar has closed there
            tape.update(bar((now - behind) // 1000 * 1000 - 1000), True, now)  # noqa: FBT003
        for effect in tape.tick(now):
            if isinstance(effect, Fetch):
                last = min(effect.end, (now - behind) // 1000 * 1000)
                answer = [bar(time) for time in range(effect.start, last, 1000)]
                effects = tape.fetch_completed(effect, answer, now)
                paid += [one for one in effects if isinstance(one, Revise)]
    assert [one.bar.candle.time for one in paid] == [known[-5].candle.time]
