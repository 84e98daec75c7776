"""Candles and their time: what a series is and where its bars lie."""

from kronos_stream.market.timeframe import Timeframe

__all__ = ["Timeframe"]
