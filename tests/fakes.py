"""What stands for CuPy's in tests of devices."""


class CUDARuntimeError(RuntimeError):
    """As CuPy's."""


def raises(error):
    def call(*_):
        raise error

    return call
