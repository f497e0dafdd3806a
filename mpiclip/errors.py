"""The one exception for what a person can put right: bad input ends in one line, not in a traceback."""

from collections.abc import Iterable


class InputError(Exception):
    """A file, key or argument is wrong. The message is one line: where, what was found, what was expected.

    `agreed`: all ranks raise it together (see Comm.agree), so that they may end in good order."""

    def __init__(self, message: str, agreed: bool = False):
        super().__init__(message)
        self.agreed = agreed


def unknown(where: str, found: str, known: Iterable[str]) -> InputError:
    """The error for a name that does not exist, with the nearest one that does."""
    from difflib import get_close_matches
    known = sorted(known)
    near = get_close_matches(found, known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known) or 'none'}"
    return InputError(f"{where}: there is no '{found}'; {hint}")
