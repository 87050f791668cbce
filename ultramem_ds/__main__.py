"""``python -m ultramem_ds VERB``."""

import sys

from ultramem_ds.cli.main import main

sys.exit(main())
