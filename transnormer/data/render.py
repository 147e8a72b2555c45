"""Chat templates are programs by strangers: this file runs as a process of its own, in a sandbox and within limits.

Started by `chat.Template` with the limits as arguments: seconds, bytes, characters. It reads JSON lines, first the
template with its variables, then conversations, and answers each with a line. A template that takes too long or too
much memory ends the process, and nothing but the process.
"""

from __future__ import annotations

import json
import resource
import signal
import sys
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what transformers counts as the assistant's; here it is no more."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> NoReturn:
    """What templates call where a conversation does not suit them."""
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """jinja's own makes the text fit for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def compiled(source: str) -> jinja2.Template:
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < (3, 1, 6):
        raise RuntimeError(f"jinja2 {jinja2.__version__} has holes in its sandbox: pip install 'jinja2>=3.1.6'")
    sandbox = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols])
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = refuse
    return sandbox.from_string(source)


def rendered(template: jinja2.Template, variables: dict[str, Any], most: int) -> str:
    parts, size = [], 0
    for part in template.generate(variables):
        size += len(part)
        if size > most:
            raise ValueError(f"it writes more than {most:,} characters")
        parts.append(part)
    return "".join(parts)


def main(seconds: float, memory_bytes: int, chars: int) -> None:
    # memory beyond the limit is refused when it is asked for; time beyond it ends the process on the spot
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for who started us; we end with our input
    template, tokens = jinja2.Template(""), {}
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            request, texts = json.loads(line), []
            if "source" in request:
                template, tokens = compiled(request["source"]), request["tokens"]
            else:
                for count, begun in request["cuts"]:
                    variables = {"messages": request["messages"][:count], "add_generation_prompt": begun}
                    texts.append(rendered(template, tokens | variables, chars))
            answer = json.dumps({"texts": texts})
        except MemoryError:
            answer = json.dumps({"error": f"it takes more than {memory_bytes >> 20} MiB"})
        except Exception as error:  # whatever a program by strangers may raise
            answer = json.dumps({"error": " ".join(f"{type(error).__name__}: {error}".split())[:400]})
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
