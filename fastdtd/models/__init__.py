"""The bundled network and its two photographs; build.py makes them, NOTICE says whose they are."""
