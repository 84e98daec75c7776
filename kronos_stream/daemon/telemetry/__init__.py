"""Metrics, logs and event-loop lag."""
