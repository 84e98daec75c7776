"""Candles and their time: what a series is, where its bars lie, what its tape holds."""

from kronos_stream.market.candle import Bar, Candle, Update
from kronos_stream.market.clock import Clock, SystemClock
from kronos_stream.market.series import Series
from kronos_stream.market.timeframe import Timeframe

__all__ = ["Bar", "Candle", "Clock", "Series", "SystemClock", "Timeframe", "Update"]
