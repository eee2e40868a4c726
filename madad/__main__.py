"""``python -m madad``."""

import sys

from madad.cli import main

sys.exit(main())
