"""Read a prompt once, save its state, and continue it in two ways.

python examples/fork.py runs/demo
"""

import sys
import tempfile
from pathlib import Path

import transnormer
from transnormer import Engine, RequestSettings

model = transnormer.load(sys.argv[1])
engine = Engine(model, slots=2)
only_read = RequestSettings(max_tokens=0, keep=True)
prompt = engine.submit("First Citizen:\nBefore we proceed any further, hear me", only_read)
prompt.result()

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "prompt.safetensors"
    engine.save_state(prompt, file)
    print(f"the prompt and its state take {file.stat().st_size:,} bytes")
    for seed in (1, 2):
        settings = RequestSettings(max_tokens=60, seed=seed)
        print(f"--- {seed}")
        for piece in Engine(model).load_state(file, " speak.\n", settings):
            print(piece, end="", flush=True)
        print()
