"""Write on from several prompts at a time, the same opening read once for all of them.

python examples/engine.py runs/demo
"""

import sys

import transnormer
from transnormer import Engine, RequestSettings

engine = Engine(transnormer.load(sys.argv[1]), slots=8)

# The opening is only read: it takes no slot while it is kept.
opening = engine.submit("A public place.\n\n", RequestSettings(max_tokens=0, keep=True))
opening.result()

settings = RequestSettings(max_tokens=60, temperature=0.7, stop="\n\n", seed=1)
names = ["ROMEO", "JULIET", "First Citizen"]
speeches = [engine.fork(opening, f"{name}:\n", settings) for name in names]
while engine.step():  # one more token of each
    print(f"\r{sum(len(speech.tokens) for speech in speeches)} tokens", end="", file=sys.stderr)
print(file=sys.stderr)
for name, speech in zip(names, speeches, strict=True):
    print(f"{name}: {speech.text!r} ({speech.finish_reason})")

# Other requests need no opening, and those of a list are answered in its order.
for result in engine.generate(["To be", "", "O, "], settings):
    print(f"{result.id}: {result.text!r}")
stats = engine.stats()
print(
    f"{stats.tokens_read:,} tokens read, {stats.tokens_written:,} written; slots and states "
    f"take {stats.state_bytes:,} bytes"
)
