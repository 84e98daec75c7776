"""Binance: spot and USD-M futures klines over websockets and REST."""
