"""`python -m fastdtd` is the command line."""

import sys

from fastdtd.cli import main

sys.exit(main())
