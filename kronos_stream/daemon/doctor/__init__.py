"""Checks behind ``kronos-stream doctor``."""
