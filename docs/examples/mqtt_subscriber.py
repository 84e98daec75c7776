"""The latest forecast of every series, from MQTT: python mqtt_subscriber.py localhost 1883.

Needs aiomqtt alone, and neither kronos-stream nor Kafka. The daemon publishes to
``kronos/forecasts/{venue}/{symbol}/{timeframe}``, where the broker retains the latest, so this
begins with what is known and goes on with what is new.
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
    """What is forecast now, by topic."""

    def __init__(self) -> None:
        self._newest: dict[str, tuple[str, int]] = {}
        """Origin and revision."""

    def take(self, topic: str, payload: bytes) -> str | None:
        """What a message changes, in a line; None where it is no news."""
        if not payload:  # retained no more: the series is given up
            return f"{topic}: no forecast" if self._newest.pop(topic, None) else None
        message = json.loads(payload)
        if message["schema"] != "kronos.forecast/1":  # kronos.removal/1: the empty one follows it
            return None
        newest = message["origin"], message["revision"]  # times in UTC sort as text
        if newest <= self._newest.get(topic, ("", -1)):  # at least once: it came before
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
    """Print what changes, until Ctrl-C; after an outage it goes on."""
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
            print(f"no forecasts for now: {error}", file=sys.stderr, flush=True)
            await asyncio.sleep(RECONNECT_SECONDS)


with suppress(KeyboardInterrupt):
    asyncio.run(main(*sys.argv[1:]))
