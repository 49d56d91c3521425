"""What a user is told when something is wrong, and the exit code that goes with it.

Every message is one line: what is wrong, where (file and key), what to do about it. `cli.py` prints
a `UserError` without a traceback; any other exception is a defect of disttrain and keeps its own.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_DEFECT = 1
EXIT_USER_ERROR = 2
EXIT_TRAINING_FAILED = 3
EXIT_INTERRUPTED = (
    75  # BSD sysexits EX_TEMPFAIL: stopped with a checkpoint, the same command goes on
)


class UserError(ValueError):
    """Something the person in front can mend: exit code 2, one line, no traceback."""

    exit_code = EXIT_USER_ERROR


class ConfigError(UserError):
    """A key that is unknown, of the wrong type, impossible, or in conflict with another key."""


class DataError(UserError):
    """A picture, caption, template, shard or index that is missing, damaged or unusable."""


class ModelError(UserError):
    """A base model or a result file that cannot be loaded or does not fit."""


class CheckpointError(UserError):
    """A checkpoint that is damaged or does not belong to this run."""


class TrainingFailed(UserError):
    """The run itself went wrong (a loss that is not finite): the weights were not changed by it."""

    exit_code = EXIT_TRAINING_FAILED


class Interrupted(UserError):
    """A signal stopped the run after it saved a checkpoint; the same command goes on from there."""

    exit_code = EXIT_INTERRUPTED
