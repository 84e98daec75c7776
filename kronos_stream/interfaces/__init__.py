"""Interfaces that connectors implement, and the registry that finds them."""
