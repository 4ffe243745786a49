"""What a file carries about itself: its SHA-256, its format, and where its metadata claim that it comes from.

Metadata can be removed and forged: their absence means nothing, and only a valid C2PA signature proves who wrote them.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import av
from PIL import ExifTags, Image

from masm_detect.data.contents import survey
from masm_detect.data.decode import UnreadableImage
from masm_detect.hashes import file_sha256

#: EXIF fields that tell which device or program wrote a picture.
_EXIF = ("Make", "Model", "Software", "DateTime", "Artist", "Copyright", "ImageDescription")
#: Fields of videos and of PNG files with the same purpose; generators of images put their settings into "parameters".
_FIELDS = ("encoder", "creation_time", "handler_name", "comment", "title", "software", "parameters", "prompt", "artist")
#: Longest value that is shown, in characters.
_LONGEST = 300


def media_facts(path: Path, kind: str) -> dict[str, Any]:
    """What is known about a file without a detector.

    Args:
        path: the file.
        kind: image or video.

    Returns:
        {"sha256", "bytes", "format", "width", "height", "jpeg_quality" (estimated; None: no JPEG), "codec",
        "bits_per_pixel" (of a video, per pixel and frame), "seconds", "metadata": {field: value}, "c2pa": as of
        `c2pa_claims`}; None where it does not apply or the file does not say.
    """
    facts: dict[str, Any] = {"sha256": file_sha256(path), "bytes": path.stat().st_size}
    facts |= dict.fromkeys(("format", "width", "height", "jpeg_quality", "codec", "bits_per_pixel", "seconds"))
    facts["metadata"] = {}
    facts |= _video(path) if kind == "video" else _image(path)
    facts["c2pa"] = c2pa_claims(path)
    return facts


def _image(path: Path) -> dict[str, Any]:
    (content,) = survey([str(path)])
    if isinstance(content, UnreadableImage):
        return {}
    metadata: dict[str, str] = {}
    # Pillow raises many kinds of errors on damaged metadata, and one on pictures that it calls too large
    with suppress(Exception), Image.open(path) as image:
        exif = image.getexif()
        names = {ExifTags.TAGS.get(number, ""): value for number, value in exif.items()}
        metadata |= {f"EXIF {name}": _short(names[name]) for name in _EXIF if names.get(name)}
        info = {str(key).lower(): value for key, value in image.info.items() if isinstance(value, str)}
        metadata |= {name: _short(info[name]) for name in _FIELDS if info.get(name)}
    return {
        "format": content.format,
        "width": content.width,
        "height": content.height,
        "jpeg_quality": content.quality,
        "metadata": metadata,
    }


def _video(path: Path) -> dict[str, Any]:
    with suppress(av.FFmpegError, OSError), av.open(str(path), metadata_errors="replace") as container:
        stream = container.streams.best("video")
        if stream is None or stream.codec_context is None:
            return {"format": container.format.name}
        context = stream.codec_context
        frames = stream.frames or (
            float(stream.duration * stream.time_base * stream.average_rate)
            if stream.duration and stream.average_rate
            else 0
        )
        bits = sum(packet.size for packet in container.demux(stream)) * 8
        pixels = context.width * context.height * frames
        found = {**container.metadata, **stream.metadata}
        return {
            "format": container.format.name,
            "codec": context.name,
            "width": context.width,
            "height": context.height,
            "bits_per_pixel": bits / pixels if pixels else None,
            "seconds": container.duration / av.time_base if container.duration else None,
            "metadata": {key.lower(): _short(value) for key, value in found.items() if key.lower() in _FIELDS},
        }
    return {}


def c2pa_claims(path: Path) -> dict[str, Any]:
    """The Content Credentials (C2PA) of a file.

    Returns:
        {"state": "not read" (the package c2pa-python is not installed), "none", "damaged", or the validation state of
        the library (Valid, Invalid, Trusted); "generator": the program that signed; "actions": what it claims to have
        done, with the kind of source; "issuer": of the certificate}.
    """
    empty = {"generator": None, "actions": [], "issuer": None}
    try:
        from c2pa import C2paError, Context, Reader, Settings
    except ImportError:
        return {"state": "not read", **empty}
    # a manifest may be on a server, whose owner would learn that this file is examined
    offline = Settings.from_dict({"verify": {"remote_manifest_fetch": False, "ocsp_fetch": False}})
    try:
        with Reader(str(path), context=Context(offline)) as reader:
            content, state = json.loads(reader.json()), reader.get_validation_state()
    except C2paError as error:
        absent = "ManifestNotFound" in str(error) or "no JUMBF" in str(error) or "NotSupported" in str(error)
        return {"state": "none" if absent else "damaged", **empty, **({} if absent else {"error": _short(error)})}
    try:
        return {"state": str(state), **_claims(content)}
    except (AttributeError, TypeError, KeyError, IndexError, ValueError) as error:  # anybody can write a manifest
        return {"state": "damaged", **empty, "error": _short(error)}


def _claims(content: dict[str, Any]) -> dict[str, Any]:
    """Generator, actions and issuer of the active manifest."""
    manifest = content.get("manifests", {}).get(content.get("active_manifest"), {})
    actions = [
        {"action": action.get("action"), "source": (action.get("digitalSourceType") or "").rpartition("/")[2] or None}
        for assertion in manifest.get("assertions", [])
        if assertion.get("label", "").startswith("c2pa.actions")
        for action in assertion.get("data", {}).get("actions", [])
    ]
    generators = manifest.get("claim_generator_info") or [{"name": manifest.get("claim_generator")}]
    return {
        "generator": generators[0].get("name"),
        "actions": actions,
        "issuer": (manifest.get("signature_info") or {}).get("issuer"),
    }


def _short(value: Any) -> str:
    text = " ".join(str(value).replace("\x00", " ").split())
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."
