"""PEFT's own generic tests (``tests/test_custom_models.py`` of its sources) on the MASM tuner."""

import atexit
import functools
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft", reason="needs the extra masm_ext[peft]")
sys.path.insert(0, str(Path(__file__).parent))
import peft_sources
import transformers

from masm_ext.integrations.peft import MASMTunerConfig

if reason := peft_sources.reason_to_skip():
    pytest.skip(reason, allow_module_level=True)

folder = tempfile.mkdtemp()
atexit.register(shutil.rmtree, folder, ignore_errors=True)
released = peft_sources.load(Path(folder))
PeftCommonTester = released.PeftCommonTester


@dataclass
class SmallConfig(MASMTunerConfig):
    """The layers of PEFT's models have as few as two directions, and some tests load onto other random weights."""

    num_subspaces: int = 2
    subspace_rank: int | list[int] = 1
    lift: float = 0.5
    check_base: bool = False


SETTINGS = {"num_subspaces": 2, "subspace_rank": 1, "lift": 0.5}
CASES = [
    ("MASM", "MLP", MASMTunerConfig, {"target_modules": "lin0", **SETTINGS}),
    ("MASM, list", "MLP", MASMTunerConfig, {"target_modules": ["lin0", "lin1"], **SETTINGS, "lift": 0.0}),
    ("MASM, leading", "MLP", MASMTunerConfig,
     {"target_modules": ["lin0"], "num_subspaces": 2, "subspace_rank": [1, 3], "directions": "leading"}),
    ("MASM, energy and bias", "MLP", MASMTunerConfig,
     {"target_modules": ["lin0"], "num_subspaces": 2, "energy": 0.5, "directions": "leading", "train_bias": True}),
    ("MASM, head saved", "MLP", MASMTunerConfig,
     {"target_modules": ["lin0"], "modules_to_save": ["lin1"], **SETTINGS}),
]  # fmt: skip
PAIRS = [
    ("MASM Same", "masm", MASMTunerConfig,
     {"target_modules": ["lin0"], "init_weights": False, **SETTINGS},
     {"target_modules": ["lin0"], "init_weights": False, **SETTINGS, "subspace_rank": 2}),
    ("MASM Different", "masm", MASMTunerConfig,
     {"target_modules": ["lin0"], "init_weights": False, **SETTINGS},
     {"target_modules": ["lin1"], "init_weights": False, **SETTINGS}),
]  # fmt: skip
# pytest reads these lists when it collects
released.TEST_CASES[:] = CASES
released.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES[:] = PAIRS
released.ALL_PEFT_CONFIG_CLASSES[:] = [SmallConfig]
SHARED = (released.TEST_CASES, released.MULTIPLE_ACTIVE_ADAPTERS_TEST_CASES, released.ALL_PEFT_CONFIG_CLASSES)


#: Layers of a Llama, as PEFT names them.
TRANSFORMER_CASES = [
    ("list", {"target_modules": ["q_proj", "v_proj"]}),
    ("regular expression", {"target_modules": r".*self_attn\.(q|o)_proj"}),
    ("all-linear", {"target_modules": "all-linear", "lift": 0.5}),
]
OPTIONS = [options for _, options in TRANSFORMER_CASES]
#: PEFT's tests of models. Without further arguments:
PLAIN_TESTS = (
    *("prepare_for_training", "training", "unload_adapter", "disable_adapter", "inference_safetensors", "safe_merge"),
    *("generate", "generate_half_prec", "merge_layers", "merge_layers_fp16", "merge_layers_nan", "delete_adapter"),
    *("merge_layers_is_idempotent", "merge_layers_multi", "save_pretrained", "load_multiple_adapters"),
    *("save_pretrained_selected_adapters", "load_model_low_cpu_mem_usage", "peft_model_device_map"),
    *("delete_inactive_adapter", "get_base_model_state_dict", "lora_conversion", "training_layer_indexing"),
    "mixed_adapter_batches",
)
#: And the further arguments that each runs with.
MODEL_TESTS = {
    **{name: [{}] for name in PLAIN_TESTS},
    "passing_input_embeds_works": [{"test_name": "MASM"}],
    "generate_pos_args": [{"raises_err": False}],
    "training_gradient_checkpointing": [{"use_reentrant": True}, {"use_reentrant": False}],
}
#: Tests of adapters that are no identity at the start.
NEEDS_AN_EFFECT = ("disable_adapter", "merge_layers_multi", "safe_merge")


def generic(base: type, **changed) -> type:
    """The tests of a class that run on every method of PEFT, some of them changed; the others name a method."""
    own = dict(changed)
    for name, test in vars(base).items():
        marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
        if name.startswith("test") and not any(mark.args[1] is shared for mark in marks for shared in SHARED):
            own[name] = None
    return type(base.__name__, (base,), own)


def refused(test, when, reason: str):
    """The test, where it must fail for the parameters that `when` names."""

    @functools.wraps(test)
    def wrapper(self, **parameters):
        if not when(parameters):
            return test(self, **parameters)
        with pytest.raises(AssertionError):
            test(self, **parameters)
        pytest.xfail(reason)

    return wrapper


TestPeftCustomModel = generic(
    released.TestPeftCustomModel,
    test_adapter_dtype_autocast=refused(
        released.TestPeftCustomModel.test_adapter_dtype_autocast,
        lambda own: not own["autocast_adapter_dtype"] and own["dtype"] != torch.float32,
        "the factors beside a half-precision weight stay float32: bfloat16 would round small updates away",
    ),
    test_parameters_after_loading_model=refused(
        released.TestPeftCustomModel.test_parameters_after_loading_model,
        lambda own: own["test_name"] == "MASM, list",
        "gradient descent with its rate of 0.5 diverges, and NaN compares unequal",
    ),
)
TestMultipleActiveAdapters = generic(released.TestMultipleActiveAdapters)
TestRequiresGrad = generic(released.TestRequiresGrad)
TestPeftFsdpStateDict = generic(released.TestPeftFsdpStateDict)


class TinyLlama:
    """A Llama of random weights that needs no download; in place of a class of transformers."""

    @staticmethod
    def from_pretrained(folder, **options):
        return transformers.LlamaForCausalLM.from_pretrained(folder, **options)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """The folder of a tiny Llama."""
    target = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(target)
    return str(target)


class TestDecoder(PeftCommonTester):
    """Tests of PEFT for models of transformers, which it runs on models of the hub."""

    transformers_class = TinyLlama

    def prepare_inputs_for_testing(self):
        ids = torch.tensor([[5, 9, 13], [7, 3, 11]])
        return {"input_ids": ids, "attention_mask": torch.tensor([[1, 1, 1], [1, 0, 1]])}

    @pytest.mark.parametrize("options", OPTIONS, ids=[name for name, _ in TRANSFORMER_CASES])
    @pytest.mark.parametrize("name", sorted(MODEL_TESTS))
    def test_model(self, llama, name, options):
        options = {"task_type": "CAUSAL_LM", "num_subspaces": 2, "subspace_rank": 3, **options}
        if name == "training_layer_indexing" and isinstance(options["target_modules"], str):
            pytest.skip("PEFT takes layers_to_transform with a list of names only")
        if name in NEEDS_AN_EFFECT:
            options["init_weights"] = False
        test = getattr(self, f"_test_{name}")
        for arguments in MODEL_TESTS[name]:
            test(model_id=llama, config_cls=MASMTunerConfig, config_kwargs=dict(options), **arguments)
