"The programs without their names on the search path: python -m jat_nb train ..."
import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
