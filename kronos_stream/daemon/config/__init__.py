"""Daemon settings, read from environment variables."""
