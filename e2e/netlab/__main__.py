from __future__ import annotations

import sys

from e2e.netlab.cli import main

sys.exit(main())
