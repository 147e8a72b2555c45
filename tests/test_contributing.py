"""CONTRIBUTING's table "Where do I add…" is true: what is added to a copy of the package in the
places that the table names, and nowhere else, can be trained, planned, described and written with.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import PATIENCE, REPOSITORY, TEXT

Edit = Callable[[str], str]  # of the source of one file


def add(table: str, line: str, definition: str = "") -> Edit:
    """Put a line at the beginning of a table, and a definition before the table."""

    def edit(source: str) -> str:
        (begin,) = re.finditer(rf"^{table}\b.*?= [{{(]", source, re.MULTILINE)
        head, found, rest = source[: begin.start()], begin[0], source[begin.end() :]
        return f"{head}{definition}\n\n{found}{line}, {rest}"

    return edit


def both(*edits: Edit) -> Edit:
    def edit(source: str) -> str:
        for each in edits:
            source = each(source)
        return source

    return edit


NORM = '''
class AbsoluteNorm(nn.Module):
    """x / mean(|x|), with a gain for each channel."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.empty(width))
        self.reset_parameters()

    def reset_parameters(self):
        nn.init.ones_(self.weight)

    def forward(self, x):
        return x / (x.abs().mean(-1, keepdim=True) + self.eps) * self.weight
'''

NORM_OVER_RANKS = """
from ..model.layers import AbsoluteNorm

def _absolute(x, mean, eps):
    return x / (mean(x.abs()) + eps)
"""

POSITION = '''
class Sway(nn.Module):
    """Each channel of q and k swings with the place of its token, as far as it learns to."""

    def __init__(self, config):
        super().__init__()
        self.extent = nn.Parameter(torch.empty(config.num_attention_heads, config.head_dim))

    def reset_parameters(self):
        fill(self.extent, torch.full(self.extent.shape, 0.5))

    def forward(self, q, k, tokens):
        swing = 1 + local(self.extent) * tokens.positions[..., None, None].to(q.dtype).sin()
        return q * swing, k * swing
'''

GLU = '''
class Squared(MLP):
    """O = ReLU(X W_u)^2 W_o."""

    def forward(self, x):
        return self.down_proj(F.relu(self.up_proj(x)).square())
'''

# One whose state is [B, H, K, V], with parameters of its own, and one that keeps keys and values.
MIXERS = '''
from torch import nn

from .layers import local

class Skipping(Mixer):
    """Linear attention that passes on a learned share of each token's own value."""

    SHARDS = {**Mixer.SHARDS, "": "heads"}

    def __init__(self, config, layer):
        super().__init__(config, layer)
        self.skip = nn.Parameter(torch.empty(self.heads, self.head_dim))

    def reset_parameters(self):
        nn.init.ones_(self.skip)

    def new_state(self, rows):
        own = self.log_decay.new_zeros(rows, self.heads, self.key_dim, self.head_dim)
        return own, *self._new_past(rows)

    def flops_per_token(self, seq_len, chunk):
        return 4.0 * self.heads * self.key_dim * self.head_dim

    def forward(self, x, state, tokens):
        before, *past = state or (None,)
        x, qkvu, last = self._qkvu(x, tuple(past), tokens)
        q, k, v, gate = self._project(x, qkvu, tokens)
        mixed, after = lightning_attention(
            q, k, v, self.log_decay, state=before, cu_seqlens=tokens.cu_seqlens,
            return_state=True, context=self.context,
        )
        return self._project_out(mixed + local(self.skip) * v, gate), (after, *last)

    def mix_(self, x, qkvu, memory, tokens):
        q, k, v, gate = self._project(x, qkvu, tokens)
        mixed = []
        for t in range(x.shape[1]):
            one = (part[:, t : t + 1] for part in (q, k, v))
            slots = tokens.owners(t)
            mixed.append(lightning_step_(*one, self.log_decay, memory[0], slots=slots))
        return torch.cat(mixed, dim=1) + local(self.skip) * v, gate

class Sharp(SoftmaxAttention):
    """Softmax attention whose scores are three times as large."""

    def _project(self, x, qkvu, tokens):
        q, k, v, gate = super()._project(x, qkvu, tokens)
        return 3 * q, k, v, gate
'''

READER = """
def _read_csv(path, fields):
    import csv
    import io

    text = _decode(b"".join(_read_chunks(path)), str(path))
    for number, record in enumerate(csv.DictReader(io.StringIO(text)), start=1):
        yield f"{path} record {number}", record
"""

VERB = '''
@app.command(epilog=see("transnormer greet you", "README.md"))
def greet(name: str) -> None:
    """Greet somebody."""
    print(f"good day, {name}")
