"""``python -m hrm_text`` is ``hrm-text``."""

import sys

from hrm_text.cli import main

sys.exit(main())
