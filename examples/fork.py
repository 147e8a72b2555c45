"""Read a prompt once, save its state, and continue it in two ways.

python examples/fork.py runs/demo
"""

import sys
import tempfile
from pathlib import Path

import transnormer
from transnormer.inference.engine import Session, generate_text
from transnormer.inference.sampling import Sampling

model = transnormer.load(sys.argv[1])
reader = Session(model)
reader.read(model.tokenizer.encode("First Citizen:\nBefore we proceed any further, hear me").ids)

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "prompt.safetensors"
    reader.state.save(file)
    print(
        f"the prompt's state takes {file.stat().st_size:,} bytes, and would after a million tokens"
    )
    for seed in (1, 2):
        session = Session(model, transnormer.State.load(file, model))
        sampling = Sampling(seed=seed)
        print(f"--- {seed}")
        print(
            "".join(
                generate_text(model, " speak.\n", max_tokens=60, sampling=sampling, session=session)
            )
        )
