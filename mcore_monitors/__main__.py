"""``python -m mcore_monitors``: the ``mcore-monitors`` command without its script."""

import sys

from mcore_monitors.cli.main import main

sys.exit(main())
