"""The daemon: candles in, forecasts out, for months."""
