"""What does a pickle say, when it may not do anything? Reads the pickles of torch without running them.

A pickle is a program, and the usual reader runs whatever it names. This one is a small machine of its own that knows
the opcodes which checkpoints are made of, calls nothing but the objects that the caller lists, and cannot be made to
reserve more memory than the file is long, or to hash what would not end. (CPython's reader with an allow-list of
globals is not enough: a memo index of 2^32 takes 64 GiB from it, and BUILD lets it set attributes of allowed classes.)

Source of the opcodes: the comments of CPython's pickletools, protocols 2 to 5. Those that neither torch.save nor
torch.distributed.checkpoint writes (sets, text integers, extensions, buffers, INST, OBJ) are not implemented.
"""

from __future__ import annotations

import gc
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from reshard.errors import FormatError

MOST_BYTES = 64 * 2**20  # a state dict of 1,000 tensors is a pickle of 150 KB

_SCALARS = (str, int, bool, bytes, float, type(None))
_SHOWN = 120  # characters of a foreign name in an error
_U32, _U64, _I32, _F64 = (struct.Struct(f) for f in ("<I", "<Q", "<i", ">d"))


def loads(
    data: bytes | BinaryIO,
    allowed: Mapping[tuple[str, str], object],
    persistent_load: Callable[[Any], Any] | None = None,
    *,
    path: Path | str = "",
    most_bytes: int = MOST_BYTES,
) -> Any:
    """Which object does this pickle describe? Runs nothing but the callables in `allowed`.

    allowed: (module, name) as written in the pickle -> what stands for it here: a class, a function or a constant.
    persistent_load: gets each persistent id (torch's storages), returns what stands for it.
    path: only for the errors.
    Raises FormatError: a name that is not allowed (as module.name), a damaged pickle, more than `most_bytes`.
    """
    if not isinstance(data, bytes):
        data = data.read(most_bytes + 1)
    if len(data) > most_bytes:
        raise FormatError(
            f"{_named(path)}has a pickle of more than {most_bytes:,} bytes, no plain checkpoint needs that", path=path
        )
    return _Machine(data, allowed, persistent_load, path).run()


def _named(path: Path | str) -> str:
    return f"{path}: " if str(path) else ""


class Members:
    """Stands for an enum class, whose members come by their values, or as Python 3.11.0 to 3.11.3 pickle them.

    These write `getattr(class, name)`. Nothing else is ever done with `builtins.getattr`. values: of the members, by name.
    """

    def __init__(self, **values: Any) -> None:
        self.values = values

    def __call__(self, value: Any) -> Any:
        """The member of a value: here the value itself, which may be a later version's."""
        return value


_GETATTR = object()  # what a pickle gets for `builtins.getattr`, where it may name members of some enum at all


class _DamagedError(Exception):
    """The opcodes do not fit each other."""


