"""Columns of a candle array, and the constants of its normalisation."""

from __future__ import annotations

CHANNELS = ("open", "high", "low", "close", "volume", "amount")
"""Columns of a candle array, in the order the model was trained on."""

OPEN, HIGH, LOW, CLOSE, VOLUME, AMOUNT = range(6)
"""Indices into :data:`CHANNELS`."""

PRICES = slice(OPEN, VOLUME)
"""Columns of the four prices."""

CLIP = 5.0
"""Normalised values are clipped to ±CLIP (the reference's default)."""

STD_FLOOR = 1e-5
"""Added to the standard deviation, so that a constant column stays finite (as the reference)."""
