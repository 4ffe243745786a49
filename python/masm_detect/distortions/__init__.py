"""Distortions of images and videos, each with levels from mild to strong: `registry.DISTORTIONS`."""
