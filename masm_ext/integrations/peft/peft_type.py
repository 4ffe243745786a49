"""Names that PEFT gives: of the method, and before the modules of the base model."""

from __future__ import annotations

from peft import PeftType

NAME = "MASM"
#: What PEFT puts before the names of the base model.
PREFIX = "base_model.model."


def peft_type() -> PeftType:
    """The member ``MASM`` of PEFT's enum of methods, added on the first call.

    ``register_peft_method`` takes only methods that are members of the enum, and an enum is closed, so the member is
    added here as ``enum`` itself would have added it.
    """
    if NAME not in PeftType.__members__:
        member = str.__new__(PeftType, NAME)
        member._name_, member._value_, member._sort_order_ = NAME, NAME, len(PeftType)
        PeftType._member_names_.append(NAME)
        PeftType._member_map_[NAME] = member
        PeftType._value2member_map_[NAME] = member
        type.__setattr__(PeftType, NAME, member)
    return PeftType(NAME)
