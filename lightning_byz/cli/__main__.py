"""``python -m lightning_byz.cli`` is ``lightning-byz``."""

import sys

from lightning_byz.cli import main

sys.exit(main())
