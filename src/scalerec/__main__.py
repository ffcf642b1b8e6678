"""`scalerec` and `python -m scalerec`."""

import os
import sys


def settle_openmp() -> None:
    """Let the threads of GNU's OpenMP wait for a millisecond, unless the environment says how; before torch is loaded.

    By default one that waits for work occupies its core for some 15 ms, in which the threads of our own operations want
    it; shorter than a tenth of a millisecond, and every operation of torch has to wake it.
    """
    if not os.environ.keys() & {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY"}:
        os.environ["GOMP_SPINCOUNT"] = "20000"


def main() -> int:
    settle_openmp()
    from scalerec import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
