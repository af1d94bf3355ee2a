"""The four ways a command ends early, and the exit code each one stands for.

Anything else that escapes a command is a defect of ours: it keeps its traceback and exits 1.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: the same command again goes on from where it was


class UserError(ValueError):
    """What the user got wrong, in one line that names the file or flag and the mend. Nothing was written."""


class StageError(RuntimeError):
    """The stage could not finish, in one line. Nothing was published."""


class Interrupted(StageError):  # noqa: N818 -- not an error either: the state is saved
    """The stage was told to stop, saved its state, and resumes when run again."""


class AlreadyDone(Exception):  # noqa: N818 -- not an error: the work exists
    """The target already holds the result of the same command on the same inputs."""
