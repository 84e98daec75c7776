"""Exception of the training package."""


class TrainingError(Exception):
    """Training cannot start or continue; the one-line message gives cause and remedy."""
