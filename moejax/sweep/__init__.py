# SPDX-License-Identifier: Apache-2.0
"""Many runs that differ in little, and what came of them side by side.

`moejax sweep --sweep=experiments/NAME/sweep.py --workdir=sweeps/NAME`
"""

from moejax.sweep.spec import Sweep, grid

__all__ = ["Sweep", "grid"]
