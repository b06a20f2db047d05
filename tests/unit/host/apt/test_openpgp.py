"""Fingerprints are compared with gpg's own."""

import base64
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest
from ansible.module_utils.mixtral_run_host.apt.openpgp import primary_fingerprints


def _gpg(home: Path, *words: str) -> bytes:
    return subprocess.run(["gpg", "--homedir", str(home), "--batch", *words], check=True, capture_output=True).stdout


@pytest.mark.skipif(not shutil.which("gpg"), reason="gpg is not installed")
@pytest.mark.parametrize("algorithm", ["rsa2048", "ed25519"])
def test_fingerprint_equals_gpgs(tmp_path: Path, algorithm: str) -> None:
    tmp_path.chmod(0o700)
    _gpg(tmp_path, "--passphrase", "", "--quick-generate-key", "someone", algorithm, "sign", "never")
    listing = _gpg(tmp_path, "--list-keys", "--with-colons").decode()
    expected = next(line.split(":")[9] for line in listing.splitlines() if line.startswith("fpr"))
    assert primary_fingerprints(_gpg(tmp_path, "--armor", "--export")) == [expected]
    assert primary_fingerprints(_gpg(tmp_path, "--export")) == [expected]


def _packet(body: bytes) -> bytes:
    return bytes([0x99]) + len(body).to_bytes(2, "big") + body  # old format, tag 6, length in two bytes


def test_every_primary_key_is_reported_so_that_a_second_one_cannot_hide() -> None:
    bodies = [bytes([4]) + text for text in (b"first", b"second")]
    expected = [hashlib.sha1(_packet(body)).hexdigest().upper() for body in bodies]
    assert primary_fingerprints(b"".join(_packet(body) for body in bodies)) == expected


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"<html>not found</html>",
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n!!!!\n-----END PGP PUBLIC KEY BLOCK-----",
        _packet(bytes([4]) + b"cut")[:-2],
        _packet(bytes([3]) + b"old"),
        b"-----BEGIN PGP PUBLIC KEY BLOCK-----\n\n" + base64.b64encode(bytes([0x99, 0])) + b"\n-----END PGP",
    ],
)
def test_what_is_not_a_key_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError):
        primary_fingerprints(data)


@pytest.mark.parametrize(
    ("header", "length"),
    [
        (bytes([0xC6, 191]), 191),
        (bytes([0xC6, 192, 0]), 192),
        (bytes([0xC6, 193, 5]), 192 + 256 + 5),
        (bytes([0xC6, 223, 255]), 8383),
        (bytes([0xC6, 255, 0, 0, 1, 2]), 258),
        (bytes([0xC6, 255, 0, 1, 0, 3]), 65539),
        (bytes([0x98, 9]), 9),
        (bytes([0x99, 1, 2]), 258),
        (bytes([0x9A, 0, 0, 1, 2]), 258),
    ],
)
def test_the_length_of_a_packet_in_each_form(header: bytes, length: int) -> None:
    """Of the new format one, two and five bytes; of the old one 1, 2 and 4. Another packet follows each key."""
    body = bytes([6]) + bytes(length - 1)
    expected = hashlib.sha256(b"\x9b" + length.to_bytes(4, "big") + body).hexdigest().upper()
    other = bytes([0xB4, 3]) + b"uid"  # tag 13, old format
    assert primary_fingerprints(other + header + body + other) == [expected]
    with pytest.raises(ValueError, match="cut short"):
        primary_fingerprints(header + body[:-1])


@pytest.mark.parametrize(
    ("data", "why"),
    [
        (bytes([0x9B, 1]), "unknown length"),
        (bytes([0xC6, 224]), "in parts"),
        (bytes([0xC6, 254]), "in parts"),
        (bytes([0xC6]), "cut short"),
        (bytes([0x7F, 1]), "not OpenPGP data"),
        (bytes([0x98, 1, 5]), "key version 5"),
    ],
)
def test_packets_that_are_refused(data: bytes, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        primary_fingerprints(data)


def test_armor_with_headers_and_several_blocks() -> None:
    bodies = [bytes([4]) + text for text in (b"first", b"second")]
    text = b""
    for number, body in enumerate(bodies):
        headers = b"Version: x\r\n\r\n" if number else b"\r\n"
        code = base64.b64encode(_packet(body))
        text += b"-----BEGIN PGP PUBLIC KEY BLOCK-----\r\n" + headers + code[:8] + b"\r\n" + code[8:] + b"\r\n=ABCD\r\n"
        text += b"-----END PGP PUBLIC KEY BLOCK-----\r\n"
    expected = [hashlib.sha1(_packet(body)).hexdigest().upper() for body in bodies]
    assert primary_fingerprints(text) == expected
