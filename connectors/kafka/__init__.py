"""Kafka: forecasts out."""
