"""What goes wrong, as data: rates of everything that venues do to their clients."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from math import inf
from random import Random
from typing import Any, Self

import orjson

PER_BAR = (
    "missing_final", "duplicate", "revised", "late", "disorder", "hidden", "lost", "garbage",
)  # fmt: skip
"""Drawn for each closed bar of each series: chances between 0 and 1."""

PER_REQUEST = ("error", "timeout", "slow", "mangled")
"""Drawn for each REST request: chances between 0 and 1."""

PER_HOUR = ("drop", "stall", "shutdown", "silence", "limited", "banned")
"""How often an hour: of a connection, of the venue, of a symbol, of the venue's REST."""

_PROBABILITIES = {*PER_BAR, *PER_REQUEST, "handshake"}
_RATES = {*_PROBABILITIES, *PER_HOUR}


class FaultsError(ValueError):
    """Faults that cannot be; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class PlannedFault:
    """A fault that happens for certain, ``at`` seconds after the exchange's start.

    ``kind`` is the name of a rate of :class:`Faults`. Faults of bars befall those closing within
    ``seconds`` (but at least one of each series); others last for ``seconds``, where they last.
    ``symbol``, in ccxt's notation, confines it to one symbol; empty means all.
    """

    kind: str
    at: float
    seconds: float = 0.0
    symbol: str = ""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong and how often; the same seed at the same times does the same.

    Each kind is drawn independently of the others: switching one off leaves the others as they
    were, so what makes a seed fail can be found by elimination.
    """

    seed: int = 0
    plan: tuple[PlannedFault, ...] = ()

    drop: float = 0.0
    """Connections cut without a word, per hour of each."""
    stall: float = 0.0
    """Connections that fall silent but stay open, per hour of each."""
    handshake: float = 0.0
    """Chance that a websocket's handshake fails: cut, refused, left hanging, or cut just after."""
    lifetime_seconds: float = 86_400.0
    """When a connection is closed for its age."""
    shutdown: float = 0.0
    """``serverShutdown`` events per hour: all connections end after ``notice_seconds``."""

    silence: float = 0.0
    """How often per hour a symbol falls silent on all websockets, for ``silence_seconds``."""

    missing_final: float = 0.0
    """The closing push of a bar is never sent."""
    duplicate: float = 0.0
    """It is sent twice."""
    revised: float = 0.0
    """Later the bar has other values, by push and by REST."""
    late: float = 0.0
    """It comes late by about ``late_seconds``."""
    disorder: float = 0.0
    """It comes after a push of the next bar, or a push of the open bar comes after it."""
    hidden: float = 0.0
    """REST does not have the closed bar for about ``hidden_seconds``."""
    lost: float = 0.0
    """The venue never has the bar, nor pushes anything of it."""
    garbage: float = 0.0
    """A frame that cannot be comes before the closing push, or in its place."""

    error: float = 0.0
    """REST answers 5xx."""
    timeout: float = 0.0
    """It does not answer, for ``timeout_seconds``, and then cuts the connection."""
    slow: float = 0.0
    """It answers after about ``slow_seconds``."""
    mangled: float = 0.0
    """It answers 200 with what is not an answer."""
    limited: float = 0.0
    """Bursts of 429 per hour, each lasting ``limited_seconds``."""
    banned: float = 0.0
    """Bans (418) per hour, each lasting ``banned_seconds``."""

    skew_seconds: float = 0.0
    """How far the venue's clock is ahead of the injected one."""
    drift_ppm: float = 0.0
    """How much faster it goes, in millionths."""

    until_seconds: float = inf
    """When all of this ends, from the exchange's start; what has happened by then stays so."""

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
                raise FaultsError(f"fault {field.name}: {value} is not a chance between 0 and 1")
            if field.name in PER_HOUR and not 0 <= value <= 3_600:
                raise FaultsError(
                    f"fault {field.name}: {value} is not a rate from 0 to 3600 an hour"
                )
            if field.name.endswith("_seconds") and field.name != "skew_seconds" and value <= 0:
                raise FaultsError(f"fault {field.name}: {value} s is no time")
        for planned in self.plan:
            if planned.kind not in _RATES:
                raise FaultsError(f"planned fault {planned.kind!r}: expected {_field_names()}")

    @property
    def affect_bars(self) -> bool:
        """Whether any bar may be meddled with."""
        kinds = {planned.kind for planned in self.plan}
        return any(getattr(self, kind) > 0 or kind in kinds for kind in PER_BAR)

    def without(self, *kinds: str) -> Self:
        """The same but for ``kinds``."""
        changes: dict[str, Any] = dict.fromkeys(kinds, 0.0)
        return replace(
            self,
            plan=tuple(planned for planned in self.plan if planned.kind not in kinds),
            **changes,
        )

    @classmethod
    def random(cls, seed: int) -> Self:
        """A mixture of faults that the seed alone decides, some of them harsh."""
        random = Random(f"faults:{seed}")
        chosen: dict[str, Any] = {}
        for kind, (low, high) in _RANDOM_RANGES.items():
            present, size = random.random() < 0.4, random.random()  # as many draws in any case
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

        ``seed`` is taken where the text names none.
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
            given = orjson.loads(text)
            plan = tuple(PlannedFault(**planned) for planned in given.pop("plan", ()))
            return cls(**{"seed": seed, **given, "plan": plan})
        except (TypeError, orjson.JSONDecodeError) as error:
            raise FaultsError(f"faults: {error}; known are {_field_names()}") from None

    def dumps(self) -> str:
        """What :meth:`parse` reads: one line of JSON, only what differs from none."""
        usual = type(self)()
        return orjson.dumps(
            {
                field.name: getattr(self, field.name)
                for field in fields(self)
                if field.name == "seed" or getattr(self, field.name) != getattr(usual, field.name)
            }
        ).decode()


def _field_names() -> str:
    return ", ".join(field.name for field in fields(Faults))


# Rates, lowest and highest, from which Faults.random draws.
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
