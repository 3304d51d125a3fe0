"""`python -m btok ...`, see `btok/cli.py`."""

import sys

from btok.cli import main

sys.exit(main())
