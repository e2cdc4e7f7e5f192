"""A pickle reader that builds plain data and runs nothing.

`pickle.Unpickler` imports what a file names and calls it: a checkpoint from anywhere could run any command. This is a
small machine of our own for the same opcodes. It knows numbers, strings and containers. A global is only a record of
its name, and what a file would have called is only a record of that call (`Inert`), save for the few names that the
caller or `_PLAIN` builds with own code. Nothing named in a file is ever imported, looked up or called.

Hostile input ends in a CheckpointError after time and memory linear in the input: sizes are checked against the bytes
that are left, the memo is a dict, nothing recurses into nested values, and only keys of flat types are hashed (the hash
of a nested tuple takes exponential time).
"""

from __future__ import annotations

import codecs
import struct
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from ..errors import CheckpointError

# What may be built: so many bytes whatever the pickle's size (650M needs 1.5 MB), and four times its size.
_FREE_ROOM = 3 << 20
_ROOM_PER_BYTE = 4
_MAX_NUMBER_BYTES = 256  # of one integer: longer ones are no data, only slow


class Global(NamedTuple):
    """The name of a function or class in a pickle; a name and nothing else."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


class Inert:
    """What a pickle would have made by calling a global: recorded, not done.

    Attributes
    ----------
    function : Global or Inert
        What would have been called.
    args : tuple
        What it would have been called with.
    state : object
        What would have been put into it, usually its attributes.
    entries : dict
        Items set on it, if it would have been a mapping.
    """

    __slots__ = ("args", "entries", "function", "state")

    def __init__(self, function: Global | Inert, args: tuple[Any, ...]) -> None:
        self.function = function
        self.args = args
        self.state: Any = None
        self.entries: dict[Any, Any] = {}

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute or item by its name, as for a Namespace."""
        if isinstance(self.state, dict) and name in self.state:
            return self.state[name]
        return self.entries.get(name, default)

    def __repr__(self) -> str:  # not the arguments: they may be nested without end
        return f"<inert {self.function}>" if isinstance(self.function, Global) else "<inert>"


Builder = Callable[[tuple[Any, ...]], Any]


