"""`python -m transnormer.hub MODULE ...`: another library's command, with our models known to
transformers."""

import runpy
import sys

if len(sys.argv) < 2:
    sys.exit(
        "error: which module? e.g. python -m transnormer.hub lm_eval run --model hf --model_args "
        "pretrained=DIR"
    )
del sys.argv[0]
runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
