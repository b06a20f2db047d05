"""Load the pickles of a torch_dist checkpoint without running anything that they ask for.

A pickle may name any function and have it called, and a checkpoint or adapter may come from anybody. This is the only
module of the kit that loads pickles (tests/unit/test_pickle_audit.py): `.metadata` through an unpickler that builds the
classes of such a file and nothing else, tensors through `torch.load(weights_only=True)`.
"""

from __future__ import annotations

import io
import pickle
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch.distributed.checkpoint.metadata import Metadata

UnpicklingError = pickle.UnpicklingError


class DisallowedGlobalError(pickle.UnpicklingError):
    """A pickle names a function or class that has no place in a checkpoint. It was not called."""

    def __init__(self, name: str) -> None:
        # The pickle's own text, which must not steer the terminal.
        name = name[:200] if name.isprintable() else ascii(name[:200])
        super().__init__(f"it asks to call {name}, which has no place in a checkpoint; nothing of it was run")
        self.name = name


class ByteOrderError(pickle.UnpicklingError):
    """The elements of a file of torch.save are not little-endian."""


_SAFE = {
    "torch": {"Size", "bfloat16", "float16", "float32", "float64", "int64", "int32", "uint8", "bool", "float8_e4m3fn"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "collections": {"OrderedDict"},
    "builtins": {"set", "frozenset"},
}
_MOST_BYTES = 2**26
"""Size of the largest `.metadata` file that is read; one of a thousand tensors has about 200 KB."""
_ZIP_MAGIC = b"PK\x03\x04"
_LONGEST_BYTE_ORDER = 16
"""Bytes of the largest entry that is read as the name of a byte order, `little` or `big`."""
_DEEPEST_TUPLE = 8
"""Python recurses into nested tuples without a limit, so that deep ones would end the process."""


class _Ignored:
    """Stand-in for the classes that only Megatron's own caching needs."""

    def __init__(self, *_: Any) -> None:
        pass


def _enum_member(owner: Any, name: str) -> Any:
    """Stand in for `getattr`, as which Python 3.11.0 to 3.11.3 pickle an enum's member; refuse other attributes."""
    if owner is _Ignored:
        return _Ignored()
    if isinstance(owner, type) and issubclass(owner, Enum) and type(name) is str:
        return owner[name]
    raise DisallowedGlobalError(f"getattr({_named(owner)})")


def _layout(name: str) -> Any:
    """Stand in for torch's function of this purpose: return the layout of this name."""
    from torch.serialization import _get_layout

    if type(name) is not str:
        raise UnpicklingError("the name of a layout is not a text")
    return _get_layout(name)


def _path(*parts: str) -> PurePosixPath:
    """Stand in for the classes of paths: return one that cannot reach a file system."""
    return PurePosixPath(*parts)


_STAND_INS: dict[tuple[str, str], Any] = {
    ("builtins", "getattr"): _enum_member,
    ("torch.serialization", "_get_layout"): _layout,
    **{("pathlib", name): _path for name in ("PosixPath", "Path", "PurePosixPath")},
    **{("pathlib._local", name): _path for name in ("PosixPath", "Path", "PurePosixPath")},
}


class MetadataUnpickler(pickle._Unpickler):
    """Build what a `.metadata` file holds; raise DisallowedGlobalError at the first name that has no place in one.

    Derives from the unpickler in Python, so that each instruction of a pickle can be restricted: classes and functions
    are never changed, only what `find_class` returned is called, and nothing is hashed whose hash takes long.
    """

    dispatch: ClassVar[dict[int, Callable[[Any], None]]] = dict(pickle._Unpickler.dispatch)
    stack: list[Any]
    append: Callable[[Any], None]
    pop_mark: Callable[[], list[Any]]

    def __init__(self, stream: IO[bytes]) -> None:
        content = stream.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UnpicklingError(f"it is larger than {_MOST_BYTES:,} bytes")
        super().__init__(io.BytesIO(content))
        self._callables: list[Any] = []
        # Each tuple is kept as well, so that its id is not given to another.
        self._depths: dict[int, tuple[Any, int]] = {}

    def find_class(self, module: str, name: str) -> Any:
        """Return the class that a pickle names."""
        found = self._find(module, name)
        if callable(found) and not any(found is each for each in self._callables):
            self._callables.append(found)
        return found

    def _find(self, module: str, name: str) -> Any:
        if module.startswith("megatron."):
            return _Ignored
        if (module, name) in _STAND_INS:
            return _STAND_INS[module, name]
        if name in _SAFE.get(module, ()):
            return super().find_class(module, name)
        if module in ("torch.distributed.checkpoint.metadata", "torch.distributed.checkpoint.planner"):
            found = super().find_class(module, name)
            if isinstance(found, type) and found.__module__ == module:
                return found
        raise DisallowedGlobalError(f"{module}.{name}")

    def _call(self) -> None:
        """Call a class or a stand-in with the arguments on the stack (REDUCE and NEWOBJ)."""
        arguments = self.stack.pop()
        function = self.stack.pop()
        if not any(function is each for each in self._callables):
            raise DisallowedGlobalError(_named(function))
        if type(arguments) is not tuple:
            raise UnpicklingError("the arguments of a call are not a tuple")
        if function in (set, frozenset):
            for each in arguments:
                if type(each) not in (list, set, tuple):
                    raise UnpicklingError("a set is made of something else than a list")
                _check_keys(each)
        elif function is OrderedDict and arguments:
            raise UnpicklingError("a dict is made in an unusual way")
        elif isinstance(function, type) and issubclass(function, Enum):
            _check_keys(arguments)
        self.append(function(*arguments))

    def _new(self) -> None:
        """Make an object of a class without calling its constructor, as pickles do (NEWOBJ)."""
        arguments, owner = self.stack[-1], self.stack[-2]
        if isinstance(owner, type) and is_dataclass(owner) and arguments == ():
            del self.stack[-2:]
            self.append(object.__new__(owner))
        else:
            self._call()

    def _build(self) -> None:
        """Set an object's fields (BUILD); the object has to be one that the pickle has made."""
        state = self.stack.pop()
        target = self.stack[-1]
        if type(target) is _Ignored:
            return
        if isinstance(target, type) or not is_dataclass(target):
            raise DisallowedGlobalError(f"setattr({_named(target)})")
        if hasattr(target, "__setstate__"):
            target.__setstate__(state)
            return
        if type(state) is not dict:
            raise DisallowedGlobalError(f"setattr({_named(target)})")
        names = {field.name for field in fields(target)}
        # A newer torch may have added fields, which nothing here reads.
        vars(target).update({name: value for name, value in state.items() if name in names})

    def _tuple(self, items: Sequence[Any]) -> None:
        depth = 1 + max((self._depths[id(each)][1] for each in items if id(each) in self._depths), default=0)
        if depth > _DEEPEST_TUPLE:
            raise UnpicklingError(f"tuples are nested more than {_DEEPEST_TUPLE} deep")
        made = tuple(items)
        if made:
            self._depths[id(made)] = (made, depth)
        self.append(made)

    def _tuple_of(self, count: int) -> None:
        items = self.stack[-count:]
        del self.stack[-count:]
        self._tuple(items)

    def _set_items(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if type(target) not in (dict, OrderedDict):
            raise DisallowedGlobalError(f"setitem({_named(target)})")
        keys = items[::2]
        _check_keys(keys)
        target.update(zip(keys, items[1::2], strict=True))

    def _dict(self) -> None:
        items = self.pop_mark()
        self.append({})
        self._set_items(items)

    def _set_item(self) -> None:
        items = self.stack[-2:]
        del self.stack[-2:]
        self._set_items(items)

    def _add(self, items: list[Any], method: str) -> None:
        target = self.stack[-1]
        if type(target) is not {"extend": list, "update": set}[method]:
            raise DisallowedGlobalError(f"{method}({_named(target)})")
        if method == "update":
            _check_keys(items)
        getattr(target, method)(items)

    def _frozen(self) -> None:
        items = self.pop_mark()
        _check_keys(items)
        self.append(frozenset(items))

    def _refuse(self) -> None:
        raise UnpicklingError("it has an instruction that no checkpoint needs")

    dispatch[pickle.REDUCE[0]] = _call
    dispatch[pickle.NEWOBJ[0]] = _new
    dispatch[pickle.BUILD[0]] = _build
    dispatch[pickle.TUPLE[0]] = lambda self: self._tuple(self.pop_mark())
    dispatch[pickle.TUPLE1[0]] = lambda self: self._tuple_of(1)
    dispatch[pickle.TUPLE2[0]] = lambda self: self._tuple_of(2)
    dispatch[pickle.TUPLE3[0]] = lambda self: self._tuple_of(3)
    dispatch[pickle.DICT[0]] = _dict
    dispatch[pickle.SETITEM[0]] = _set_item
    dispatch[pickle.SETITEMS[0]] = lambda self: self._set_items(self.pop_mark())
    dispatch[pickle.APPEND[0]] = lambda self: self._add([self.stack.pop()], "extend")
    dispatch[pickle.APPENDS[0]] = lambda self: self._add(self.pop_mark(), "extend")
    dispatch[pickle.ADDITEMS[0]] = lambda self: self._add(self.pop_mark(), "update")
    dispatch[pickle.FROZENSET[0]] = _frozen
    for _code in (
        *(pickle.INST, pickle.OBJ, pickle.NEWOBJ_EX, pickle.PERSID, pickle.BINPERSID, pickle.BYTEARRAY8),
        *(pickle.EXT1, pickle.EXT2, pickle.EXT4, pickle.NEXT_BUFFER, pickle.READONLY_BUFFER),
    ):
        dispatch[_code[0]] = _refuse


def _named(value: Any) -> str:
    """Return the name of a class or function, else of the value's class; a repr may be of any length."""
    return str(getattr(value, "__name__", type(value).__name__))


_PLAIN = (str, int, type(None), bool, float, bytes)


def _check_keys(keys: Iterable[Any]) -> None:
    """Refuse keys of a dict or members of a set whose hash could take long."""
    from torch.distributed.checkpoint.metadata import MetadataIndex

    for key in keys:
        parts: Iterable[Any] = (key,)
        if type(key) is MetadataIndex:
            parts = (key.fqn, *(key.offset if isinstance(key.offset, (tuple, bytes)) else (key.offset,)))
        elif isinstance(key, tuple):
            parts = key
        if any(type(part) not in _PLAIN for part in parts):
            raise UnpicklingError(f"a {type(key).__name__} of other objects is a key")


def load_metadata(stream: IO[bytes]) -> Metadata:
    """Return the Metadata that a `.metadata` file holds.

    Raises DisallowedGlobalError for a pickle that would run something; a damaged one raises any exception.
    """
    metadata: Metadata = MetadataUnpickler(stream).load()
    return metadata


def load_tensor(stream: IO[bytes], device: str) -> object:
    """Return what torch.save wrote, on this device; `meta` loads everything but the elements.

    Raises DisallowedGlobalError for a pickle that would run something, UnpicklingError for another that torch refuses.
    """
    import torch

    if device == "meta":
        _check_byte_order(stream)
    try:
        return torch.load(stream, map_location=device, weights_only=True)
    except pickle.UnpicklingError as error:
        raise in_own_words(error) from None


def load_without_elements(file: Path) -> object:
    """Return what torch.save wrote, with tensors that have no elements but know where these begin in the file.

    Raises DisallowedGlobalError for a pickle that would run something, UnpicklingError for another that torch refuses.
    """
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode

    with file.open("rb") as stream:
        _check_byte_order(stream)
    try:
        # Tensors of this mode have no elements; torch.load then records where their storages begin in the file.
        with FakeTensorMode():
            return torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise in_own_words(error) from None


def _check_byte_order(stream: IO[bytes]) -> None:
    """Raise ByteOrderError for a zip whose elements are not little-endian.

    torch would swap the bytes of elements that it does not read, which ends the process. What is no zip by its first
    bytes has no such entry for torch.
    """
    start = stream.tell()
    if stream.read(len(_ZIP_MAGIC)) == _ZIP_MAGIC:
        with zipfile.ZipFile(stream) as archive:
            for each in archive.infolist():
                if not each.filename.endswith("byteorder"):
                    continue
                # An entry that is compressed may be of any size when it is decompressed.
                short = max(each.file_size, each.compress_size) <= _LONGEST_BYTE_ORDER
                if each.compress_type != zipfile.ZIP_STORED or not short or archive.read(each) != b"little":
                    raise ByteOrderError("its byte order is not little-endian")
    stream.seek(start)


def in_own_words(error: Exception) -> Exception:
    """Return an error of torch.load without torch's advice to load the file with weights_only=False."""
    if not isinstance(error, pickle.UnpicklingError) or isinstance(error, DisallowedGlobalError):
        return error
    found = re.search(r"\bGLOBAL ([\w.]+)", str(error))
    if found is not None:
        return DisallowedGlobalError(found[1])
    return pickle.UnpicklingError("its pickle holds more than a tensor, or is damaged")
