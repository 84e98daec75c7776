"""Faults of the exchange as data: kinds, rates and durations."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import inf
from random import Random
from typing import Any, Self

import orjson

PER_BAR = (
    "missing_final", "duplicate", "revised", "late", "disorder", "hidden", "lost", "garbage",
)  # fmt: skip
"""Kinds drawn for each closed bar of each series: probabilities."""

PER_REQUEST = ("error", "timeout", "slow", "mangled")
"""Kinds drawn for each REST request: probabilities."""

PER_HOUR = ("drop", "stall", "shutdown", "silence", "limited", "banned")
"""Kinds with a rate per hour: of a connection, of the venue, of a symbol, of REST."""

_PROBABILITIES = {*PER_BAR, *PER_REQUEST, "handshake"}
_RATES = {*_PROBABILITIES, *PER_HOUR}


class FaultsError(ValueError):
    """Invalid faults; the message names the cause."""


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """A fault that happens ``at`` seconds after the start of the exchange.

    ``kind`` is the name of a rate of :class:`Faults`. Faults of bars affect those closing within
    ``seconds`` (at least one of each series); other lasting faults last for ``seconds``.
    ``symbol``, in ccxt's notation, limits it to one symbol; empty means all.
    """

    kind: str
    at: float
    seconds: float = 0.0
    symbol: str = ""


@dataclass(frozen=True, slots=True)
class Faults:
    """Kinds of faults and their rates; the same seed gives the same faults at the same times.

    Each kind is drawn independently of the others: switching one off does not change the
    others, so that the cause of a failing seed can be found by elimination.
    """

    seed: int = 0
    plan: tuple[PlannedFault, ...] = ()

    drop: float = 0.0
    """Connections cut without a close frame, per hour and connection."""
    stall: float = 0.0
    """Connections that become silent but stay open, per hour and connection."""
    handshake: float = 0.0
    """Probability that a WebSocket handshake fails: rejected, unanswered or cut."""
    lifetime_seconds: float = 86_400.0
    """Age at which a connection is closed."""
    shutdown: float = 0.0
    """``serverShutdown`` events per hour: all connections end after ``notice_seconds``."""

    silence: float = 0.0
    """Silences of a symbol on all WebSockets per hour, each lasting ``silence_seconds``."""

    missing_final: float = 0.0
    """The closing push of a bar is never sent."""
    duplicate: float = 0.0
    """The closing push is sent twice."""
    revised: float = 0.0
    """The bar changes later, by push and in REST."""
    late: float = 0.0
    """The closing push is late by about ``late_seconds``."""
    disorder: float = 0.0
    """The closing push comes after one of the next bar, or before one of the open bar."""
    hidden: float = 0.0
    """REST does not have the closed bar for about ``hidden_seconds``."""
    lost: float = 0.0
    """The venue never has the bar, and pushes nothing of it."""
    garbage: float = 0.0
    """An invalid frame comes before the closing push, or replaces it."""

    error: float = 0.0
    """REST answers 5xx."""
    timeout: float = 0.0
    """REST does not answer for ``timeout_seconds``, and then cuts the connection."""
    slow: float = 0.0
    """REST answers after about ``slow_seconds``."""
    mangled: float = 0.0
    """REST answers 200 with an invalid body."""
    limited: float = 0.0
    """Bursts of 429 per hour, each lasting ``limited_seconds``."""
    banned: float = 0.0
    """Bans (418) per hour, each lasting ``banned_seconds``."""

    skew_seconds: float = 0.0
    """Seconds by which the venue's clock is ahead of the injected one."""
    drift_ppm: float = 0.0
    """Drift of the venue's clock, in parts per million."""

    until_seconds: float = inf
    """End of all faults, from the start of the exchange; their consequences remain."""

    stall_seconds: float = 120.0
    notice_seconds: float = 10.0
    silence_seconds: float = 20.0
    late_seconds: float = 3.0
    hidden_seconds: float = 2.0
    timeout_seconds: float = 60.0
    slow_seconds: float = 3.0
    limited_seconds: float = 10.0
    banned_seconds: float = 30.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in _PROBABILITIES and not 0 <= value <= 1:
                raise FaultsError(
                    f"fault {field.name}: {value} is not a probability between 0 and 1"
                )
            if field.name in PER_HOUR and not 0 <= value <= 3_600:
                raise FaultsError(
                    f"fault {field.name}: {value} is not a rate from 0 to 3600 an hour"
                )
            if field.name.endswith("_seconds") and field.name != "skew_seconds" and value <= 0:
                raise FaultsError(f"fault {field.name}: {value} s is not a valid duration")
        for planned in self.plan:
            if planned.kind not in _RATES:
                raise FaultsError(f"planned fault {planned.kind!r}: expected {_field_names()}")

    @property
    def affect_bars(self) -> bool:
        """Return whether faults may affect bars."""
        kinds = {planned.kind for planned in self.plan}
        return any(getattr(self, kind) > 0 or kind in kinds for kind in PER_BAR)

    def without(self, *kinds: str) -> Self:
        """Copy without the faults of ``kinds``."""
        changes: dict[str, Any] = dict.fromkeys(kinds, 0.0)
        return replace(
            self,
            plan=tuple(planned for planned in self.plan if planned.kind not in kinds),
            **changes,
        )

    @classmethod
    def random(cls, seed: int) -> Self:
        """Random faults that depend on the seed alone, some of them severe."""
        random = Random(f"faults:{seed}")
        chosen: dict[str, Any] = {}
        for kind, (low, high) in _RANDOM_RANGES.items():
            present, size = (
                random.random() < 0.4,
                random.random(),
            )  # the same number of draws in any case
            if present:
                chosen[kind] = float(f"{low * (high / low) ** size:.3g}")
        if random.random() < 0.3:
            chosen["lifetime_seconds"] = float(random.randint(60, 600))
        if random.random() < 0.3:
            chosen["skew_seconds"] = round(random.uniform(-5.0, 5.0), 3)
            chosen["drift_ppm"] = float(random.randint(-200, 200))
        return cls(seed=seed, **chosen)

    @classmethod
    def parse(cls, text: str, seed: int = 0) -> Self:
        """Read the name of a preset, ``random``, or a JSON object; raises FaultsError.

        ``seed`` applies if the text contains none.
        """
        text = text.strip()
        if text == "random":
            return cls.random(seed)
        if text in PRESETS:
            return cls(seed=seed, **PRESETS[text])
        if not text.startswith("{"):
            known = ", ".join(PRESETS)
            raise FaultsError(f"faults {text!r}: expected {known}, random or a JSON object")
        try:
            values = orjson.loads(text)
            plan = tuple(PlannedFault(**planned) for planned in values.pop("plan", ()))
            return cls(**{"seed": seed, **values, "plan": plan})
        except (TypeError, orjson.JSONDecodeError) as error:
            raise FaultsError(f"faults: {error}; known are {_field_names()}") from None

    def dumps(self) -> str:
        """One line of JSON for :meth:`parse`, with the non-default fields."""
        defaults = type(self)()
        return orjson.dumps(
            {
                field.name: getattr(self, field.name)
                for field in fields(self)
                if field.name == "seed"
                or getattr(self, field.name) != getattr(defaults, field.name)
            }
        ).decode()


