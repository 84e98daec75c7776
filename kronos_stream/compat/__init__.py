"""Python API of the reference implementation on this engine; only the import changes.

Names, arguments and results are those of github.com/shiyu-coder/Kronos (MIT), including the order
and the capitals of arguments. There are two intended differences: inference is always in eval mode,
and ``torch.manual_seed`` makes a forecast reproducible, but with other noise than the reference.
"""

from kronos_stream.compat.modules import Kronos, KronosTokenizer
from kronos_stream.compat.predictor import KronosPredictor

__all__ = ["Kronos", "KronosPredictor", "KronosTokenizer"]
