"""The one exception that reaches a user: a line that names what is wrong and the cure."""


class UserError(Exception):
    """Bad input. The message is one line: file, key, value, and what is allowed.

    The command line prints it without a traceback and exits with code 2.
    """
