"""The network and the two photographs that come along; build.py makes them, NOTICE says whose they are."""
