"""What can go wrong, by whose turn it is to act.

Every message says what was found, what is required, and what to do.
"""

import contextlib


class FastDTDError(Exception):
    """Base of every error that fastdtd raises on purpose."""


class ModelError(FastDTDError):
    """A network that cannot be used as it stands: its file, its layers, their connections or their weights."""


class ConversionError(FastDTDError):
    """A foreign model file that cannot be converted: unreadable, or with an operator that is not supported."""


class RuleError(FastDTDError):
    """A rule that does not exist, or does not apply to the layer it was asked for."""


class InputError(FastDTDError):
    """An array, a target or an option that the network or the machine cannot take."""


class DeviceError(FastDTDError):
    """A GPU that cannot be used: no driver, a missing package, versions that do not fit, or a chip too old."""


class PictureError(FastDTDError):
    """A picture file that cannot be read as a picture."""


class OutputError(FastDTDError):
    """A file or folder that results cannot be written to."""


class out_of_memory(contextlib.ContextDecorator):
    """Where the machine has no memory left, an error of `kind`; a decorator, too."""

    def __init__(self, kind: type[FastDTDError], advice: str) -> None:
        self._kind, self._advice = kind, advice

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MemoryError):
            raise self._kind(f"the machine has no memory left for it ({str(error) or 'MemoryError'}); {self._advice}"
                             ) from None


_SHOWN = 80  # characters of a value


def printable(text: str) -> str:
    """A text for a terminal: what would move its cursor, colour it or turn its direction is escaped, for names come
    from files."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def shown(value: object) -> str:
    """A value as messages show it: a line, not too long, whatever it is."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # of a number with more digits than Python prints, say
        return f"of type {type(value).__name__}"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."
