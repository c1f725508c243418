"""`python -m ibtpo_kernels.roofline`."""

import sys

from ibtpo_kernels.roofline.cli import main

if __name__ == "__main__":
    sys.exit(main())
