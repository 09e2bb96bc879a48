"""`python export/to_onnx.py CKPT [--output DIR]`: the same as `florence2 export`."""

import sys

from florence2_cli import main

if __name__ == "__main__":
    sys.exit(main(["export", *sys.argv[1:]]))
