"""Daemon status: HTTP endpoints, series states, watchdog, systemd."""
