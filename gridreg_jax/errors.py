"""The one exception for a user's mistake."""


class InputError(ValueError):
    """What the user gave is wrong: the message says what, where, and what would be right.

    The doorways (`train.py`, `eval.py`) and the command `gridreg` print it as one line and exit with status 2.
    """
