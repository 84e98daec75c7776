"""Invalid frames and responses, of kinds observed at venues and proxies."""

from __future__ import annotations

from random import Random
from typing import Any

import orjson
from aiohttp import web

from kronos_stream.testing.exchange.frames import Kline

_FAR_FUTURE_MS = 4_102_444_800_000  # 2100


def corrupt_push(kline: Kline, random: Random) -> Kline:
    """Turn a push into one that clients must reject."""
    raw, combined = _corrupt_payload(kline.raw, kline.combined(), random)
    return Kline(kline.stream, raw, combined)


def _corrupt_payload(raw: bytes, combined: bytes, random: Random) -> tuple[bytes, bytes]:
    how = random.randrange(10)
    if how == 0:  # cut off
        share = random.random()
        return raw[: int(share * len(raw))], combined[: int(share * len(combined))]
    if how == 1:
        page = b"<html><body>502 Bad Gateway</body></html>"
        return page, page
    if how == 2:
        other = random.choice((b"null", b"[]", b"{}", b"42", b'"kline"', b'{"data":[]}', b"", b" "))
        return other, other
    if how == 3:  # of an unknown stream
        other = b'{"e":"kline","E":1,"s":"NOSUCHUSDT","k":{}}'
        return other, b'{"stream":"nosuchusdt@kline_1m","data":%s}' % other
    if how == 4:
        other = b'{"e":"trade","E":1,"s":"SIM00USDT","p":"1"}'
        return other, b'{"stream":"sim00usdt@trade","data":%s}' % other
    message = orjson.loads(combined)
    _corrupt_field(message["data"]["k"], random)
    return orjson.dumps(message["data"]), orjson.dumps(message)


def _corrupt_field(kline: dict[str, Any], random: Random) -> None:
    """Make one field, or a combination of two, invalid."""
    how = random.randrange(7)
    if how == 0:
        kline[random.choice("ohlcv")] = random.choice(
            ("", "abc", None, [], {}, "NaN", "Infinity", "-1", "1e400")
        )
    elif how == 1:
        del kline[random.choice("tohlcv")]
    elif how == 2:  # above its own high
        kline["c"] = f"{float(kline['h']) * 2 + 1:.8f}"
    elif how == 3:
        kline["h"], kline["l"] = kline["l"], f"{float(kline['h']) + 1:.8f}"
    elif how == 4:
        kline["t"] = random.choice(("yesterday", None, -1, 1.5, {}, 10**18))
    elif how == 5:
        kline["l"] = kline["o"] = "0.00000000"
    else:  # closed before it opened
        length = kline["T"] - kline["t"]
        kline["t"] = _FAR_FUTURE_MS
        kline["T"] = _FAR_FUTURE_MS + length


def error_response(random: Random) -> web.Response:
    """An error response of the venue, or of a proxy in front of it."""
    status = random.choice((500, 502, 503, 504))
    if random.random() < 0.5:
        text = f"<html><head><title>{status}</title></head><body></body></html>"
        return web.Response(status=status, text=text, content_type="text/html")
    body = {"code": -1001, "msg": "Internal error; unable to process your request."}
    return web.json_response(body, status=status)


def corrupt_body(body: bytes, random: Random) -> bytes:
    """Corrupt the body of a REST response."""
    how = random.randrange(4)
    if how == 0 and len(body) > 2:
        return body[: random.randrange(1, len(body) - 1)]
    if how == 1:
        return b"<html><body>Please stand by</body></html>"
    if how == 2:
        return b'{"result":"ok"}'
    return b'[["a","b"],[1,2,3],null,{}]'
