"""`python -m masm_detect` is the command `masm`."""

import sys

from .commands.main import main

sys.exit(main())
