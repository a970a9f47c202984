"""The one exception that users of this project see."""


class TPAError(Exception):
    r"""A mistake in what the user gave: one line that names the stage, the thing, the rule and both values.

    The command line prints it on stderr and exits with code 2; anything else that escapes is a bug of ours.

    >>> print(TPAError("load: no such file: a\nb"))
    load: no such file: a b
    """

    def __init__(self, message: str):
        # Names come from files and may hold anything; the message stays one line.
        super().__init__(" ".join(str(message).split()))
