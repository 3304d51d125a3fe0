"""`python -m btok ...`, see `btok/tools/cli.py`."""

import sys

from btok.tools.cli import main

sys.exit(main())
