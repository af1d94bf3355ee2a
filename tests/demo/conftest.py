"""Puts demo/ on the path: its scripts import each other by bare names."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "demo"))
