"""The one exception that users of this project see."""


class TPAError(Exception):
    """A mistake in what the user gave: one line that names the stage, the thing, the rule and both values.

    The command line prints it on stderr and exits with code 2; anything else that escapes is a bug of ours.
    """
