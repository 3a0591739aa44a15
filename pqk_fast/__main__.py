"""``python -m pqk_fast``: the command line."""

import sys

from pqk_fast.cli import main

sys.exit(main())
