"""Delivery of messages: publisher, outbox, one queue per sink, dead letters."""
