"""Intake of live candles: pipeline, backfill, recovery, watched symbols."""
