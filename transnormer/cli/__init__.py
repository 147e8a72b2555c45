"""The command line. Each file holds a group of verbs, and each verb imports its work when it is
called."""

from . import train, write, prepare, convert, evaluate, info, plan  # noqa: F401, I001  # in the order of the help
from .app import app as app
from .app import main as main
