"""The one exception for a user's mistake, and checks that many places share."""

import difflib
from collections.abc import Iterable
from pathlib import Path


class InputError(ValueError):
    """What the user gave is wrong: the message says what, where, and what would be right.

    The doorways (`train.py`, `eval.py`) and the command `gridreg` print it as one line and exit with status 2.
    """


def check_known(what: str, value: object, known: Iterable[str]) -> None:
    """Raise `InputError` unless a value is one of the known names; `what` says which option it is of."""
    known = list(known)
    if value not in known:
        near = difflib.get_close_matches(str(value), known, n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InputError(f"{what}: {value!r} is not known; known are {', '.join(known)}{hint}")


def check_apart(results: Iterable[str | Path], inputs: Iterable[str | Path], instead: str) -> None:
    """Raise `InputError` if one of the results would be written over an input; `instead` says what to give."""
    inputs = [Path(path) for path in inputs if Path(path).exists()]
    for result in filter(Path.exists, map(Path, results)):
        for path in inputs:
            if result.samefile(path):
                raise InputError(f"{path}: a result would take its place: give {instead}")
