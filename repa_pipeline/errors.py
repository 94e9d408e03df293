"""What can go wrong for a user, each error also a builtin.

A `RepaError` is shown as one line (what, got, expected, what to do) and ends the command with
exit code 2. Anything else is a bug of ours and keeps its traceback.
"""


class RepaError(Exception):
    """Base of every error a user can act on; `str()` is one line."""

    def __str__(self) -> str:
        return " ".join(str(arg) for arg in self.args).replace("\n", " ")


class ConfigError(RepaError, ValueError):
    """A setting, or a combination of settings, that cannot work."""


class UnknownNameError(RepaError, LookupError):
    """A name that is in no table."""


class MissingError(RepaError, FileNotFoundError):
    """Something that an earlier step should have made, or the user should have given."""


class DataError(RepaError, ValueError):
    """Input that cannot be used: unreadable, damaged, duplicated."""


class DamagedError(DataError):
    """Stored data whose checksum, length or presence is wrong."""


class MismatchError(RepaError, ValueError):
    """Two things that must belong together and do not: rows, settings, grids, hashes."""


class StageError(RepaError, RuntimeError):
    """Work that could not be finished; what was finished is kept."""


class StoreError(StageError):
    """An object store that still fails after all retries."""
