"""The reference implementation's Python API on this engine: change the import, keep the code.

Names, arguments and results are those of github.com/shiyu-coder/Kronos (MIT), so arguments keep
their order and their capitals here. Two things differ on purpose: inference is always in eval
mode, and ``torch.manual_seed`` fixes a forecast, but draws other noise than the reference's.
"""

from kronos_stream.compat.modules import Kronos, KronosTokenizer
from kronos_stream.compat.predictor import KronosPredictor

__all__ = ["Kronos", "KronosPredictor", "KronosTokenizer"]
