"""`import transnormer.hub`: transformers' Auto classes then load our folders. Raises ImportError without transformers."""

from importlib.metadata import PackageNotFoundError, version

OLDEST = (5, 16)

try:
    _found = version("transformers")
except PackageNotFoundError:
    _found = "none"
if _found == "none" or tuple(int(part) for part in _found.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"transnormer.hub needs transformers {'.'.join(map(str, OLDEST))} or newer, and there is {_found}: "
        "pip install 'transnormer[hf]'"
    )

from . import hf  # noqa: E402  only now, for what it raises without transformers says less

__all__ = ["hf"]
