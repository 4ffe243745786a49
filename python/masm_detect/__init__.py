"""Training and evaluation of deepfake detectors on frozen vision transformers: the command `masm`.

Data flows one way: image files -> `data.records.Sample` -> `data.images.FrameDataset` -> `models.detector.Detector`
-> logits -> `metrics` -> `results`. Label 1 means fake, and a score is P(fake).
"""
