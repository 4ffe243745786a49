"""Training and evaluation of deepfake detectors on frozen vision transformers: the command `masm`.

Data flows one way: image files -> `data.sample.Sample` -> `data.frames.FrameDataset` -> `models.detector.Detector`
-> logits -> `evaluation.metrics` -> `results`. Label 1 means fake, and a score is P(fake).
"""
