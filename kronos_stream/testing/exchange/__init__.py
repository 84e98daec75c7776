"""A simulated exchange that speaks Binance's protocol, with faults on request."""
