"""What a broker means: MQTT 5's reason codes, and what follows from each."""

from __future__ import annotations

from typing import Literal, NamedTuple

_LOGIN_REMEDY = "see KRONOS_STREAM_MQTT__USERNAME and KRONOS_STREAM_MQTT__PASSWORD"
_REMEDIES = {
    132: "it does not speak MQTT 5",
    133: "it does not take this client id: set KRONOS_STREAM_MQTT__CLIENT_ID",
    134: _LOGIN_REMEDY,
    135: f"{_LOGIN_REMEDY}, and what the broker lets this user do",
    138: "the broker has banned us",
    140: "it asks for another way of logging in than a password",
    142: "another client has the same name: give each daemon its own KRONOS_STREAM_MQTT__CLIENT_ID",
    154: "nobody could have the latest forecasts: allow it in the broker's settings",
    155: "only QoS 1 is of use here: allow it in the broker's settings",
}

_PERMANENT_LOGIN_CODES = frozenset({132, 133, 134, 135, 138, 140})
"""Answers to a login that are the same next time, unless somebody changes something."""

_MESSAGE_CODES = frozenset({129, 130, 144, 149, 153})
"""Ends of a connection that a message may have brought about: its form, topic, size or payload."""

_PERMANENT_PUBLISH_CODES = frozenset({144, 149, 153})
"""Answers to a publish that are the same next time: its topic, size or payload."""

_FIRST_FAILURE_CODE = 128
"""Codes from here on are refusals."""


class BrokerResponse(NamedTuple):
    """What a broker says to a login, a subscription or a publish, or when it hangs up."""

    code: int
    name: str
    """As the protocol has it."""

    @property
    def failed(self) -> bool:
        return self.code >= _FIRST_FAILURE_CODE

    @property
    def permanent(self) -> bool:
        """Of a login: whether it is of no use again, as things are."""
        return self.code in _PERMANENT_LOGIN_CODES

    @property
    def caused_by_message(self) -> bool:
        """Of the end of a connection: whether it may have ended over what was sent last."""
        return self.code in _MESSAGE_CODES

    @property
    def publish_outcome(self) -> Literal["taken", "refused", "later"]:
        """Of a publish: what becomes of the record.

        A right that is missing can be granted, a quota freed: such records wait, as for a broker
        that is away, and readiness says why.
        """
        if not self.failed:
            return "taken"
        return "refused" if self.code in _PERMANENT_PUBLISH_CODES else "later"

    def __str__(self) -> str:
        cure = _REMEDIES.get(self.code)
        return f"{self.name.lower()}; {cure}" if cure else self.name.lower()


NO_RESPONSE = BrokerResponse(0, "connection lost")
"""What is said where nothing is."""