def _field_names() -> str:
    return ", ".join(field.name for field in fields(Faults))


# Lowest and highest rates of Faults.random.
_RANDOM_RANGES = {
    "drop": (6.0, 240.0), "stall": (2.0, 60.0), "handshake": (0.05, 0.5), "shutdown": (2.0, 30.0),
    "silence": (2.0, 60.0), "missing_final": (0.002, 0.2), "duplicate": (0.005, 0.3),
    "revised": (0.002, 0.05), "late": (0.005, 0.1), "disorder": (0.005, 0.1),
    "hidden": (0.005, 0.1), "lost": (0.001, 0.02), "garbage": (0.005, 0.1),
    "error": (0.02, 0.4), "timeout": (0.005, 0.05), "slow": (0.02, 0.3),
    "mangled": (0.01, 0.1), "limited": (2.0, 60.0), "banned": (1.0, 10.0),
}  # fmt: skip

PRESETS: dict[str, dict[str, Any]] = {
    "none": {},
    "connections": {"drop": 30.0, "stall": 10.0, "handshake": 0.2},
    "rollover": {"shutdown": 10.0, "lifetime_seconds": 300.0},
    "quiet": {"silence": 20.0, "missing_final": 0.02, "late": 0.02},
    "dirty": {"duplicate": 0.05, "revised": 0.02, "disorder": 0.05, "garbage": 0.02},
    "gaps": {"missing_final": 0.05, "hidden": 0.05, "lost": 0.01},
    "rest": {
        "error": 0.1, "timeout": 0.01, "slow": 0.1, "mangled": 0.02, "limited": 20.0,
        "banned": 2.0,
    },
    "skewed": {"skew_seconds": 2.5, "drift_ppm": 100.0},
}  # fmt: skip
"""Faults by name, for the command line."""

PRESETS["rough"] = {
    kind: value for name in PRESETS if name != "skewed" for kind, value in PRESETS[name].items()
}
