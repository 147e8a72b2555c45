"""Renders a chat template in a process of its own, because a template is a program by strangers.

`chat.Template` starts this file with three limits as arguments: seconds, bytes of memory,
characters. The process reads JSON lines, first the template with its variables and then
conversations, and answers each with one line. The template runs in a sandbox. One that takes too
long ends this process, and nothing but this process.
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
    """Lets templates use the block {% generation %} ... {% endgeneration %}, without an effect.

    transformers finds the assistant's turns by it.
    """

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse(message: str) -> NoReturn:
    """Templates call this, as raise_exception, where a conversation does not suit them."""
    raise jinja2.TemplateError(message)


def to_json(value: Any, ensure_ascii: bool = False, indent: int | None = None) -> str:
    """Replaces the filter of jinja, which escapes the text for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent)


def compile_template(source: str) -> jinja2.Template:
    if tuple(int(part) for part in jinja2.__version__.split(".")[:3]) < (3, 1, 6):
        found = f"jinja2 {jinja2.__version__} has holes in its sandbox"
        raise RuntimeError(f"{found}: pip install 'jinja2>=3.1.6'")
    extensions = [Generation, loopcontrols]
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=extensions,
    )
    sandbox.filters["tojson"] = to_json
    sandbox.globals["raise_exception"] = refuse
    return sandbox.from_string(source)


def render(template: jinja2.Template, variables: dict[str, Any], max_chars: int) -> str:
    parts, size = [], 0
    for part in template.generate(variables):
        size += len(part)
        if size > max_chars:
            raise ValueError(f"it writes more than {max_chars:,} characters")
        parts.append(part)
    return "".join(parts)


def main(seconds: float, memory_bytes: int, max_chars: int) -> None:
    # An allocation beyond the limit of memory raises MemoryError. SIGPROF, which comes when the
    # limit of time is over, ends the process at once.
    resource.setrlimit(resource.RLIMIT_DATA, (memory_bytes, memory_bytes))
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    # Ctrl-C also reaches the parent process, and this one ends when its input does.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    template, tokens = jinja2.Template(""), {}
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, seconds)
        try:
            request, texts = json.loads(line), []
            if "source" in request:
                template, tokens = compile_template(request["source"]), request["tokens"]
            else:
                for count, begun in request["cuts"]:
                    messages = request["messages"][:count]
                    variables = {"messages": messages, "add_generation_prompt": begun}
                    texts.append(render(template, tokens | variables, max_chars))
            answer = json.dumps({"texts": texts})
        except MemoryError:
            answer = json.dumps({"error": f"it takes more than {memory_bytes >> 20} MiB"})
        except Exception as error:  # a template may raise anything
            message = " ".join(f"{type(error).__name__}: {error}".split())
            answer = json.dumps({"error": message[:400]})
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(answer, flush=True)


if __name__ == "__main__":
    main(float(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
