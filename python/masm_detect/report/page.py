"""HTML reports: one file each, without scripts, pictures or fonts from elsewhere.

A report is a Jinja template in `templates/`, which extends `base.html`. Jinja escapes what is put in.
"""

from __future__ import annotations

import base64
import io
from functools import lru_cache
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from .plots import without_tex


def render(template: str, **values: Any) -> str:
    """The page of the template called `template`; a value that it uses and does not get is an error."""
    return _environment().get_template(template).render(**values)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    loader = PackageLoader("masm_detect.report")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)


def figure_svg(figure: Figure) -> Markup:
    """A figure as SVG, to be put into a page as it is."""
    without_tex(figure)
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    svg = text.getvalue()
    return Markup(svg[svg.index("<svg") :])


def image_uri(rgb: np.ndarray, quality: int = 88) -> str:
    """RGB uint8 [H, W, 3] as the address of a picture inside the page (JPEG)."""
    from masm_detect.data.decode import encode_jpeg

    return "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(rgb, quality).tobytes()).decode()
