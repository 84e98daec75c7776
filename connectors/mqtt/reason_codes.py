"""Reason codes of MQTT 5: their remedies, and their consequences."""

from __future__ import annotations

from typing import Literal, NamedTuple

_LOGIN_REMEDY = "see KRONOS_STREAM_MQTT__USERNAME and KRONOS_STREAM_MQTT__PASSWORD"
_REMEDIES = {
    132: "the broker does not support MQTT 5",
    133: "the broker does not accept this client id: set KRONOS_STREAM_MQTT__CLIENT_ID",
    134: _LOGIN_REMEDY,
    135: f"{_LOGIN_REMEDY}, and the broker's access rules for this user",
    138: "the broker has banned this client",
    140: "the broker does not accept logins by password",
    142: "another client has the same id: give each daemon its own KRONOS_STREAM_MQTT__CLIENT_ID",
    154: "enable retained messages at the broker, for the latest forecasts",
    155: "enable QoS 1 at the broker",
}

_PERMANENT_LOGIN_CODES = frozenset({132, 133, 134, 135, 138, 140})
"""Responses to a login that stay the same until the configuration changes."""

_MESSAGE_CODES = frozenset({129, 130, 144, 149, 153})
"""Disconnects that a message may have caused by its form, topic, size or payload."""

_PERMANENT_PUBLISH_CODES = frozenset({144, 149, 153})
"""Responses to a publish that do not change: wrong topic, size or payload."""

_FIRST_FAILURE_CODE = 128


class BrokerResponse(NamedTuple):
    """Response to a login, a subscription or a publish, or the reason of a disconnect."""

    code: int
    name: str
    """Its name in the protocol."""

    @property
    def failed(self) -> bool:
        return self.code >= _FIRST_FAILURE_CODE

    @property
    def permanent(self) -> bool:
        """True if the same login will be refused again."""
        return self.code in _PERMANENT_LOGIN_CODES

    @property
    def caused_by_message(self) -> bool:
        """True if a message may be the reason of the disconnect."""
        return self.code in _MESSAGE_CODES

    @property
    def publish_outcome(self) -> Literal["accepted", "rejected", "retry"]:
        """Outcome of a publish.

        Records wait while a right or a quota is missing, since both can be granted later.
        """
        if not self.failed:
            return "accepted"
        return "rejected" if self.code in _PERMANENT_PUBLISH_CODES else "retry"

    def __str__(self) -> str:
        remedy = _REMEDIES.get(self.code)
        return f"{self.name.lower()}; {remedy}" if remedy else self.name.lower()


NO_RESPONSE = BrokerResponse(0, "connection lost")
"""Stands for a missing response."""
