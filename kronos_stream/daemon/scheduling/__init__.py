"""Scheduling of forecasts: batches by bar close, results in order."""
