"""MASM inside other libraries: ``peft`` (a PEFT tuner) and ``trainer`` (the Trainer of transformers).

Nothing is imported here: each module needs a package that masm_ext does not install.
"""
