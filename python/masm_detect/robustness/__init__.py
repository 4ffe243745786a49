"""How the scores of a run change under distortions of the material: `robustness.robustness`."""
