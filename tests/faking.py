"""Errors, as CuPy and others raise them."""


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


def raises(error):
    def call(*_):
        raise error

    return call
