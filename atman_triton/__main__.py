"""``python -m atman_triton`` is ``atman``."""

import sys

from .cli import main

sys.exit(main())
