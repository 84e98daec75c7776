"""The one exception of this package."""


class TrainingError(Exception):
    """Training cannot start or go on; the message is one line that says why and what to do."""
