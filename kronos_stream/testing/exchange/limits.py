"""Request weights per address and minute, refusals and bans."""

from __future__ import annotations

from dataclasses import dataclass

from aiohttp import web

from kronos_stream.market.clock import Clock

MINUTE_MS = 60_000
_MAX_REFUSALS = 10
"""Requests answered with 429 in a minute before the address is banned."""
_MIN_BAN_SECONDS = 120
_MAX_BAN_SECONDS = 3 * 86_400
_MAX_ADDRESSES = 10_000


class ApiError(Exception):
    """An error response: HTTP status, and Binance's code and message."""

    def __init__(self, status: int, code: int, message: str, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message
        self.retry_after = retry_after

    def response(self) -> web.Response:
        headers = {"Retry-After": str(self.retry_after)} if self.retry_after else None
        body = {"code": self.code, "msg": self.message}
        return web.json_response(body, status=self.status, headers=headers)


@dataclass(slots=True)
class _Account:
    minute: int = -1
    used: int = 0
    refused: int = 0
    bans: int = 0
    banned_until: int = 0


class WeightLimit:
    """Limit of request weight per address and minute of the exchange's clock."""

    def __init__(self, limit: int, clock: Clock) -> None:
        self.limit, self._clock = limit, clock
        self._accounts: dict[str, _Account] = {}

    def charge(self, address: str, weight: int) -> int:
        """Add to the weight of this minute, and return it. Raises ApiError above the limit."""
        now = self._clock.now()
        account = self._account(address)
        if now < account.banned_until:
            raise banned(account.banned_until, now)
        if account.minute != now // MINUTE_MS:
            account.minute, account.used, account.refused = now // MINUTE_MS, 0, 0
        account.used += weight
        if account.used <= self.limit:
            return account.used
        account.refused += 1
        if account.refused > _MAX_REFUSALS:
            seconds = min(_MIN_BAN_SECONDS * 2**account.bans, _MAX_BAN_SECONDS)
            account.bans = min(account.bans + 1, 12)
            account.banned_until = now + seconds * 1000
            raise banned(account.banned_until, now)
        raise rate_limited(self.limit, MINUTE_MS - now % MINUTE_MS)

    def used(self, address: str) -> int:
        """Weight used in this minute, UTC."""
        account = self._account(address)
        return account.used if account.minute == self._clock.now() // MINUTE_MS else 0

    def _account(self, address: str) -> _Account:
        if address not in self._accounts and len(self._accounts) >= _MAX_ADDRESSES:
            self._accounts.clear()
        return self._accounts.setdefault(address, _Account())


def rate_limited(limit: int, wait_ms: int) -> ApiError:
    """Error 429, with a retry allowed in ``wait_ms``."""
    return ApiError(
        429,
        -1003,
        f"Too much request weight used; current limit is {limit} request weight per 1 MINUTE. "
        "Please use WebSocket Streams for live updates to avoid polling the API.",
        -(-wait_ms // 1000),
    )


def banned(until: int, now: int) -> ApiError:
    """Error 418, with a ban until ``until``, UTC ms."""
    return ApiError(
        418,
        -1003,
        f"Way too much request weight used; IP banned until {until}. "
        "Please use WebSocket Streams for live updates to avoid bans.",
        -(-(until - now) // 1000),
    )
