"""Forecast evaluation: scoring rules, baselines and walk-forward runs."""
