"""Fine-tune all weights with TRL; what it saves, `transnormer chat --model runs/sft_trl` reads.

python examples/sft_trl.py runs/demo
"""

import sys
from pathlib import Path

from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import transnormer.hub  # noqa: F401  makes our models known to transformers
from transnormer.data.chat import DEFAULT
from transnormer.formats.folders import find_model

folder = find_model(Path(sys.argv[1]))  # of a run, its newest checkpoint
tokenizer = AutoTokenizer.from_pretrained(folder)
tokenizer.chat_template = tokenizer.chat_template or DEFAULT
records = load_dataset(
    "json", data_files=str(Path(__file__).with_name("instructions.jsonl")), split="train"
)
settings = SFTConfig(
    "runs/sft_trl",
    max_steps=40,
    learning_rate=1e-3,
    per_device_train_batch_size=4,
    max_length=256,
    packing=True,  # conversations share a row, and each is read from a fresh state
    assistant_only_loss=True,
    logging_steps=10,
    save_strategy="no",
    report_to="none",
    bf16=False,
)
model = AutoModelForCausalLM.from_pretrained(folder)
trainer = SFTTrainer(model, settings, train_dataset=records, processing_class=tokenizer)
trainer.train()
trainer.save_model()
