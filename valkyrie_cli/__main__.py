"""`python -m valkyrie_cli` is the same program as `valkyrie`."""

import sys

from valkyrie_cli.main import main

sys.exit(main())
