"""MASM as a method of Hugging Face PEFT. Needs ``pip install 'masm_ext[peft]'``.

Importing this module registers the method; ``PeftModel.from_pretrained`` needs the import, too::

    from masm_ext.integrations.peft import MASMTunerConfig

    model = get_peft_model(model, MASMTunerConfig(target_modules=["query", "value"], num_subspaces=3, subspace_rank=4))
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from .config import MASMTunerConfig
from .folders import adapter_to_peft, peft_to_adapter
from .layer import MASMTunerLinear
from .model import MASMTunerModel
from .peft_type import NAME, peft_type
from .subspaces import AdapterSubspaces

__all__ = [
    "AdapterSubspaces",
    "MASMTunerConfig",
    "MASMTunerLinear",
    "MASMTunerModel",
    "adapter_to_peft",
    "peft_to_adapter",
]

if peft_type() not in PEFT_TYPE_TO_CONFIG_MAPPING:  # else: importlib.reload
    register_peft_method(
        name=NAME.lower(), config_cls=MASMTunerConfig, model_cls=MASMTunerModel, prefix=MASMTunerModel.prefix
    )
