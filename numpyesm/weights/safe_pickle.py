"""Unpickle data from strangers: containers, numbers and text come out as they are, everything else as inert records.

`pickle.Unpickler` imports what a file names and calls it. Here `find_class` returns a class of our own for every name:
one that builds what the caller knows how to build (tensors), or a record of the name and of what it was called with
(`Inert`). Nothing named in a file is imported, looked up or called.

What pickle itself would do with hostile data is bounded before it begins. `_Inspector` reads the opcodes, with sizes in
place of values, and refuses what no checkpoint contains and what would take memory or time out of proportion: a memo
index of 2**31 (pickle allocates a table of that length), a key made of nested tuples (its hash takes exponential time,
or overflows the C stack), copies of copies.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from typing import Any

from ..errors import CheckpointError

# Ten times what a training checkpoint of the 650M model has. The dearest opcode, EMPTY_SET, allocates 216 bytes.
_MAX_OPCODES = 500_000
_MAX_NAMES = 1000  # different globals; each becomes a class, of about 1 kB
_MAX_INTEGER = 256 * 8  # bits; torch's random number generator state is a tensor
_MAX_KEY = 100  # size of a dict key or set member
_MAX_LARGE_KEYS = 1000  # of a size above 1: integers and tuples can be chosen to collide
# No checkpoint has out-of-band buffers, or codes of a registry in the process that wrote it.
_REFUSED = frozenset({"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"})
_CALLS = frozenset({"REDUCE", "NEWOBJ", "NEWOBJ_EX", "INST", "OBJ"})
_IN_PLACE = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
_KEYS = {  # which operands are hashed
    "SETITEM": slice(1, 2),
    "SETITEMS": slice(1, None, 2),
    "DICT": slice(0, None, 2),
    "ADDITEMS": slice(1, None),
    "FROZENSET": slice(0, None),
}


class Name(type):
    """The type of everything that `find_class` returns: a name in a file, which the file cannot change.

    Attributes
    ----------
    module, name : str
        As they stand in the file.
    """

    module: str = ""
    name: str = ""

    def __setstate__(cls, state: object) -> None:  # instead of attributes that BUILD would set on the class
        raise pickle.UnpicklingError("state is set on a class")

    def __str__(cls) -> str:
        return f"{cls.module}.{cls.name}"


class Inert(metaclass=Name):
    """What a pickle would have made by calling a class or a function: recorded, not done.

    The class of a record bears the name: `type(record).module`, `type(record).name`.

    Attributes
    ----------
    args : tuple
        What it would have been called with.
    state : object
        What would have been put into it, usually a dict of attributes.
    entries : dict
        Items set on it, if it would have been a mapping.
    """

    __slots__ = ("args", "entries", "state")

    args: tuple[Any, ...]
    state: Any
    entries: dict[Any, Any]

    def __new__(cls, /, *args: Any, **keywords: Any) -> Inert:
        record = super().__new__(cls)
        record.args = args
        record.state = None
        record.entries = keywords
        return record

    def __init__(self, /, *args: Any, **keywords: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.entries[key] = value

    def append(self, item: Any) -> None:
        """Drop the items of a list: nothing of interest is in one of an unknown class."""

    extend = add = append

    def __call__(self, /, *args: Any) -> Inert:  # what a call returned is called in turn
        return Inert(self, *args)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute or item by its name, as of a Namespace."""
        if isinstance(self.state, dict) and name in self.state:
            return self.state[name]
        return self.entries.get(name, default)

    def __repr__(self) -> str:  # without the arguments, which may be nested without end
        return f"<inert {type(self)}>"


class Dict(dict[Any, Any], metaclass=Name):
    """An OrderedDict or a defaultdict, as the dict that it is."""

    __slots__ = ()

    def __init__(self, /, *args: Any) -> None:  # of a defaultdict: its factory; the items follow
        if any(isinstance(arg, list | tuple | dict) for arg in args):
            raise pickle.UnpicklingError("a dict is built in the manner of Python 2")

    def __setstate__(self, state: object) -> None:
        """Drop attributes, such as the `_metadata` of a state dict."""


_DICTS: dict[tuple[str, str], Name] = {("collections", "OrderedDict"): Dict, ("collections", "defaultdict"): Dict}


def builder(build: Callable[..., Any]) -> Name:
    """Wrap a function so that a pickle can call it, with positional arguments, under any name."""
    return Name("Builder", (), {"__slots__": (), "__new__": lambda cls, /, *args: build(*args)})


