"""A reader of what an ELF shared library asks of the system: undefined symbols and needed libraries."""

from __future__ import annotations

import struct
from collections.abc import Iterator

_SHT_DYNAMIC, _SHT_DYNSYM = 6, 11
_DT_NEEDED = 1
_WEAK = 2


def undefined_symbols(image: bytes) -> set[str]:
    """Names that the library takes from others; weak ones, which may stay undefined, are left out."""
    wide = image[4] == 2
    layout = "<IBBHQQ" if wide else "<IIIBBH"  # name, info, other, section, value, size / name, value, size, info, ...
    names = set()
    for data, strings in _sections(image, _SHT_DYNSYM):
        for fields in struct.iter_unpack(layout, data):
            info, section = (fields[1], fields[3]) if wide else (fields[3], fields[5])
            if section == 0 and fields[0] and info >> 4 != _WEAK:
                names.add(_text(strings, fields[0]))
    return names


def needed_libraries(image: bytes) -> set[str]:
    """File names of the libraries that the loader must find."""
    layout = "<QQ" if image[4] == 2 else "<II"
    return {
        _text(strings, value)
        for data, strings in _sections(image, _SHT_DYNAMIC)
        for tag, value in struct.iter_unpack(layout, data)
        if tag == _DT_NEEDED
    }


def _sections(image: bytes, kind: int) -> Iterator[tuple[bytes, bytes]]:
    """(contents, contents of the linked string table) of every section of a kind; little-endian, 32 or 64 bits."""
    if image[:4] != b"\x7fELF" or image[5] != 1:
        raise ValueError("not a little-endian ELF file")
    if image[4] == 2:
        (table,) = struct.unpack_from("<Q", image, 40)
        size, count = struct.unpack_from("<HH", image, 58)
        layout = "<IIQQQQIIQQ"  # name, type, flags, address, offset, size, link, ...
    else:
        (table,) = struct.unpack_from("<I", image, 32)
        size, count = struct.unpack_from("<HH", image, 46)
        layout = "<10I"
    headers = [struct.unpack_from(layout, image, table + i * size) for i in range(count)]
    for header in headers:
        if header[1] == kind:
            strings = headers[header[6]]
            yield image[header[4] : header[4] + header[5]], image[strings[4] : strings[4] + strings[5]]


def _text(strings: bytes, start: int) -> str:
    return strings[start : strings.index(b"\0", start)].decode()
