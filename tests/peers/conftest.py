"""Peers are compared where they are installed: `make test-peers` has them, `make test` has not."""

import importlib.util

if importlib.util.find_spec("torch") is None:
    collect_ignore_glob = ["test_*.py"]
