"""Requests to subscribe and unsubscribe."""

from __future__ import annotations

import sys
from typing import Any

from kronos_connectors.mqtt.subscriptions import (
    TOPICS_PER_REQUEST,
    Subscribe,
    Subscriptions,
    Unsubscribe,
)


def _settle(subscriptions: Subscriptions) -> list[Any]:
    """Confirm all requests, and return them."""
    requests: list[Any] = []
    while request := subscriptions.next_request():
        requests.append(request)
        if isinstance(request, Subscribe):
            subscriptions.on_subscribed(request.topics)
        else:
            subscriptions.on_unsubscribed(request.topics)
    return requests


def test_only_changes_are_requested() -> None:
    subscriptions = Subscriptions()
    subscriptions.set_wanted({"b", "a"})
    assert _settle(subscriptions) == [Subscribe(["a", "b"])]
    subscriptions.set_wanted({"b", "c"})
    assert _settle(subscriptions) == [Unsubscribe(["a"]), Subscribe(["c"])]
    assert _settle(subscriptions) == []


def test_new_connection_requests_all_topics_in_batches() -> None:
    subscriptions = Subscriptions()
    topics = [f"t{i:04}" for i in range(2 * TOPICS_PER_REQUEST + 1)]
    subscriptions.set_wanted(topics)
    _settle(subscriptions)
    subscriptions.on_connected()
    requests = _settle(subscriptions)
    assert [len(request.topics) for request in requests] == [
        TOPICS_PER_REQUEST,
        TOPICS_PER_REQUEST,
        1,
    ]
    assert [topic for request in requests for topic in request.topics] == topics


def test_old_subscriptions_of_a_session_are_ended() -> None:
    subscriptions = Subscriptions()
    subscriptions.set_wanted({"a"})
    _settle(subscriptions)
    assert subscriptions.on_message("a")
    assert not subscriptions.on_message("old")
    assert _settle(subscriptions) == [Unsubscribe(["old"])]
    subscriptions.on_message("b")
    subscriptions.set_wanted({"a", "b"})  # wanted before the request to unsubscribe
    assert _settle(subscriptions) == [Subscribe(["b"])]


def test_memory_is_bounded_for_unwanted_topics() -> None:
    subscriptions = Subscriptions()
    for i in range(100_000):
        subscriptions.on_message(f"unwanted/{i}")
    assert sys.getsizeof(subscriptions._unwanted) < 2**20
    assert sum(len(request.topics) for request in _settle(subscriptions)) == 10_000


def test_refused_topics_are_requested_again_only_after_retry() -> None:
    subscriptions = Subscriptions()
    subscriptions.set_wanted({"a", "b"})
    assert subscriptions.next_request() == Subscribe(["a", "b"])
    subscriptions.on_subscribed({"a"})
    subscriptions.refused["b"] = "not authorized"
    assert subscriptions.next_request() is None
    subscriptions.retry_refused()
    assert subscriptions.next_request() == Subscribe(["b"])
