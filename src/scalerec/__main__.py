"""`python -m scalerec` is `scalerec`."""

import sys

from scalerec.cli import main

sys.exit(main())
