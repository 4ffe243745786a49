"""What files carry: metadata of pictures and videos, and Content Credentials, whole, changed and absent."""

from __future__ import annotations

import datetime

import numpy as np
import pytest
from masm_detect.casework.media import c2pa_claims, media_facts
from PIL import Image
from trained_runs import write_rgb
from video_files import encode_video


def test_metadata_of_pictures(tmp_path):
    image = Image.fromarray(np.full((40, 60, 3), 127, np.uint8))
    exif = Image.Exif()
    exif[0x0131] = "Some editor 3"
    image.save(tmp_path / "a.jpg", exif=exif, quality=40)
    facts = media_facts(tmp_path / "a.jpg", "image")
    assert facts["metadata"] == {"EXIF Software": "Some editor 3"} and facts["jpeg_quality"] == 40
    assert (facts["width"], facts["height"], facts["format"]) == (60, 40, "JPEG")
    damaged = tmp_path / "damaged.jpg"
    damaged.write_bytes(b"\xff\xd8\xff\xe0")
    assert media_facts(damaged, "image")["width"] is None


def test_facts_of_videos(tmp_path):
    facts = media_facts(encode_video(tmp_path / "v.mp4", 25), "video")
    assert (facts["codec"], facts["width"], facts["height"]) == ("h264", 64, 48)
    assert facts["seconds"] == pytest.approx(1, abs=0.05)
    # the packets are nearly all of this file
    assert facts["bits_per_pixel"] == pytest.approx(8 * facts["bytes"] / (64 * 48 * 25), rel=0.2)


def certificates():
    """A certificate for signing with that of its issuer, PEM, and the key."""
    x509 = pytest.importorskip("cryptography.x509", reason="certificates for the test need cryptography")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    issuer_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    now = datetime.datetime.now(datetime.timezone.utc)
    uses = (
        "content_commitment",
        "key_encipherment",
        "data_encipherment",
        "key_agreement",
        "encipher_only",
        "decipher_only",
    )

    def certificate(name, public, is_issuer):
        names = [
            x509.Name(
                [x509.NameAttribute(kind, n) for kind in (x509.NameOID.COMMON_NAME, x509.NameOID.ORGANIZATION_NAME)]
            )
            for n in (name, "Test issuer")
        ]
        usage = x509.KeyUsage(
            digital_signature=True, key_cert_sign=is_issuer, crl_sign=is_issuer, **dict.fromkeys(uses, False)
        )
        builder = (
            x509.CertificateBuilder(names[1], names[0], public, x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(1))
            .not_valid_after(now + datetime.timedelta(1))
            .add_extension(x509.BasicConstraints(ca=is_issuer, path_length=None), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
        )
        if not is_issuer:
            purpose = x509.ExtendedKeyUsage([x509.ExtendedKeyUsageOID.EMAIL_PROTECTION])
            builder = builder.add_extension(purpose, critical=True)
        return builder.sign(issuer_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    chain = certificate("Test signer", key.public_key(), False) + certificate(
        "Test issuer", issuer_key.public_key(), True
    )
    plain = serialization.NoEncryption()
    return chain, key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, plain)


def test_content_credentials(tmp_path, seed):
    c2pa = pytest.importorskip("c2pa", reason="Content Credentials need c2pa-python")
    pixels = np.random.default_rng(seed).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    plain = write_rgb(tmp_path / "plain.jpg", pixels)
    assert c2pa_claims(plain)["state"] == "none"
    assert c2pa_claims(encode_video(tmp_path / "v.mp4", 3))["state"] == "none"
    assert c2pa_claims(write_rgb(tmp_path / "a.bmp", pixels))["state"] == "none"

    source = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
    actions = [{"action": "c2pa.created", "digitalSourceType": source}]
    manifest = {
        "claim_generator_info": [{"name": "a generator", "version": "1"}],
        "format": "image/jpeg",
        "assertions": [{"label": "c2pa.actions", "data": {"actions": actions}}],
    }
    chain, key = certificates()
    signer = c2pa.Signer.from_info(c2pa.C2paSignerInfo(alg=b"es256", sign_cert=chain, private_key=key, ta_url=None))
    signed = tmp_path / "signed.jpg"
    with open(plain, "rb") as old, open(signed, "w+b") as new:
        c2pa.Builder(manifest).sign(signer, "image/jpeg", old, new)
    claims = c2pa_claims(signed)
    assert (claims["state"], claims["generator"], claims["issuer"]) == ("Valid", "a generator", "Test signer")
    assert claims["actions"] == [{"action": "c2pa.created", "source": "trainedAlgorithmicMedia"}]

    data = bytearray(signed.read_bytes())
    data[-60] ^= 255  # a pixel
    (tmp_path / "changed.jpg").write_bytes(data)
    assert c2pa_claims(tmp_path / "changed.jpg")["state"] == "Invalid"
