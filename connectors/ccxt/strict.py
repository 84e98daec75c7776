"""Subclass of a ccxt exchange that raises errors for responses that ccxt silently ignores."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

from kronos_connectors.ccxt.errors import HttpStatusError
from kronos_connectors.ccxt.ohlcv import RowError, read_row
from kronos_stream.interfaces.source import MAX_REJECTED_BYTES


class Hooks(NamedTuple):
    """Callbacks for the sockets of an instance."""

    on_activity: Callable[[], None]
    """Any frame arrived, including pongs."""
    on_invalid_frame: Callable[[str, bytes], None]
    """A frame arrived that ccxt cannot read: reason, raw bytes."""


@cache
def strict_class(kind: Any) -> type[Any]:  # noqa: ANN401 - a class of ccxt's
    """Subclass of ``kind``: invalid responses raise, and invalid frames do not end their socket."""

    class Strict(kind):  # type: ignore[misc]
        hooks: Hooks | None = None

        def on_rest_response(
            self, code: int, reason: str, url: str, method: str, headers: Mapping[str, str],
            body: str, *rest: object,
        ) -> str:  # fmt: skip
            # ccxt would hide the status and drop Retry-After.
            if code in {418, 429, 451}:
                waits = [value for name, value in headers.items() if name.lower() == "retry-after"]
                raise HttpStatusError(code, body, waits[0] if waits else None)
            text: str = super().on_rest_response(code, reason, url, method, headers, body, *rest)
            return text

        def handle_http_status_code(
            self, code: int, reason: str, url: str, method: str, body: str
        ) -> None:
            if code == 403:
                raise HttpStatusError(code, body)
            super().handle_http_status_code(code, reason, url, method, body)

        async def fetch(self, *request: object, **more: object) -> object:
            answer = await super().fetch(*request, **more)
            # An error page of a proxy, or a truncated response: ccxt would find no candles in it.
            if isinstance(answer, str) and answer.lstrip()[:1] in {"<", "{", "["}:
                raise RowError(f"not JSON: {answer:.40}")
            return answer

        def parse_ohlcv(self, ohlcv: object, *more: object) -> list[Any]:
            row: list[Any] = super().parse_ohlcv(ohlcv, *more)
            read_row(row)  # ccxt would skip rows that it cannot read
            return row

        def client(self, url: str) -> Any:  # noqa: ANN401
            is_new = url not in (self.clients or {})
            client = super().client(url)
            if is_new and self.hooks is not None:
                client.handle_message = _catch_errors(client.handle_message, self.hooks)
            return client

    return Strict


def _catch_errors(handle: Callable[[Any], None], hooks: Hooks) -> Callable[[Any], None]:
    """Wrap ``handle``: an exception in it would stop the reading of its socket."""

    def handle_safely(message: Any) -> None:  # noqa: ANN401 - aiohttp's
        hooks.on_activity()
        try:
            handle(message)
        except Exception as error:  # noqa: BLE001 - ccxt's parsers raise anything
            data = message.data if isinstance(message.data, (bytes, str)) else ""
            raw = data.encode() if isinstance(data, str) else data
            hooks.on_invalid_frame(
                f"ccxt cannot read it: {type(error).__name__} {error!s:.80}",
                raw[:MAX_REJECTED_BYTES],
            )

    return handle_safely
