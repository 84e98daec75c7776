"""Daemon roles: standalone, ingest, forecast."""
