"""Fine-tune with TRL and peft's LoRA, and compare the merged model's logits with the unmerged ones.

python examples/lora_trl.py runs/demo
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import transnormer.hub  # noqa: F401  makes our models known to transformers
from transnormer.data.chat import DEFAULT
from transnormer.formats.folders import find_model

folder = find_model(Path(sys.argv[1]))  # of a run, its newest checkpoint
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.chat_template = tokenizer.chat_template or DEFAULT
file = str(Path(__file__).with_name("instructions.jsonl"))
train = load_dataset("json", data_files=file, split="train")
args = SFTConfig(
    "runs/lora_trl", max_steps=40, learning_rate=3e-3, per_device_train_batch_size=4, bf16=False,
    max_length=256, packing=True, assistant_only_loss=True, logging_steps=10, save_strategy="no",
    report_to="none",
)  # fmt: skip
lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = AutoModelForCausalLM.from_pretrained(folder)
trainer = SFTTrainer(model, args, train_dataset=train, processing_class=tokenizer, peft_config=lora)
trainer.train()
ids = torch.tensor([tokenizer("Who goes there?")["input_ids"]])
unmerged = trainer.model.eval()(ids).logits
merged = trainer.model.merge_and_unload()
torch.testing.assert_close(merged(ids).logits, unmerged, rtol=1e-3, atol=1e-3)
merged.save_pretrained("runs/lora_trl")
tokenizer.save_pretrained("runs/lora_trl")  # transnormer chat --model runs/lora_trl reads both
print("largest difference, merged and not:", float((merged(ids).logits - unmerged).abs().max()))
