"""The code in the model cards, one text for each format. It runs as copied, from the folder that holds the export."""

from __future__ import annotations

_ONNX = """Without masm_ext: `pip install numpy pillow onnxruntime`, then `python {name}/predict.py IMAGE ...`, or

```python
import sys

sys.path.insert(0, "{name}")
from predict import load_model, logit_of

session, preprocessing = load_model("{name}")
logit = logit_of("face.png", session, preprocessing)  # above 0: fake
```

`model.onnx` takes `pixel_values`, float32 [batch, 3, {size}, {size}], and gives `logits`, float32
[batch]; `preprocessing.json` holds how an image becomes its input."""

_HF = """Without masm_ext: `pip install torch transformers pillow`.

```python
from transformers import AutoImageProcessor, pipeline

processor = AutoImageProcessor.from_pretrained("{name}", backend="pil")
classify = pipeline("image-classification", model="{name}", image_processor=processor)
print(classify("face.png"))  # labels real and fake; the score of fake is P(fake)
```

`backend="pil"` (transformers 5; before: `use_fast=False`) resizes as in training. The default of
transformers, where torchvision is installed, rounds some pixels differently."""

_ADAPTER = """With masm_ext and its extra `detect`, which loads the base model and puts the trained weights on it:

```python
import torch
from masm_detect.data.frames import frame_dataset
from masm_detect.data.sample import Sample
from masm_detect.evaluation.runs import load_run

config, detector = load_run("{name}")
image = Sample("face.png", label=0, dataset="", method="real", video="")  # the label is not used
pixels = frame_dataset([image], detector.backbone, config.data)[0]["image"]
with torch.inference_mode():
    logit = float(detector.eval()(pixels[None]))  # above 0: fake
```

Commands that take a run take this folder: `masm eval {name} --data DATA`."""

_HUB = """With masm_ext and its extra `detect`; without `import masm_detect.hub`, transformers does not know this model:

```python
import masm_detect.hub
from transformers import pipeline

classify = pipeline("image-classification", model="{name}")
print(classify("face.png"))  # labels real and fake; the score of fake is P(fake)
```

Its image processor resizes as in training, with and without torchvision."""

_HUB_ADAPTER = (
    _HUB
    + """

The folder holds what training changed. The base model is loaded beside it, and the hash of its weights is checked."""
)

#: How a model is used, by the format of its export, or hub and hub-adapter for `masm_detect.hub`; `name` and `size`
#: (pixels) are filled in.
USAGE = {"onnx": _ONNX, "hf": _HF, "adapter": _ADAPTER, "hub": _HUB, "hub-adapter": _HUB_ADAPTER}
