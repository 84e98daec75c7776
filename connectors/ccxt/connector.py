"""Registration of the ccxt connector."""

from __future__ import annotations

from collections.abc import Collection
from random import Random

from kronos_connectors.ccxt.options import CcxtOptions
from kronos_stream.interfaces.source import Source, SourceConnector
from kronos_stream.market.clock import Clock


def build(venue: str, options: CcxtOptions, clock: Clock, random: Random) -> Source:
    """Create the source of an exchange: ``venue`` is its name in ccxt, or that after ``ccxt.``.

    It connects when it runs. Raises SourceError if ccxt lacks the exchange or a feature.
    """
    # Imported here: --help reads the options, and ccxt takes seconds to import.
    from kronos_connectors.ccxt.exchange import ExchangeFactory
    from kronos_connectors.ccxt.source import CcxtSource

    return CcxtSource(venue, ExchangeFactory.for_venue(venue, options), options, clock, random)


def venues() -> Collection[str]:
    """Names of the exchanges that ccxt supports."""
    from kronos_connectors.ccxt.exchange import exchange_names

    return exchange_names()


CONNECTOR = SourceConnector(CcxtOptions, build, venues)
