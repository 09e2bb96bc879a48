import sys

from florence2_cli import main

sys.exit(main())
