import sys

from florence2.cli import main

sys.exit(main())