class _Machine:
    """One pickle on its way to an object: a stack, the stacks below the marks, and the memo."""

    def __init__(
        self,
        data: bytes,
        allowed: Mapping[tuple[str, str], object],
        persistent_load: Callable[[Any], Any] | None,
        path: Path | str,
    ) -> None:
        self.data, self.at = data, 0
        self.allowed, self.persistent_load, self.path = allowed, persistent_load, path
        self.callables = {id(value) for value in allowed.values() if callable(value)}
        self.classes = {value for value in allowed.values() if isinstance(value, type)}
        self.enums = {id(value) for value in allowed.values() if isinstance(value, Members)}
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: list[Any] = []

    def run(self) -> Any:
        collecting = gc.isenabled()
        gc.disable()  # it would walk through the growing object over and over: three quarters of the time
        try:
            return self._run()
        except FormatError:
            raise
        except _DamagedError as e:
            raise self._damaged(str(e)) from None
        except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError, struct.error) as e:
            reason = "it ends early" if self.at >= len(self.data) else f"{type(e).__name__} from what it holds"
            raise self._damaged(reason) from e
        finally:
            if collecting:
                gc.enable()

    def _run(self) -> Any:
        data, memo, operations, at = self.data, self.memo, _OPERATIONS, 0
        try:
            while True:
                opcode = data[at]
                at += 1
                # These few are two thirds of every pickle, so they are done right here.
                if opcode == _MEMOIZE:
                    memo.append(self.stack[-1])
                elif opcode == _BINGET:
                    self.stack.append(memo[data[at]])
                    at += 1
                elif opcode == _LONG_BINGET:
                    self.stack.append(memo[int.from_bytes(data[at : at + 4], "little")])
                    at += 4
                elif opcode == _BININT1:
                    self.stack.append(data[at])
                    at += 1
                elif opcode == _BININT2:
                    self.stack.append(data[at] | data[at + 1] << 8)
                    at += 2
                elif opcode == _EMPTY_TUPLE:
                    self.stack.append(())
                elif opcode == _STOP:
                    return self.stack.pop()
                else:
                    operation = operations[opcode]
                    if operation is None:
                        raise _DamagedError(f"opcode 0x{opcode:02x} is not one that checkpoints use")
                    self.at = at
                    operation(self)
                    at = self.at
        finally:
            self.at = max(self.at, at)  # where it stopped, for the error

    def _damaged(self, reason: str) -> FormatError:
        return FormatError(f"{_named(self.path)}the pickle is damaged at byte {self.at}: {reason}", path=self.path)

    # -- reading the operands

    def take(self, size: int) -> bytes:
        start, self.at = self.at, self.at + size
        if self.at > len(self.data):
            raise _DamagedError(f"{size:,} bytes are announced, {len(self.data) - start:,} are left")
        return self.data[start : self.at]

    def byte(self) -> int:
        self.at += 1
        return self.data[self.at - 1]

    def unpack(self, form: struct.Struct) -> Any:
        (value,) = form.unpack_from(self.data, self.at)
        self.at += form.size
        return value

    def line(self) -> str:
        end = self.data.index(b"\n", self.at)
        text = self.data[self.at : end].decode("utf-8")
        self.at = end + 1
        return text

    def to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    # -- the operations

    def proto(self) -> None:
        version = self.byte()
        if not 2 <= version <= 5:
            raise _DamagedError(f"protocol {version}, expected 2 to 5")

    def frame(self) -> None:
        self.at += 8  # frames are a hint for readers of streams, we have all of it

    def mark(self) -> None:
        self.below.append(self.stack)
        self.stack = []

    def memoize(self, index: int) -> None:
        if index > len(self.data):
            raise _DamagedError(f"memo {index:,} cannot be in use")
        while len(self.memo) <= index:  # writers number from 0 without gaps, a tidied pickle may have some
            self.memo.append(None)
        self.memo[index] = self.stack[-1]

    def text(self, size: int) -> None:
        self.stack.append(self.take(size).decode("utf-8", "surrogatepass"))

    def long1(self) -> None:
        self.stack.append(int.from_bytes(self.take(self.byte()), "little", signed=True))

    def tuple_of(self, count: int) -> None:
        if len(self.stack) < count:
            raise _DamagedError("a tuple has fewer items than announced")
        self.stack[-count:] = [tuple(self.stack[-count:])]

    def marked_tuple(self) -> None:
        items = self.to_mark()
        self.stack.append(tuple(items))

    def append(self) -> None:
        item = self.stack.pop()
        self._list().append(item)

    def appends(self) -> None:
        items = self.to_mark()
        self._list().extend(items)

    def _list(self) -> list[Any]:
        target = self.stack[-1]
        if type(target) is not list:
            raise _DamagedError("items are appended to what is not a list")
        return target

    def setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self._dict()[key if type(key) is str else self._key(key)] = value

    def setitems(self) -> None:
        items = self.to_mark()
        if len(items) % 2:
            raise _DamagedError("a dict has a key without a value")
        target = self._dict()
        for key, value in zip(items[::2], items[1::2], strict=True):
            target[key if type(key) is str else self._key(key)] = value

    def _dict(self) -> dict[Any, Any]:
        target = self.stack[-1]
        if not isinstance(target, dict):
            raise _DamagedError("keys are set in what is not a dict")
        return target

    def _key(self, key: Any) -> Any:
        """Only flat keys: the hash of a deep tuple takes for ever, or overflows the C stack."""
        if _is_flat(key):
            return key
        if type(key) in self.classes and all(map(_is_flat, vars(key).values())):
            return key
        raise _DamagedError("a dict has a key that is not plain")

    def global_(self) -> None:
        self.stack.append(self._find(self.line(), self.line()))

    def stack_global(self) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        self.stack.append(self._find(module, name))

    def _find(self, module: Any, name: Any) -> object:
        if type(module) is not str or type(name) is not str:
            raise _DamagedError("a global is named by what is not text")
        if (module, name) in self.allowed:
            return self.allowed[module, name]
        if (module, name) == ("builtins", "getattr") and self.enums:
            return _GETATTR
        raise self._refused(f"{module}.{name}")

    def _refused(self, name: str) -> FormatError:
        return FormatError(
            f"{_named(self.path)}the pickle asks for `{name[:_SHOWN]}`, which is not part of a plain "
            "checkpoint; nothing of it was run",
            path=self.path,
            hint="if you trust the file, load it where it was made and save its tensors alone: "
            "torch.save({name: tensor, ...}, path)",
        )

    def _member(self, arguments: Any) -> Any:
        """The member of an enum, from the arguments of `getattr`."""
        if type(arguments) is tuple and len(arguments) == 2 and id(arguments[0]) in self.enums:
            cls, name = arguments
            if type(name) is str and name in cls.values:
                return cls.values[name]
        raise self._refused("builtins.getattr")

    def reduce(self) -> None:
        arguments, function = self.stack.pop(), self.stack.pop()
        if function is _GETATTR:
            self.stack.append(self._member(arguments))
            return
        if id(function) not in self.callables:
            raise _DamagedError("something is called that is not a function")
        if type(arguments) is not tuple or (arguments and isinstance(function, type) and issubclass(function, dict)):
            raise _DamagedError("a function is called with what are not its arguments")
        self.stack.append(function(*arguments))

    def newobj(self) -> None:
        arguments, cls = self.stack.pop(), self.stack.pop()
        if not isinstance(cls, type) or cls not in self.classes or type(arguments) is not tuple:
            raise _DamagedError("an instance is made of what is not a class")
        self.stack.append(cls.__new__(cls, *arguments))

    def build(self) -> None:
        state, instance = self.stack.pop(), self.stack[-1]
        cls = type(instance)
        if cls not in self.classes:  # a class itself is never built on: that would change it for everybody
            raise _DamagedError("a state is set on what is not an instance")
        if hasattr(cls, "__setstate__"):
            instance.__setstate__(state)
        elif type(state) is dict:
            instance.__dict__.update(state)
        else:
            raise _DamagedError("the state of an instance is not a dict")

    def persid(self) -> None:
        if self.persistent_load is None:
            raise _DamagedError("it refers to data outside of itself")
        self.stack.append(self.persistent_load(self.stack.pop()))


