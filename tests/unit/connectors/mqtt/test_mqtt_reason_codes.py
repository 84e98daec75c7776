"""Consequences of reason codes."""

from __future__ import annotations

import pytest

from kronos_connectors.mqtt.reason_codes import NO_RESPONSE, BrokerResponse


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (0, "accepted"),
        (16, "accepted"),  # no subscribers
        (128, "retry"),
        (131, "retry"),
        (135, "retry"),
        (144, "rejected"),
        (149, "rejected"),
        (151, "retry"),
        (153, "rejected"),
    ],
)
def test_outcome_of_a_publish(code: int, outcome: str) -> None:
    assert BrokerResponse(code, "Whatever").publish_outcome == outcome


def test_refused_logins_are_permanent_and_have_a_remedy() -> None:
    for code in (134, 135):
        response = BrokerResponse(code, "Not authorized")
        assert response.permanent
        assert "KRONOS_STREAM_MQTT__PASSWORD" in str(response)
    for code in (136, 137, 151, 159):  # unavailable, busy, quota, rate
        assert not BrokerResponse(code, "Busy").permanent
    assert "KRONOS_STREAM_MQTT__CLIENT_ID" in str(BrokerResponse(142, "Session taken over"))
    assert not NO_RESPONSE.permanent
    assert not NO_RESPONSE.caused_by_message
    assert str(NO_RESPONSE) == "connection lost"
