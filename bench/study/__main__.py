"""`python bench/study`, of any folder: see program.py."""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from study.program import main

    sys.exit(main())
