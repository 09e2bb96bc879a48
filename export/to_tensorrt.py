"""`python export/to_tensorrt.py EXPORT`: the same as `florence2 tensorrt`."""

import sys

from florence2_cli import main

if __name__ == "__main__":
    sys.exit(main(["tensorrt", *sys.argv[1:]]))
