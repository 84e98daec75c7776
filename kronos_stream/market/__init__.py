"""Values: series, timeframes, candles, clocks and the watchlist."""
