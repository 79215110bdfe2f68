"""dlcm: Dynamic Large Concept Models (arXiv 2512.24617), strictly causal.

Importing the package registers both architectures with `transformers`' Auto classes.
"""

from transformers import AutoConfig, AutoModelForCausalLM

from dlcm.baseline import LlamaBaselineForCausalLM
from dlcm.config import DLCMConfig, LlamaBaselineConfig
from dlcm.model import DLCMForCausalLM
from dlcm.version import __version__

AutoConfig.register(DLCMConfig.model_type, DLCMConfig)
AutoConfig.register(LlamaBaselineConfig.model_type, LlamaBaselineConfig)
AutoModelForCausalLM.register(DLCMConfig, DLCMForCausalLM)
AutoModelForCausalLM.register(LlamaBaselineConfig, LlamaBaselineForCausalLM)

__all__ = ["DLCMConfig", "DLCMForCausalLM", "LlamaBaselineConfig", "LlamaBaselineForCausalLM", "__version__"]
