"""Latest forecast of every series from MQTT: python mqtt_subscriber.py localhost 1883.

Requires only aiomqtt, neither kronos-stream nor Kafka. The daemon publishes to
``kronos/forecasts/{venue}/{symbol}/{timeframe}``. The broker retains the latest forecast of each
series, so a subscriber first receives the retained forecasts and then the new ones.
"""

import asyncio
import json
import sys
from contextlib import suppress
from datetime import UTC, datetime

import aiomqtt

FORECASTS = "kronos/forecasts/#"
RECONNECT_SECONDS = 2.0


class Latest:
    """Latest forecasts by topic."""

    def __init__(self) -> None:
        self._newest: dict[str, tuple[str, int]] = {}
        """Origin and revision of the latest forecast."""

    def take(self, topic: str, payload: bytes) -> str | None:
        """Return one line about a message; None if it changes nothing."""
        if not payload:  # the retained message is deleted: the series is removed
            return f"{topic}: no forecast" if self._newest.pop(topic, None) else None
        message = json.loads(payload)
        if message["schema"] != "kronos.forecast/1":  # kronos.removal/1: an empty message follows
            return None
        newest = message["origin"], message["revision"]  # times in UTC sort as text
        if newest <= self._newest.get(topic, ("", -1)):  # a duplicate: delivery is at least once
            return None
        self._newest[topic] = newest
        doubts = "; ".join(message.get("reasons", ())) if message["degraded"] else ""
        if datetime.fromisoformat(message["valid_until"]) <= datetime.now(UTC):
            doubts = "expired"
        close = message["close"]
        return (
            f"{message['series']} {message['origin']}: up {message['summary']['p_up']:.0%}, "
            f"last close of {len(message['times'])} is {close['mean'][-1]:.6g} on average"
            f"{f' ({doubts})' if doubts else ''}"
        )


async def main(host: str = "localhost", port: str = "1883") -> None:
    """Print changes until Ctrl-C; reconnect after an outage."""
    latest = Latest()
    while True:
        try:
            async with aiomqtt.Client(host, int(port)) as client:
                await client.subscribe(FORECASTS, qos=1)
                async for message in client.messages:
                    payload = message.payload if isinstance(message.payload, bytes) else b""
                    if line := latest.take(str(message.topic), payload):
                        print(line, flush=True)
        except aiomqtt.MqttError as error:
            print(f"connection lost, retrying: {error}", file=sys.stderr, flush=True)
            await asyncio.sleep(RECONNECT_SECONDS)


with suppress(KeyboardInterrupt):
    asyncio.run(main(*sys.argv[1:]))