def read_pickle(
    data: bytes,
    *,
    origin: str = "the pickle",
    builders: Mapping[Global, Builder] | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """The object in a pickle, as plain containers, `Global` and `Inert` records.

    Parameters
    ----------
    data : bytes
        Protocol 0 to 5.
    origin : str
        What to call the pickle in errors.
    builders : mapping of Global to callable, optional
        Globals that are built by the caller's code: each takes the tuple of arguments from the file.
    persistent_load : callable, optional
        Takes a persistent id; without it such a pickle is refused.

    Raises
    ------
    CheckpointError
        For anything that is not a whole, well-formed pickle.
    """
    machine = _Machine(bytes(data), builders or {}, persistent_load)
    try:
        return machine.run()
    except _Bad as error:
        raise CheckpointError(f"{origin} is damaged or not a pickle: {error}") from error
    except (ValueError, LookupError, TypeError, OverflowError, struct.error, RecursionError, MemoryError) as error:
        if isinstance(error, CheckpointError):  # from a builder: it says what is wrong
            raise
        raise CheckpointError(f"{origin} is damaged or not a pickle ({type(error).__name__})") from error


class _Bad(Exception):
    """What is wrong with a pickle."""


class _Stop(Exception):
    pass


class _Machine:
    def __init__(
        self, data: bytes, builders: Mapping[Global, Builder], persistent_load: Callable[[Any], Any] | None
    ) -> None:
        self.data = data
        self.position = 0
        self.builders = builders
        self.persistent_load = persistent_load
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []  # the stacks below each open mark
        self.memo: dict[int, Any] = {}
        # A memoised list can be copied by every few bytes of input: all copies together stay below the input's size.
        self.copies_left = len(data)
        self.room = _FREE_ROOM + _ROOM_PER_BYTE * len(data)

    def run(self) -> Any:
        data, size = self.data, len(self.data)
        try:
            while self.position < size:
                opcode = data[self.position]
                self.position += 1
                operation = _OPERATIONS.get(opcode)
                if operation is None:
                    raise _Bad(f"byte {opcode:#04x} at {self.position - 1} is no opcode that is allowed here")
                self.room -= _ROOM_OF.get(opcode, 40)
                if self.room < 0:
                    raise _Bad("it builds much more than its size")
                operation(self)
        except _Stop:
            return self.pop()
        raise _Bad("it ends in the middle (truncated?)")

    # Input

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.position:
            raise _Bad("it ends in the middle (truncated?)")
        piece = self.data[self.position : self.position + count]
        self.position += count
        return piece

    def number(self, code: str) -> int:
        value: int = struct.unpack(code, self.take(struct.calcsize(code)))[0]
        if value < 0:
            raise _Bad("a length is negative")
        return value

    def line(self) -> bytes:
        end = self.data.find(b"\n", self.position)
        if end < 0:
            raise _Bad("it ends in the middle (truncated?)")
        piece = self.data[self.position : end]
        self.position = end + 1
        return piece

    def short_line(self) -> str:
        line = self.line()
        if len(line) > _MAX_NUMBER_BYTES:
            raise _Bad("a number is implausibly long")
        return line.decode("ascii")

    def counted(self, code: str) -> bytes:
        return self.take(self.number(code))

    # Stack

    def push(self, value: Any) -> None:
        self.stack.append(value)

    def pop(self) -> Any:
        if not self.stack:
            raise _Bad("its stack is empty")
        return self.stack.pop()

    def top(self) -> Any:
        if not self.stack:
            raise _Bad("its stack is empty")
        return self.stack[-1]

    def mark(self) -> None:
        self.marks.append(self.stack)
        self.stack = []

    def pop_mark(self) -> list[Any]:
        if not self.marks:
            raise _Bad("a mark is missing")
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def pop_tuple(self) -> tuple[Any, ...]:
        value = self.pop()
        if not isinstance(value, tuple):
            raise _Bad("arguments are not a tuple")
        return value

    def pop_text(self) -> str:
        value = self.pop()
        if not isinstance(value, str):
            raise _Bad("a name is not a string")
        return value

    # Memo

    def put(self, index: int) -> None:
        if index < 0:
            raise _Bad("a memo index is negative")
        self.memo[index] = self.top()

    def get(self, index: int) -> None:
        if index not in self.memo:
            raise _Bad("it refers to something that is not there")
        self.push(self.memo[index])

    # Containers

    def fill(self, target: Any, items: list[Any]) -> None:
        """Keys and values in turn into a dict, or into the record of one."""
        if len(items) % 2:
            raise _Bad("a key has no value")
        entries = target.entries if isinstance(target, Inert) else target
        if not isinstance(entries, dict):
            raise _Bad("items are set on something that is not a dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            entries[_key(key)] = value

    def extend(self, target: Any, items: list[Any]) -> None:
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Inert):  # what an inert list would have held is of no use
            raise _Bad("items are appended to something that is not a list")

    def add(self, items: list[Any]) -> None:
        target = self.top()
        if not isinstance(target, set):
            raise _Bad("items are added to something that is not a set")
        target.update(_key(item) for item in items)

    # Globals: recorded, never looked up

    def call(self, function: Any, args: tuple[Any, ...]) -> Any:
        if isinstance(function, Global):
            if function in self.builders:
                return self.builders[function](args)
            if function in _PLAIN:
                self.copies_left -= sum(len(arg) for arg in args if isinstance(arg, list | tuple | str | dict | set))
                if self.copies_left < 0:
                    raise _Bad("it copies the same data over and over")
                return _PLAIN[function](args)
        elif not isinstance(function, Inert):
            raise _Bad("something is called that is not a function")
        return Inert(function, args)

    def build(self) -> None:
        state, target = self.pop(), self.top()
        if isinstance(target, Inert):
            target.state = state
        elif isinstance(target, Global):
            raise _Bad("state is set on a global")
        # Attributes of a plain object, as `_metadata` of a state dict, are dropped.

    def instantiate(self) -> None:
        items = self.pop_mark()
        if not items:
            raise _Bad("a class is missing")
        self.push(self.call(items[0], tuple(items[1:])))

    def instantiate_named(self) -> None:
        function = self.global_lines()
        self.push(self.call(function, tuple(self.pop_mark())))

    def global_lines(self) -> Global:
        module = self.line().decode("utf-8")
        return Global(module, self.line().decode("utf-8"))

    def global_stack(self) -> Global:
        name = self.pop_text()
        return Global(self.pop_text(), name)

    def reduce(self) -> None:
        args = self.pop_tuple()
        self.push(self.call(self.pop(), args))

    def new_with_keywords(self) -> None:
        keywords, args = self.pop(), self.pop_tuple()
        record = Inert(self._class(self.pop()), args)
        if isinstance(keywords, dict):
            record.entries = keywords
        self.push(record)

    @staticmethod
    def _class(value: Any) -> Global | Inert:
        if not isinstance(value, Global | Inert):
            raise _Bad("something is called that is not a class")
        return value

    def persistent(self, identity: Any) -> None:
        if self.persistent_load is None:
            raise _Bad("it refers to data outside itself")
        self.push(self.persistent_load(identity))

    # The less obvious literals

    def integer_line(self) -> None:
        text = self.short_line()
        self.push({"00": False, "01": True}[text] if text in ("00", "01") else int(text))

    def long_line(self) -> None:
        self.push(int(self.short_line().removesuffix("L")))

    def long_bytes(self, code: str) -> None:
        size = self.number(code)
        if size > _MAX_NUMBER_BYTES:
            raise _Bad("a number is implausibly long")
        self.push(int.from_bytes(self.take(size), "little", signed=True))

    def string_line(self) -> None:
        line = self.line().strip()
        if len(line) < 2 or line[:1] not in (b"'", b'"') or line[-1:] != line[:1]:
            raise _Bad("a string is not quoted")
        self.push(codecs.escape_decode(line[1:-1])[0].decode("latin-1"))

    def small_tuple(self, count: int) -> None:
        if len(self.stack) < count:
            raise _Bad("its stack is empty")
        items = tuple(self.stack[-count:])
        del self.stack[-count:]
        self.push(items)

    def set_item(self) -> None:
        value, key = self.pop(), self.pop()
        self.fill(self.top(), [key, value])

    def append(self) -> None:
        value = self.pop()
        self.extend(self.top(), [value])

    def set_items(self) -> None:
        items = self.pop_mark()
        self.fill(self.top(), items)

    def append_items(self) -> None:
        items = self.pop_mark()
        self.extend(self.top(), items)

    def add_items(self) -> None:
        items = self.pop_mark()
        self.add(items)

    def dict_from_mark(self) -> None:
        items, result = self.pop_mark(), dict[Any, Any]()
        self.fill(result, items)
        self.push(result)

    def discard(self) -> None:
        if self.stack:
            self.stack.pop()
        else:
            self.pop_mark()

    def discard_mark(self) -> None:
        self.pop_mark()

    def frame(self) -> None:
        if self.number("<Q") > len(self.data) - self.position:
            raise _Bad("it ends in the middle (truncated?)")

    def protocol(self) -> None:
        version = self.number("<B")
        if version > 5:
            raise _Bad(f"protocol {version} is unknown")

    def stop(self) -> None:
        raise _Stop


def _key(value: Any) -> Any:
    """A dict key or set member that hashes in constant time and cannot be made to collide."""
    if isinstance(value, str | bytes | float | bool | Global | Inert) or value is None:
        return value
    if isinstance(value, int) and abs(value) < 1 << 60:  # beyond, integers that collide can be chosen freely
        return value
    raise _Bad(f"a key of type {type(value).__name__} is not allowed")


def _plain_dict(args: tuple[Any, ...]) -> dict[Any, Any]:
    if not args:
        return {}
    if len(args) != 1 or not isinstance(args[0], list | tuple | dict):
        raise _Bad("a dict is made of something else than pairs")
    pairs = list(args[0].items()) if isinstance(args[0], dict) else args[0]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise _Bad("a dict is made of something else than pairs")
    return {_key(key): value for key, value in pairs}


def _items(args: tuple[Any, ...]) -> list[Any]:
    if not args:
        return []
    if len(args) != 1 or not isinstance(args[0], list | tuple | set | frozenset):
        raise _Bad("a container is made of something else than items")
    return list(args[0])


def _encoded(args: tuple[Any, ...]) -> bytes:
    # How protocols below 3 write bytes.
    if len(args) != 2 or not isinstance(args[0], str) or args[1] != "latin1":
        raise _Bad("bytes are encoded in an unknown way")
    return args[0].encode("latin-1")


_PLAIN: dict[Global, Builder] = {
    Global("collections", "OrderedDict"): _plain_dict,
    Global("collections", "defaultdict"): lambda args: {},  # its factory is not wanted; items follow
    Global("torch", "Size"): lambda args: tuple(_items(args)),
    Global("_codecs", "encode"): _encoded,
    **{
        Global(module, name): build
        for module in ("builtins", "__builtin__")
        for name, build in (
            ("bytes", lambda args: _encoded(("".join(args), "latin1"))),  # empty ones, below protocol 3
            ("dict", _plain_dict),
            ("list", _items),
            ("tuple", lambda args: tuple(_items(args))),
            ("set", lambda args: {_key(item) for item in _items(args)}),
            ("frozenset", lambda args: frozenset(_key(item) for item in _items(args))),
        )
    },
}


# What an opcode adds to memory, roughly, beside the bytes that it copies: an empty dict has 64, with its first item
# 232; a memo entry or an item of a dict up to 100.
_ROOM_OF: dict[int, int] = {
    ord(code): size
    for codes, size in (
        ("NO()tK\x88\x89ghj01.", 12),
        ("}d", 72),
        ("]l", 64),
        ("\x8f\x91", 232),
        ("(", 80),
        ("sue\x90", 230),
        ("c\x93RobiPQ\x81\x92", 260),
        ("qrp\x94", 120),
        ("XTUVS\x8c\x8d\x8aL", 72),
    )
    for code in codes
}


def _text(data: bytes) -> str:
    return data.decode("utf-8", "surrogatepass")


# Opcodes by their byte. Absent, so refused: EXT1, EXT2, EXT4 (a registry of code), NEXT_BUFFER, READONLY_BUFFER.
_OPERATIONS: dict[int, Callable[[_Machine], None]] = {
    ord(code): operation
    for code, operation in {
        "\x80": _Machine.protocol,
        "\x95": _Machine.frame,
        ".": _Machine.stop,
        "(": _Machine.mark,
        "0": _Machine.discard,
        "1": _Machine.discard_mark,
        "2": lambda m: m.push(m.top()),
        # numbers and constants
        "N": lambda m: m.push(None),
        "\x88": lambda m: m.push(True),
        "\x89": lambda m: m.push(False),
        "I": _Machine.integer_line,
        "J": lambda m: m.push(struct.unpack("<i", m.take(4))[0]),
        "K": lambda m: m.push(m.number("<B")),
        "M": lambda m: m.push(m.number("<H")),
        "L": _Machine.long_line,
        "\x8a": lambda m: m.long_bytes("<B"),
        "\x8b": lambda m: m.long_bytes("<i"),
        "F": lambda m: m.push(float(m.short_line())),
        "G": lambda m: m.push(struct.unpack(">d", m.take(8))[0]),
        # strings and bytes
        "S": _Machine.string_line,
        "T": lambda m: m.push(m.counted("<i").decode("latin-1")),
        "U": lambda m: m.push(m.counted("<B").decode("latin-1")),
        "V": lambda m: m.push(m.line().decode("raw-unicode-escape")),
        "X": lambda m: m.push(_text(m.counted("<I"))),
        "\x8c": lambda m: m.push(_text(m.counted("<B"))),
        "\x8d": lambda m: m.push(_text(m.counted("<Q"))),
        "B": lambda m: m.push(m.counted("<I")),
        "C": lambda m: m.push(m.counted("<B")),
        "\x8e": lambda m: m.push(m.counted("<Q")),
        "\x96": lambda m: m.push(m.counted("<Q")),
        # containers
        "}": lambda m: m.push({}),
        "]": lambda m: m.push([]),
        ")": lambda m: m.push(()),
        "\x8f": lambda m: m.push(set()),
        "d": _Machine.dict_from_mark,
        "l": lambda m: m.push(m.pop_mark()),
        "t": lambda m: m.push(tuple(m.pop_mark())),
        "\x85": lambda m: m.small_tuple(1),
        "\x86": lambda m: m.small_tuple(2),
        "\x87": lambda m: m.small_tuple(3),
        "\x91": lambda m: m.push(frozenset(_key(item) for item in m.pop_mark())),
        "s": _Machine.set_item,
        "u": _Machine.set_items,
        "a": _Machine.append,
        "e": _Machine.append_items,
        "\x90": _Machine.add_items,
        # memo
        "p": lambda m: m.put(int(m.short_line())),
        "q": lambda m: m.put(m.number("<B")),
        "r": lambda m: m.put(m.number("<I")),
        "\x94": lambda m: m.put(len(m.memo)),
        "g": lambda m: m.get(int(m.short_line())),
        "h": lambda m: m.get(m.number("<B")),
        "j": lambda m: m.get(m.number("<I")),
        # globals and what they would be used for
        "c": lambda m: m.push(m.global_lines()),
        "\x93": lambda m: m.push(m.global_stack()),
        "R": _Machine.reduce,
        "\x81": _Machine.reduce,
        "\x92": _Machine.new_with_keywords,
        "b": _Machine.build,
        "o": _Machine.instantiate,
        "i": _Machine.instantiate_named,
        "P": lambda m: m.persistent(m.line().decode("utf-8")),
        "Q": lambda m: m.persistent(m.pop()),
    }.items()
}
