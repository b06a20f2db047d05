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
