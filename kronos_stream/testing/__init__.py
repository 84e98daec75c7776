"""Tools for tests, also for those of users: exchange, broker, market, virtual time."""
