"""Assigned partitions of the candle topics (role ``forecast``)."""
