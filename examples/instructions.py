"""Make instructions.jsonl, 160 conversations drawn from shakespeare.txt: who says it, and how does
it go on?

python examples/instructions.py > examples/instructions.jsonl
"""

import json
from pathlib import Path

text = Path(__file__).with_name("shakespeare.txt").read_text()
speeches = [speech.split(":\n", 1) for speech in text.split("\n\n") if ":\n" in speech]
speeches = [(who.title(), words.strip().split("\n")) for who, words in speeches]
system = {"role": "system", "content": "You know the plays of Shakespeare."}


def ask(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


short = [
    (who, lines[0]) for who, lines in speeches if len(lines) == 1 and 25 <= len(lines[0]) <= 60
]
longer = [
    (who, lines) for who, lines in speeches if 2 <= len(lines) <= 3 and max(map(len, lines)) <= 60
]
for n in range(80):
    who, line = short[len(short) * n // 80]
    messages = ask(f'Who says "{line}"?', f"{who}.")
    if n % 4 == 0:  # a second turn
        who, line = short[len(short) * n // 80 + 1]
        messages += ask(f'And who says "{line}"?', f"{who}.")
    print(json.dumps({"messages": [system, *messages] if n % 2 else messages}))
    who, (first, *rest) = longer[len(longer) * n // 80]
    print(json.dumps({"messages": ask(f'Go on as {who}: "{first}"', "\n".join(rest))}))