def read_pickle(
    data: bytes,
    *,
    origin: str = "the pickle",
    builders: Mapping[tuple[str, str], Name] | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """The object in a pickle, of plain containers and `Inert` records.

    Containers may be nested deeply or contain themselves: walk them with a list of what is still to do, and neither
    hash, compare nor print values of unknown kind.

    Parameters
    ----------
    data : bytes
        Protocol 0 to 5.
    origin : str
        What to call the pickle in errors.
    builders : mapping of (module, name) to Name, optional
        What the caller builds; see `builder`.
    persistent_load : callable, optional
        Takes a persistent id; without it such a pickle is refused.

    Raises
    ------
    CheckpointError
        For anything that is not a whole, well-formed pickle, or builds what no checkpoint contains.
    """
    try:
        _Inspector(data).run()
        return _Unpickler(data, builders or {}, persistent_load).load()
    except CheckpointError:  # from a builder: it says what is wrong
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{origin} is damaged or not a pickle: {str(error)[:100]}") from error
    except Exception as error:  # pickle raises about anything for damaged data
        raise CheckpointError(f"{origin} is damaged or not a pickle ({type(error).__name__})") from error


class _Unpickler(pickle.Unpickler):
    def __init__(
        self,
        data: bytes,
        builders: Mapping[tuple[str, str], Name],
        persistent_load: Callable[[Any], Any] | None,
    ) -> None:
        super().__init__(io.BytesIO(data), encoding="latin-1")
        self._known = _DICTS | dict(builders)
        self._persistent_load = persistent_load

    def find_class(self, module: str, name: str) -> Name:
        known = self._known.get((module, name))
        if known is None:
            if len(self._known) > _MAX_NAMES:
                raise pickle.UnpicklingError("it names more functions and classes than any checkpoint")
            known = Name("Inert", (Inert,), {"__slots__": (), "module": module, "name": name})
            self._known[module, name] = known
        return known

    def persistent_load(self, identity: Any) -> Any:
        if self._persistent_load is None:
            raise pickle.UnpicklingError("it refers to data outside itself")
        return self._persistent_load(identity)


_Size = list[int]  # of one item, so that all references to a container see it grow
# Opcodes that take nothing from the stack and put one value on it: two thirds of any pickle.
_LITERALS = {
    opcode.name
    for opcode in pickletools.opcodes
    if not opcode.stack_before and len(opcode.stack_after) == 1 and not opcode.name.endswith("GET")
} - {"MARK"}


class _Inspector:
    """Go through a pickle's opcodes with the size of each value on the stack instead of the value.

    The size of a tuple is 1 and the sizes of its items, shared ones counted each time: how many steps its hash takes.
    Other containers cannot be hashed; their size is 1 and the number of their items. Text counts 1 for each kilobyte
    begun, an integer 1 for every 60 bits.
    """

    def __init__(self, data: bytes) -> None:
        self.data = data
        self.stack: list[_Size | None] = []  # None is a mark
        self.memo: dict[int, _Size] = {}
        self.copied = 0
        self.large_keys = 0

    def run(self) -> None:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(self.data)):
            if count > _MAX_OPCODES:
                raise pickle.UnpicklingError("it has more parts than any checkpoint")
            if opcode.name in _REFUSED:
                raise pickle.UnpicklingError(f"opcode {opcode.name} is not allowed")
            self.step(opcode, argument, count)

    def step(self, opcode: pickletools.OpcodeInfo, argument: Any, count: int) -> None:
        name = opcode.name
        if name in _LITERALS:
            self.stack.append([_size(argument)])
        elif name == "MARK":
            self.stack.append(None)
        elif name.endswith("GET"):
            self.stack.append(self.memo[argument])
        elif name.endswith("PUT") or name == "MEMOIZE":
            index = len(self.memo) if argument is None else argument
            if not 0 <= index <= count:
                raise pickle.UnpicklingError("a memo index is implausible")
            self.memo[index] = self.top()
        elif name == "DUP":
            self.stack.append(self.top())
        elif name == "POP" and self.stack and self.stack[-1] is None:
            self.stack.pop()
        else:
            self.operate(opcode)

    def operate(self, opcode: pickletools.OpcodeInfo) -> None:
        """Follow an opcode that takes values from the stack."""
        name = opcode.name
        operands = self.operands(opcode)
        if name in _KEYS:
            self.check_keys(operands[_KEYS[name]])
        if name in _CALLS:
            self.copied += sum(size for (size,) in operands)
            if self.copied > _MAX_OPCODES:
                raise pickle.UnpicklingError("it copies the same data over and over")
        if name in _IN_PLACE:
            operands[0][0] += len(operands) - 1
            self.stack.append(operands[0])
        elif opcode.stack_after:
            size = 1 + (sum(inner for (inner,) in operands) if "TUPLE" in name else len(operands))
            if size > _MAX_OPCODES:
                raise pickle.UnpicklingError("it builds much more than its size")
            self.stack.append([size])

    def top(self) -> _Size:
        if not self.stack or self.stack[-1] is None:
            raise pickle.UnpicklingError("its stack is empty")
        return self.stack[-1]

    def operands(self, opcode: pickletools.OpcodeInfo) -> list[_Size]:
        """Take what an opcode takes from the stack."""
        before = opcode.stack_before
        start = len(self.stack) - len(before)
        if pickletools.markobject in before:
            mark = next((i for i in range(len(self.stack) - 1, -1, -1) if self.stack[i] is None), -1)
            start = mark - before.index(pickletools.markobject)
            if mark >= 0:
                del self.stack[mark]
        taken = self.stack[max(start, 0) :]
        del self.stack[max(start, 0) :]
        operands = [size for size in taken if size is not None]
        if start < 0 or len(operands) < len(taken):
            raise pickle.UnpicklingError("its stack is empty, or a mark is missing")
        return operands

    def check_keys(self, keys: list[_Size]) -> None:
        for (size,) in keys:
            self.large_keys += size > 1
            if size > _MAX_KEY or self.large_keys > _MAX_LARGE_KEYS:
                raise pickle.UnpicklingError("a key is not allowed: it is a container, or far too long")


def _size(argument: Any) -> int:
    """The size of a literal."""
    if isinstance(argument, str | bytes | bytearray):
        return 1 + len(argument) // 1024
    if isinstance(argument, int):
        if argument.bit_length() > _MAX_INTEGER:
            raise pickle.UnpicklingError("a number is implausibly long")
        return 1 + argument.bit_length() // 60
    return 1
