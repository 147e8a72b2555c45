"""Training in transformers, peft and TRL."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import transnormer

from ..conftest import TEXT
from ..lazy import Lazy
from .models import GREEDY, TARGETS, VOCAB, draw

transformers = Lazy("transformers")
peft, trl = Lazy("peft"), Lazy("trl")


def batches(
    folder: Path, count: int = 24
) -> tuple[list[dict], transformers.DataCollatorForLanguageModeling]:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, padding_side="right")
    text = TEXT.read_text()
    data = [tokenizer(text[100 * n : 100 * n + 60 + n]) for n in range(count)]
    return data, transformers.DataCollatorForLanguageModeling(tokenizer, mlm=False)


def losses(trainer: transformers.Trainer) -> list[float]:
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


OPTIONS = {
    "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True,
    "disable_tqdm": True,
    "lr_scheduler_type": "constant", "seed": 1,
}  # fmt: skip


def test_a_trainer_trains_and_accumulation_changes_nothing(folders, tmp_path) -> None:
    data, collate = batches(folders["untied"])
    runs = []
    for size in (8, 2):
        model = transformers.AutoModelForCausalLM.from_pretrained(folders["untied"])
        arguments = transformers.TrainingArguments(
            str(tmp_path / str(size)),
            max_steps=6,
            per_device_train_batch_size=size,
            gradient_accumulation_steps=8 // size,
            save_steps=6,
            **OPTIONS,
        )
        trainer = transformers.Trainer(
            model=model,
            args=arguments,
            train_dataset=data,
            eval_dataset=data,
            data_collator=collate,
        )
        runs.append(losses(trainer))
        assert trainer.evaluate()["eval_loss"] < runs[-1][0] - 0.5
        assert trainer.predict(data[:2]).predictions.shape[::2] == (2, VOCAB)
    torch.testing.assert_close(torch.tensor(runs[0]), torch.tensor(runs[1]), rtol=1e-3, atol=1e-3)
    assert runs[0][-1] < runs[0][0] - 0.5
    saved = transnormer.load(tmp_path / "8" / "checkpoint-6")
    ids = draw(1, 10)
    assert torch.equal(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "8" / "checkpoint-6")(
            ids
        ).logits,
        saved(ids)[0],
    )


@pytest.mark.parametrize("name", ["tied", "softmax"])
def test_lora_in_trl_trains_saves_and_merges(folders, name, tmp_path) -> None:
    text = TEXT.read_text()
    from datasets import Dataset

    data = Dataset.from_dict({"text": [text[100 * n : 100 * n + 60 + 5 * n] for n in range(4)]})
    runs = []
    for packing in (
        {},
        {"padding_free": True, "max_length": None},
        {"gradient_checkpointing": False},
    ):
        trainer = trl.SFTTrainer(
            model=str(folders[name]),
            args=trl.SFTConfig(
                str(tmp_path),
                max_steps=4,
                per_device_train_batch_size=4,
                bf16=False,
                save_strategy="no",
                **OPTIONS,
                **packing,
            ),
            train_dataset=data,
            processing_class=transformers.AutoTokenizer.from_pretrained(folders[name]),
            peft_config=peft.LoraConfig(r=4, target_modules=sorted(TARGETS), task_type="CAUSAL_LM"),
        )
        runs.append(losses(trainer))
    assert runs[0][-1] < runs[0][0]
    for other in runs[1:]:
        torch.testing.assert_close(torch.tensor(other), torch.tensor(runs[0]), rtol=1e-3, atol=1e-3)
    model, ids = trainer.model.eval(), draw(2, 15)
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        assert (
            expected - transformers.AutoModelForCausalLM.from_pretrained(folders[name])(ids).logits
        ).abs().max() > 1e-2
        model.save_pretrained(tmp_path / "adapter")
        again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
        assert torch.equal(again(input_ids=ids).logits, expected)
        written = model.generate(input_ids=ids, **GREEDY)
        merged = model.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(merged.generate(ids, **GREEDY), written)
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(
            transnormer.load(tmp_path / "merged")(ids)[0], expected, rtol=1e-4, atol=1e-4
        )


def test_a_token_that_pads_and_ends_texts_is_learned(folders) -> None:
    for end, learned in ((0, True), (None, False)):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folders["untied"], pad_token_id=0, eos_token_id=end
        )
        ids = torch.tensor([[5, 0, 9, 7]])
        model(ids, labels=ids).loss.backward()
        assert bool(model.embed_tokens.weight.grad[0].any()) is learned


def test_an_adapter_on_the_head_counts_in_the_loss(folders) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(folders["untied"])
    config = peft.LoraConfig(
        target_modules=["lm_head"], task_type="CAUSAL_LM", init_lora_weights=False
    )
    model, ids = peft.get_peft_model(model, config), draw(2, 15)
    output = model(input_ids=ids, labels=ids)
    wide = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
    torch.testing.assert_close(output.loss, wide)
    output.loss.backward()
    assert all(p.grad is not None for name, p in model.named_parameters() if "lora" in name)
