"""Everything that touches the outside: exchanges, brokers, files.

Imported as ``kronos_connectors``. The core finds each by its entry point and knows none by name.
"""
