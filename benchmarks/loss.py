"""The command `rkd bench`, with two threads and the recorded results as its defaults.

python benchmarks/loss.py [--device cuda] [--out FOLDER] [--budget 500]
"""

import sys
from pathlib import Path

from rkd.cli import app

if __name__ == "__main__":
    app(["bench", "--out", str(Path(__file__).parent / "results"), "--threads", "2", *sys.argv[1:]])
