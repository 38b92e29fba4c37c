"""What `train_cifar.py`, its only user, is built on. Not part of the installed package."""


class TrainingError(ValueError):
    """Something the user can put right; the command line shows it without a traceback."""
