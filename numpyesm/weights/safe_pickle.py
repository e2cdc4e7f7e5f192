"""Unpickle untrusted data: containers, numbers and text come out as they are, everything else as inert records.

`pickle.Unpickler` imports what a file names and calls it. Here `find_class` returns a class of our own for every name:
one that builds what the caller knows how to build (tensors), or a record of the name (`Inert`). Nothing named in a file
is imported, looked up or called.

What pickle itself would do with hostile data is bounded before it begins: `_inspect` reads the opcodes and refuses what
no checkpoint contains and what would take memory or time out of proportion: a memo index of 2**31 (pickle allocates a
table of that length), a key made of nested tuples (its hash takes exponential time, or overflows the C stack).
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping, Sized
from typing import Any

from ..errors import CheckpointError

# Ten times what a training checkpoint of the 650M model has. The most expensive opcode, EMPTY_SET, allocates 216 bytes.
_MAX_OPCODES = 500_000
_MAX_NAMES = 1000  # different globals; each becomes a class, of about 1 kB
_MAX_ARGUMENTS = 100  # of a call, which copies them
_MAX_INTEGER = 256 * 8  # bits; torch's random number generator state is a tensor
_MAX_KEY = 100  # steps that the hash of a dict key or set member takes
_MAX_LARGE_KEYS = 1000  # of more than one step: integers and tuples can be chosen to collide
# No checkpoint has out-of-band buffers, or codes of a registry in the process that wrote it.
_REFUSED = frozenset({"EXT1", "EXT2", "EXT4", "NEXT_BUFFER", "READONLY_BUFFER"})
_IN_PLACE = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})
_KEYS = {  # which operands are hashed
    "SETITEM": slice(1, 2),
    "SETITEMS": slice(1, None, 2),
    "DICT": slice(0, None, 2),
    "ADDITEMS": slice(1, None),
    "FROZENSET": slice(0, None),
}


class Name(type):
    """The type of everything that `find_class` returns: a name in a file, which the file cannot change."""

    module: str = ""
    name: str = ""

    def __setstate__(cls, state: object) -> None:  # instead of attributes that BUILD would set on the class
        raise pickle.UnpicklingError("state is set on a class")

    def __str__(cls) -> str:
        return f"{cls.module}.{cls.name}"


class Inert(metaclass=Name):
    """What a pickle would have made by calling a class or a function: not done, and the arguments dropped.

    The class of a record bears the name: `type(record).module`, `type(record).name`.
    """

    __slots__ = ("entries", "state")

    state: Any  # usually a dict of attributes
    entries: dict[Any, Any]  # keywords, and items set on it

    def __new__(cls, /, *args: Any, **keywords: Any) -> Inert:
        _check_few(args)
        _check_few(keywords)
        record = super().__new__(cls)
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
        return Inert(*args)

    def get(self, name: str, default: Any = None) -> Any:
        """An attribute or item by its name, as of a Namespace."""
        if isinstance(self.state, dict) and name in self.state:
            return self.state[name]
        return self.entries.get(name, default)

    def __repr__(self) -> str:  # without its content, which may be nested without end
        return f"<inert {type(self)}>"


class Dict(dict[Any, Any], metaclass=Name):
    """An OrderedDict or a defaultdict, as the dict that it is."""

    __slots__ = ()

    def __init__(self, /, *args: Any) -> None:  # of a defaultdict: its factory; the items follow
        if len(args) > 1 or any(isinstance(arg, list | tuple | dict) for arg in args):
            raise pickle.UnpicklingError("a dict is built in the manner of Python 2")

    def __setstate__(self, state: object) -> None:
        """Drop attributes, such as the `_metadata` of a state dict."""


Builders = Mapping[tuple[str, str], Name]  # by module and name
_DICTS: dict[tuple[str, str], Name] = {("collections", "OrderedDict"): Dict, ("collections", "defaultdict"): Dict}


def builder(build: Callable[..., Any]) -> Name:
    """Wrap a function so that a pickle can call it, with positional arguments, under any name."""

    def make(cls: Name, /, *args: Any) -> Any:
        _check_few(args)
        return build(*args)

    return Name("Builder", (), {"__slots__": (), "__new__": make})


def _check_few(arguments: Sized) -> None:
    if len(arguments) > _MAX_ARGUMENTS:
        raise pickle.UnpicklingError("it calls with more arguments than any checkpoint")


def read_pickle(
    data: bytes,
    *,
    origin: str = "the pickle",
    builders: Builders | None = None,
    persistent_load: Callable[[Any], Any] | None = None,
) -> Any:
    """The object in a pickle, of plain containers and `Inert` records.

    Containers may be nested deeply or contain themselves: walk them with a list of what is still to do, and neither
    hash, compare nor print values of unknown kind. CheckpointError for anything that is not a whole, well-formed pickle
    of protocol 0 to 5, or builds what no checkpoint contains; it calls the pickle `origin`.

    `builders` are made by `builder`. `persistent_load` takes a persistent id; without it such a pickle is refused.
    """
    try:
        _inspect(data)
        return _Unpickler(data, builders or {}, persistent_load).load()
    except CheckpointError:  # from a builder: it says what is wrong
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{origin} is damaged or not a pickle: {str(error)[:100]}") from error
    except Exception as error:  # pickle raises almost anything for damaged data
        raise CheckpointError(f"{origin} is damaged or not a pickle ({type(error).__name__})") from error


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, builders: Builders, persistent_load: Callable[[Any], Any] | None) -> None:
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


def _inspect(data: bytes) -> None:
    """Refuse a pickle by its opcodes.

    In place of each value, the stack holds how many steps its hash takes: 1 for each kilobyte of text or 60 bits of an
    integer begun, the sum of its items for a tuple, shared ones counted each time.
    """
    stack: list[int | None] = []  # None is a mark
    memo: dict[int, int | None] = {}
    large_keys = 0
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if count > _MAX_OPCODES or name in _REFUSED:
            raise pickle.UnpicklingError(f"it has more parts than any checkpoint, or unusual ones ({name})")
        if name == "MARK":
            stack.append(None)
        elif name == "DUP":
            stack.append(stack[-1])
        elif name.endswith("GET"):
            stack.append(memo[int(argument or 0)])
        elif name.endswith("PUT") or name == "MEMOIZE":
            index = len(memo) if argument is None else argument
            if not 0 <= index <= count:
                raise pickle.UnpicklingError("a memo index is implausible")
            memo[index] = stack[-1]
        else:
            operands = _operands(stack, opcode)
            keys = operands[_KEYS[name]] if name in _KEYS else []
            large_keys += sum(key > 1 for key in keys)
            if max(keys, default=0) > _MAX_KEY or large_keys > _MAX_LARGE_KEYS:
                raise pickle.UnpicklingError("a key is not allowed: it is a container, or far too long")
            if name in _IN_PLACE:
                stack.append(operands[0])
            elif opcode.stack_after:
                steps = 1 if name in ("LIST", "DICT") else _steps(argument) + sum(operands)
                if steps > _MAX_OPCODES:
                    raise pickle.UnpicklingError("it builds much more than its size")
                stack.append(steps)


def _operands(stack: list[int | None], opcode: pickletools.OpcodeInfo) -> list[int]:
    """Take what an opcode takes from the stack."""
    before = opcode.stack_before
    start = len(stack) - len(before)
    if pickletools.markobject in before:
        mark = next(i for i in range(len(stack) - 1, -1, -1) if stack[i] is None)
        start = mark - before.index(pickletools.markobject)
    if start < 0:
        raise pickle.UnpicklingError("its stack is empty")
    taken = stack[start:]
    del stack[start:]
    return [steps for steps in taken if steps is not None]


def _steps(argument: Any) -> int:
    """How many steps the hash of a literal takes."""
    if isinstance(argument, str | bytes | bytearray):
        return 1 + len(argument) // 1024
    if isinstance(argument, int):
        if argument.bit_length() > _MAX_INTEGER:
            raise pickle.UnpicklingError("a number is implausibly long")
        return 1 + argument.bit_length() // 60
    return 1
