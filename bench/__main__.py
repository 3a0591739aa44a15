"""``python -m bench ...`` is ``pqk-fast bench ...``, for a clone that is not installed."""

import sys

from pqk_fast.cli import main

sys.exit(main(["bench", *sys.argv[1:]]))
