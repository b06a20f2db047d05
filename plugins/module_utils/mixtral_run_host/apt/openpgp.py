"""Fingerprints of OpenPGP keys without gpg, which a minimal host lacks (RFC 9580, sections 4.2, 5.5.4 and 6.2)."""

from __future__ import annotations

import base64
import binascii
import hashlib

PUBLIC_KEY = 6


def primary_fingerprints(data):
    """Return the fingerprints (upper-case hex) of the primary keys in an armored or binary key file.

    Raise ValueError if it contains no supported public key.
    """
    found = [_fingerprint(body) for tag, body in _packets(_dearmored(data)) if tag == PUBLIC_KEY]
    if not found:
        raise ValueError("no OpenPGP public key in it")
    return found


def _dearmored(data):
    if b"-----BEGIN PGP PUBLIC KEY BLOCK-----" not in data:
        return data
    whole = b""
    for block in data.split(b"-----BEGIN PGP PUBLIC KEY BLOCK-----")[1:]:
        lines = block.split(b"-----END PGP")[0].replace(b"\r", b"").split(b"\n")
        blank = next((number for number, line in enumerate(lines[1:], 1) if not line.strip()), 0)
        body = [line.strip() for line in lines[blank + 1 :] if not line.startswith(b"=")]  # "=…" is the checksum
        try:
            whole += base64.b64decode(b"".join(body), validate=True)
        except binascii.Error as error:
            raise ValueError("the armor is damaged: {}".format(error)) from error
    return whole


def _packets(data):
    position = 0
    while position < len(data):
        first = data[position]
        if not first & 0x80:
            raise ValueError("not OpenPGP data")
        position += 1
        try:
            tag, length, position = _header(data, first, position)
        except IndexError as error:
            raise ValueError("the key is cut short") from error
        if position + length > len(data):
            raise ValueError("the key is cut short")
        yield tag, data[position : position + length]
        position += length


def _header(data, first, position):
    if first & 0x40:
        length = data[position]
        if length < 192:
            return first & 0x3F, length, position + 1
        if length < 224:
            return first & 0x3F, ((length - 192) << 8) + data[position + 1] + 192, position + 2
        if length == 255:
            return first & 0x3F, int.from_bytes(data[position + 1 : position + 5], "big"), position + 5
        raise ValueError("a key in parts is not supported")
    size = 1 << (first & 3)
    if size == 8:
        raise ValueError("a packet of unknown length is not supported")
    return (first >> 2) & 0xF, int.from_bytes(data[position : position + size], "big"), position + size


def _fingerprint(body):
    if body[0] == 4:
        return hashlib.sha1(b"\x99" + len(body).to_bytes(2, "big") + body).hexdigest().upper()
    if body[0] == 6:
        return hashlib.sha256(b"\x9b" + len(body).to_bytes(4, "big") + body).hexdigest().upper()
    raise ValueError("key version {} is not supported".format(body[0]))
