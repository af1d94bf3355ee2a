"""A reward by whose second call rank 1 sends itself a signal."""

REWARD = """
import os, time
from pathlib import Path

order, calls = Path({order!r}), 0

def reds(prompts, completions, **columns):
    global calls
    calls += 1
    if os.environ["RANK"] == "1" and calls == 2 and order.exists():
        number = int(order.read_text())
        order.write_text(str(time.time()))
        os.kill(os.getpid(), number)
        time.sleep(300)  # one that is stopped is woken to say where it stands
    return [text.split().count("red") / max(1, len(text.split())) for text in completions]
"""
"""`order`: a file with the signal's number, in which the time of its sending is then."""
