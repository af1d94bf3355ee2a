"""Exit codes, and their exceptions.

Any other exception is a defect of Baton: a traceback and exit code 1.
"""

from __future__ import annotations

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_USAGE = 2
EXIT_INTERRUPTED = 75  # sysexits' EX_TEMPFAIL: run the same command again to resume


class UserError(ValueError):
    """A mistake in the command or its inputs: one line with the file or flag and the fix. Nothing was written. Exit 2."""


class StageError(RuntimeError):
    """The command failed: one line with the reason. Nothing was published. Exit 1."""


class Interrupted(StageError):  # noqa: N818 -- not an error: the state is saved
    """Stopped by a signal or a time limit; the same command resumes. Exit 75."""


class AlreadyDone(Exception):  # noqa: N818 -- not an error: the work exists
    """The target holds the result of the same run. Exit 0."""