def _is_flat(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(type(item) in _SCALARS for item in value)
    return type(value) in _SCALARS


_STOP, _MEMOIZE, _BINGET, _LONG_BINGET = ord("."), 0x94, ord("h"), ord("j")
_BININT1, _BININT2, _EMPTY_TUPLE = ord("K"), ord("M"), ord(")")


def _table() -> list[Callable[[_Machine], None] | None]:
    """opcode -> operation, but for those that `_run` does itself; None where checkpoints have no use for it."""
    table: list[Callable[[_Machine], None] | None] = [None] * 256

    def put(opcode: int, operation: Callable[[_Machine], None]) -> None:
        table[opcode] = operation

    put(0x80, _Machine.proto)
    put(0x95, _Machine.frame)
    put(ord("("), _Machine.mark)
    # constants
    put(ord("N"), lambda m: m.stack.append(None))
    put(0x88, lambda m: m.stack.append(True))
    put(0x89, lambda m: m.stack.append(False))
    put(ord("J"), lambda m: m.stack.append(m.unpack(_I32)))
    put(0x8A, _Machine.long1)
    put(ord("G"), lambda m: m.stack.append(m.unpack(_F64)))
    put(0x8C, lambda m: m.text(m.byte()))
    put(ord("X"), lambda m: m.text(m.unpack(_U32)))
    put(0x8D, lambda m: m.text(m.unpack(_U64)))
    put(ord("C"), lambda m: m.stack.append(m.take(m.byte())))
    put(ord("B"), lambda m: m.stack.append(m.take(m.unpack(_U32))))
    put(0x8E, lambda m: m.stack.append(m.take(m.unpack(_U64))))
    # containers
    put(0x85, lambda m: m.tuple_of(1))
    put(0x86, lambda m: m.tuple_of(2))
    put(0x87, lambda m: m.tuple_of(3))
    put(ord("t"), _Machine.marked_tuple)
    put(ord("]"), lambda m: m.stack.append([]))
    put(ord("a"), _Machine.append)
    put(ord("e"), _Machine.appends)
    put(ord("}"), lambda m: m.stack.append({}))
    put(ord("s"), _Machine.setitem)
    put(ord("u"), _Machine.setitems)
    # the memo
    put(ord("q"), lambda m: m.memoize(m.byte()))
    put(ord("r"), lambda m: m.memoize(m.unpack(_U32)))
    # names and instances
    put(ord("c"), _Machine.global_)
    put(0x93, _Machine.stack_global)
    put(ord("R"), _Machine.reduce)
    put(0x81, _Machine.newobj)
    put(ord("b"), _Machine.build)
    put(ord("Q"), _Machine.persid)
    return table


_OPERATIONS = _table()
