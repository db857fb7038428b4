"""python -m lorasp {info,demo,bench,tune,check}"""

import sys

from lorasp.cli import main

if __name__ == "__main__":
    sys.exit(main())
