"""Load one of our folders in transformers and let it go on from several prompts at once.

python examples/hf_generate.py runs/demo
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import transnormer.hub
from transnormer.formats.folders import find_model

folder = find_model(Path(sys.argv[1]))  # of a run, its newest checkpoint
model = AutoModelForCausalLM.from_pretrained(folder)
assert isinstance(model, transnormer.hub.hf.TransNormerForCausalLM)
tokenizer = AutoTokenizer.from_pretrained(folder)

inputs = tokenizer(
    ["ROMEO:", "First Citizen:\nBefore we proceed"], padding=True, return_tensors="pt"
)
torch.manual_seed(1)
written = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.8, top_p=0.95)
for text in tokenizer.batch_decode(written, skip_special_tokens=True):
    print(text, end="\n---\n")
