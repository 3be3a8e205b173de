"""How a command ends when it does not end well: exceptions that reach a user as one line, and their exit codes."""

from pathlib import Path

EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, try again


class UserError(Exception):
    """Bad input. The message is one line: file, key, value, and what is allowed.

    The command line prints it without a traceback and exits with code 2.
    """


class Interrupted(Exception):
    """A signal asked the process to end. `checkpoint` is where it goes on from, if it keeps one.

    The command line prints what to do next and exits with code 75.
    """

    def __init__(self, signal_name: str, checkpoint: Path | None) -> None:
        kept = f"run the same command again to go on from {checkpoint}" if checkpoint else "no checkpoint is kept"
        super().__init__(f"ended by {signal_name}; {kept}")
