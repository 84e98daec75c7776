"""Connectors to exchanges, brokers and files, imported as ``kronos_connectors``.

The core loads them by their entry points and never imports them.
"""
