"""Messages of the exchange as bytes: klines as frames and as rows of REST."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from kronos_stream.testing.exchange.instruments import Instrument

OPEN, HIGH, LOW, CLOSE, VOLUME, AMOUNT, TRADES, FIRST = range(8)
"""Columns of a bar: those of a candle, the number of trades, and the id of the first one."""

TAKER_BUY_SHARE = 0.48
"""Share of the volume that takers bought; clients ignore it."""

_TEXT, _PING = 0x81, 0x89


def frame(payload: bytes, first: int = _TEXT) -> bytes:
    """A websocket frame from a server (RFC 6455), ready for the wire."""
    size = len(payload)
    if size < 126:
        return bytes((first, size)) + payload
    if size < 65_536:
        return bytes((first, 126)) + size.to_bytes(2, "big") + payload
    return bytes((first, 127)) + size.to_bytes(8, "big") + payload


def ping(payload: bytes) -> bytes:
    """A ping frame."""
    return frame(payload, _PING)


class Kline(NamedTuple):
    """One push of a bar."""

    stream: bytes
    raw: bytes
    """Frame for connections to /ws."""
    corrupted: bytes | None = None
    """Frame for connections to /stream, if it is not the same in a wrapper."""

    def combined(self) -> bytes:
        if self.corrupted is not None:
            return self.corrupted
        return b'{"stream":"%s","data":%s}' % (self.stream, self.raw)


class KlineWriter:
    """Encodes the klines of one instrument and interval."""

    def __init__(self, instrument: Instrument, interval: str) -> None:
        name = instrument.name
        price, volume = instrument.digits
        p, v, a = f"%.{price}f", f"%.{volume}f", f"%.{min(8, price + volume)}f"
        self._stream = f"{name.lower()}@kline_{interval}".encode()
        self._push = (
            f'{{"e":"kline","E":%d,"s":"{name}","k":{{"t":%d,"T":%d,"s":"{name}","i":"{interval}",'
            f'"f":%d,"L":%d,"o":"{p}","c":"{p}","h":"{p}","l":"{p}","v":"{v}","n":%d,"x":%s,'
            f'"q":"{a}","V":"{v}","Q":"{a}","B":"0"}}}}'
        ).encode()
        self._row = (f'[%d,"{p}","{p}","{p}","{p}","{v}",%d,"{a}",%d,"{v}","{a}","0"]').encode()

    def push(
        self, bar: Sequence[float], opened: int, closes: int, *, final: bool, event: int
    ) -> Kline:
        """Encode a bar from its open, close and event times, in UTC ms."""
        o, h, l, c, v, a, n, first = bar  # noqa: E741
        last = first + n - 1
        payload = self._push % (
            event, opened, closes - 1, first if n else -1, last if n else -1, o, c, h, l, v, n,
            b"true" if final else b"false", a, v * TAKER_BUY_SHARE, a * TAKER_BUY_SHARE,
        )  # fmt: skip
        return Kline(self._stream, payload)

    def row(self, bar: Sequence[float], opened: int, closes: int) -> bytes:
        o, h, l, c, v, a, n, _ = bar  # noqa: E741
        return self._row % (
            opened, o, h, l, c, v, closes - 1, a, n, v * TAKER_BUY_SHARE, a * TAKER_BUY_SHARE,
        )  # fmt: skip


def round_to_precision(bars: npt.NDArray[np.float64], digits: npt.NDArray[np.int64]) -> None:
    """Round bars (instruments, 8) in place to the precision of their decimal strings.

    ``digits``: (instruments, 2), decimals of prices and volumes. True bars then equal what
    clients parse.
    """
    for columns, decimals in (
        ([OPEN, HIGH, LOW, CLOSE], digits[:, :1]),
        ([VOLUME], digits[:, 1:]),
        ([AMOUNT], np.minimum(8, digits.sum(1, keepdims=True))),
    ):
        scale = 10.0**decimals
        exact = bars[:, columns]
        # Beyond 2**53 steps doubles are coarser than the precision, so that nothing is to round.
        bars[:, columns] = np.where(
            np.abs(exact) * scale < 2.0**53, np.rint(exact * scale) / scale, exact
        )
