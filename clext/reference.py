"""`clext.ops.reference` by a shorter name."""

import sys

from clext.ops import reference

sys.modules[__name__] = reference