'''

# For each row of the table what is added, file by file.
ADDED: dict[str, dict[str, Edit]] = {
    "a norm": {
        "model/layers.py": add("NORMS", '"absolute": AbsoluteNorm', NORM),
        "layer_config.py": add("NORMS", '"absolute": 1'),
        "train/sharding.py": add("NORMS_OVER_RANKS", "AbsoluteNorm: _absolute", NORM_OVER_RANKS),
    },
    "an activation, position, GLU": {
        "model/layers.py": both(
            add("ACTIVATIONS", '"softplus": F.softplus'),
            add("POSITIONS", '"sway": Sway', POSITION),
            add("GLUS", '"squared": Squared', GLU),
        ),
        "layer_config.py": both(
            add("ACTIVATIONS", '"softplus"'),
            add("POSITIONS", '"sway": PositionFacts(parameters=1)'),
            add("GLUS", '"squared": 1'),
        ),
    },
    "a mixer": {
        "model/mixers.py": add("MIXERS", '"skipping": Skipping, "sharp": Sharp', MIXERS),
        "layer_config.py": add(
            "MIXERS",
            '"skipping": MixerFacts(fixed_state=True, norm=False, parameters=1), '
            '"sharp": MixerFacts(fixed_state=False, norm=False)',
        ),
        "planning/hardware.py": add("PASSES_SHARE", '"skipping": {1_024: 0.5}'),
    },
    "a kind of input file": {
        "data/documents.py": add("FILE_KINDS", '".csv": FileKind(_read_csv, "column")', READER)
    },
    "a verb": {"cli/info.py": lambda source: source + VERB},
}


def touched() -> dict[str, list[str]]:
    """What the second column of CONTRIBUTING's table marks as code, for each row."""
    text = (REPOSITORY / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.partition("## Where do I add")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (.+?) \| (.+?) \|", table, re.MULTILINE)
    return {what: re.findall("`(.+?)`", touch) for what, touch in rows}


def test_what_is_added_where_the_table_says_can_be_used(tmp_path: Path) -> None:
    package, table = tmp_path / "transnormer", touched()
    shutil.copytree(REPOSITORY / "transnormer", package, ignore=shutil.ignore_patterns("*.pyc"))
    for what, edits in ADDED.items():
        named = {word for word in table[what] if word.endswith((".py", "/"))}
        # The table names these files and no others, and of `cli/` leaves the file to choose.
        assert {"cli/" if file.startswith("cli/") else file for file in edits} == named
        for file, edit in edits.items():
            source = (package / file).read_text(encoding="utf-8")
            (package / file).write_text(edit(source), encoding="utf-8")
    command = [sys.executable, "-c", "from tests.test_contributing import use; use()"]
    path = os.pathsep.join(map(str, (tmp_path, REPOSITORY)))
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["verb", "document", "training", "writing", "plan", "mesh", "hub"]


@pytest.mark.parametrize("what", ["a norm", "an activation, position, GLU", "a mixer"])
def test_the_names_in_the_table_are_in_its_files(what: str) -> None:
    words = touched()[what]
    files = [word for word in words if word.endswith(".py")]
    sources = [(REPOSITORY / "transnormer" / file).read_text(encoding="utf-8") for file in files]
    for name in set(words) - {*files, "parallel.tensor"}:
        assert any(re.search(rf"\b{name}\b", source) for source in sources), name


# What the copy does, in a process of its own that imports the copy.


def use() -> None:
    """Use all that was added, and print a word for each use that went well."""
    import transnormer

    assert Path(transnormer.__file__).parent == Path.cwd() / "transnormer"
    for work in (_verb, _document, _training, _writing, _plan, _mesh, _hub):
        work()
        print(work.__name__.removeprefix("_"))


WORDS = {
    "norm": "absolute",
    "mixer": "skipping",
    "position": "sway",
    "activation": "softplus",
    "glu": "squared",
}
OVERRIDES = [f"model.{key}={word}" for key, word in WORDS.items()]


def _verb() -> None:
    from .test_cli import call

    assert "Greet somebody." in call("--help")[0]
    assert call("greet", "you")[0] == "good day, you\n"


def _document() -> None:
    import csv

    from transnormer.data.documents import Document, read_documents

    from .test_cli import call

    scenes = TEXT.read_text(encoding="utf-8")[:60_000].split("\n\n")
    with open("scenes.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([["text", "url"], *([scene, "http://a"] for scene in scenes)])
    first = Document("scenes.csv record 1", scenes[0], {"url": "http://a", "source": "scenes.csv"})
    assert next(read_documents(["scenes.csv"])) == first
    out, _ = call("prepare", "scenes.csv", "--out", "data", "--vocab-size", 300, "--split", 0.1)
    counts = re.findall(r"([\d,]+) documents", out)
    assert sum(map(int, counts)) == len(scenes)


def _training() -> None:
    import json

    import transnormer
    from transnormer.train.optim import new_optimizer
    from transnormer.train.recipe import Optim

    from .test_cli import call
    from .train.runs import RECIPE

    Path("tiny.toml").write_text(RECIPE.format(data="data", steps=12))
    call("train", "tiny.toml", "run=added", *OVERRIDES)
    lines = map(json.loads, Path("runs/added/metrics.jsonl").read_text().splitlines())
    losses = [line["loss"] for line in lines if line.get("loss") is not None]
    assert len(losses) == 12
    assert losses[-1] < losses[0] - 0.3
    model = transnormer.load("runs/added")
    _, spared = (group["params"] for group in new_optimizer(model, Optim()).param_groups)
    own = {"weight", "skip", "extent"}  # gains, and what the mixer and the position learn
    names = {name.rpartition(".")[2] for name, p in model.named_parameters() if p in {*spared}}
    assert names == own
    said = call("info", "runs/added")[0]
    assert all(f'"{key}": "{word}"' in said for key, word in WORDS.items())


def _writing() -> None:
    """By forward passes over all, in pieces and by steps in place: the same."""
    import torch

    import transnormer
    from transnormer import LanguageModel
    from transnormer.inference.sampling import Sampling
    from transnormer.inference.session import Session

    trained = transnormer.load("runs/added")
    torch.manual_seed(0)
    growing = LanguageModel(trained.config.replace(mixer="sharp")).eval()
    other = LanguageModel(growing.config.replace(mixer="softmax")).eval()
    other.load_state_dict(growing.state_dict())
    ids = torch.randint(300, (2, 40))
    assert (growing(ids)[0] - other(ids)[0]).abs().max() > 1e-5
    for model, name in ((trained, "Skipping"), (growing, "Sharp")):
        config = model.config
        assert {type(block.mixer).__name__ for block in model.blocks()} == {name}
        assert config.parameter_count() == model.parameter_count()
        whole, _ = model(ids)
        before, state = model(ids[:, :17])
        pieces = torch.cat([before, model(ids[:, 17:], state)[0]], dim=1)
        torch.testing.assert_close(pieces, whole, rtol=1e-4, atol=1e-4)
        row = ids[:1, :9]
        session = Session(model)
        session.read(row[0].tolist())
        for token in session.write(12, Sampling(temperature=0)):
            assert token == int(model(row)[0][0, -1].argmax())
            row = torch.cat([row, torch.tensor([[token]])], dim=1)
        _, state = model(row[:, :-1])
        assert session.state is not None
        assert session.state.nbytes == state.nbytes
        held = state.nbytes - state.seen.nbytes
        assert held == config.state_bytes(row.shape[1] - 1)


def _plan() -> None:
    from .test_cli import call

    # The weights of each plan are compared with what the real sharding code gives.
    out, _ = call("plan", "--size", "45m", "--gpus", 2, "--tensor", 2, *OVERRIDES)
    assert "are checked against the real sharding code" in " ".join(out.split())


def _mesh() -> None:
    """The norm's sums over the ranks of a mesh, of which there is one."""
    import torch
    import torch.distributed as dist

    from transnormer.model.layers import NORMS
    from transnormer.train.sharding import _NormOfShards

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    norm, x = NORMS["absolute"](24, 1e-6), torch.randn(2, 5, 24)
    torch.nn.init.normal_(norm.weight)
    mesh = dist.init_device_mesh("cpu", (1,))
    torch.testing.assert_close(_NormOfShards(norm, mesh)(x), norm(x))
    dist.destroy_process_group()


def _hub() -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    import transnormer
    import transnormer.hub

    model = transnormer.load("runs/added")
    prompt = torch.tensor([[5, 6, 7]])
    for mixer in ("skipping", "sharp"):
        theirs = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(**model.config.replace(mixer=mixer).to_dict())
        )
        ours = transnormer.LanguageModel(model.config.replace(mixer=mixer))
        fresh = dict(theirs.named_parameters())
        for name, p in ours.named_parameters():
            if p.dim() == 1 or "position" in name or "skip" in name:  # not drawn
                assert torch.equal(fresh[name], p), name
        ours.load_state_dict(fresh, strict=False)
        written = theirs.eval().generate(prompt, max_new_tokens=8, do_sample=False)[0]
        for n in range(3, len(written)):
            assert int(ours(written[None, :n])[0][0, -1].argmax()) == written[n]
