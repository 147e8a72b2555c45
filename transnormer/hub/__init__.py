"""`import transnormer.hub`: transformers' Auto classes then load our folders. Raises ImportError
without transformers."""

import logging
from importlib.metadata import PackageNotFoundError, version

OLDEST = (5, 16)

try:
    _found = version("transformers")
except PackageNotFoundError:
    _found = "none"
if _found == "none" or tuple(int(part) for part in _found.split(".")[:2]) < OLDEST:
    raise ImportError(
        f"transnormer.hub needs transformers {'.'.join(map(str, OLDEST))} or newer, and there is "
        f"{_found}: "
        "pip install 'transnormer[hf]'"
    )

# transformers imports torchao where it is installed, although nothing here asks for float8. Its
# warnings about kernels that it could not load are hidden, because nobody who reads our output
# could do anything about them.
_quiet = [logging.getLogger(name) for name in ("torchao", "torch.utils._pytree")]
_levels = [logger.level for logger in _quiet]
for _logger in _quiet:
    _logger.setLevel(logging.ERROR)
try:
    from . import hf  # imported after the check above, whose error says more
finally:
    for _logger, _level in zip(_quiet, _levels, strict=True):
        _logger.setLevel(_level)

__all__ = ["hf"]
