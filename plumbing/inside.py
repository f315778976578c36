"""What runs inside the two sandboxes of a verdict: `examine` in one, `serve_program` in the other (see sandbox.py).

Values go between them as lines of text, which the reader builds anew from plain types. So what a program returns has
no say in how it is compared. Starting is most of what a verdict costs, hence this file imports nothing slow: `posix`
is the part of `os` that is built in, and `typing` alone would cost more than Python's own start.
"""

from __future__ import annotations

import builtins
import posix
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from typing import IO, Any

MAX_MESSAGE = 1 << 23  # characters of one message
MAX_ERROR = 1000  # characters that are kept of an error
MAX_PROCESSES = 16  # processes and threads of a sandbox
MAX_FILE = 1 << 24  # bytes of one file


# Values as lines ------------------------------------------------------------------------------------------------------
PLAIN: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {  # letter: type, to text, from text
    "i": (int, lambda value: f"{int(value):x}", lambda text: int(text, 16)),
    "r": (float, float.hex, float.fromhex),
    "c": (complex, complex.__repr__, complex),
    "s": (
        str,
        lambda value: str.encode(value, "utf-8", "surrogatepass").hex(),
        lambda text: bytes.fromhex(text).decode("utf-8", "surrogatepass"),
    ),
    "b": (bytes, bytes.hex, bytes.fromhex),
}
CONTAINERS = {"l": list, "t": tuple, "e": set, "z": frozenset, "d": dict}
SINGLE = {"None": None, "True": True, "False": False}


def write_value(value: Any, lines: list[str], keep: Callable[[Any], int]) -> list[str]:
    """Add a value to `lines`. What is no plain value is a number by which keep() knows it.

    >>> write_value({"a": (1, None)}, [], keep=id)
    ['d1', 't2', 's61', 't2', 'i1', 'vNone']
    """
    if value is None or value is True or value is False:
        lines.append(f"v{value}")
        return lines
    for letter, (kind, write, _) in PLAIN.items():
        if isinstance(value, kind):
            lines.append(letter + write(value))
            return lines
    for letter, container in CONTAINERS.items():
        if isinstance(value, container):
            lines.append(f"{letter}{len(value)}")
            for part in value.items() if container is dict else value:
                write_value(part, lines, keep)
            return lines
    is_built_in = isinstance(value, type) and vars(builtins).get(value.__name__) is value
    lines.append(f"k{value.__name__}" if is_built_in else f"o{keep(value)}")
    return lines


def read_value(lines: Iterator[str], find: Callable[[int], Any]) -> Any:
    """What write_value() has written; find() says what the number of a kept object stands for. Raises ValueError and
    others for what it has not written.

    >>> read_value(iter(['d1', 't2', 's61', 't2', 'i1', 'vNone']), find=id)
    {'a': (1, None)}
    """
    line = next(lines)
    letter, text = line[:1], line[1:]
    if letter == "v":
        return SINGLE[text]
    if letter == "o":
        return find(int(text))
    if letter == "k" and isinstance(vars(builtins)[text], type):
        return vars(builtins)[text]
    if letter in PLAIN:
        return PLAIN[letter][2](text)
    return CONTAINERS[letter]([read_value(lines, find) for _ in range(int(text))])


def send(pipe: IO[str], value: Any, keep: Callable[[Any], int]) -> None:
    pipe.write("\n".join([*write_value(value, [], keep), ".\n"]))
    pipe.flush()


def receive(pipe: IO[str], find: Callable[[int], Any]) -> Any:
    """The next message. Raises EOFError where there is none, or one that is too long."""
    lines, size = [], 0
    while (line := pipe.readline(MAX_MESSAGE)) != ".\n":
        size += len(line)
        if not line or size > MAX_MESSAGE:
            raise EOFError("the program said too much" if line else "the program ended before its tests")
        lines.append(line[:-1])
    return read_value(iter(lines), find)


# The program's side ---------------------------------------------------------------------------------------------------
def load(given: str, program: str, names: list[str]) -> dict[str, Any]:
    """Run the program -> those of the names that it defines."""
    module = sys.modules["solution"] = type(sys)("solution")
    for text in (given, program):
        exec(compile(text, "solution", "exec", dont_inherit=True), module.__dict__)
    return {name: module.__dict__[name] for name in names if name in module.__dict__}


OPERATIONS: dict[str, Callable[..., Any]] = {  # what a test can do with what the program defines or returns
    "load": load,
    "call": lambda function, args, options: function(*args, **options),
    "getattr": getattr,
    "setattr": setattr,
    "bool": bool,
    "str": str,
    "len": len,
    "iter": iter,
    "next": next,
    "getitem": lambda value, key: value[key],
    "setitem": lambda value, key, part: value.__setitem__(key, part),
}


def serve_program(requests: IO[str], replies: IO[str]) -> None:
    """Answer requests by (True, value, the arguments if they were changed) or (False, exception's name, message)."""
    kept: list[Any] = []  # what is no plain value stays here

    def keep(value: Any) -> int:
        kept.append(value)
        return len(kept) - 1

    while True:
        name, *args = receive(requests, kept.__getitem__)
        try:
            before = write_value(args, [], id)
            value = OPERATIONS[name](*args)
            changed = args if write_value(args, [], id) != before else None
            send(replies, (True, value, changed), keep)
        except BaseException as error:  # noqa: BLE001  SystemExit, too: whatever the program raises is its answer
            send(replies, (False, type(error).__name__, str(error)), keep)


# The tests' side ------------------------------------------------------------------------------------------------------
class Remote:
    """Something of the program's: a function, a class, an object. It is used through requests, and equals nothing but
    itself, whatever the program says."""

    def __init__(self, number: int, ask: Callable[..., Any]) -> None:
        self.__dict__.update(_number=number, _ask=ask)

    def __call__(self, *args: Any, **options: Any) -> Any:
        return self._ask("call", self, args, options)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("getattr", self, name)

    def __repr__(self) -> str:
        return "<an object of the program's>"


for operation in list(OPERATIONS)[3:]:
    setattr(Remote, f"__{operation}__", lambda self, *args, its=operation: self._ask(its, self, *args))


def update(argument: Any, changed: Any) -> None:
    """Do to a test's argument what the program has done to its copy."""
    if isinstance(argument, tuple):
        for part, changed_part in zip(argument, changed, strict=True):
            update(part, changed_part)
    elif isinstance(argument, list):
        argument[:] = changed
    elif isinstance(argument, dict | set):
        argument.clear()
        argument.update(changed)


def number_of(value: Any) -> int:
    if isinstance(value, Remote):
        return value._number
    raise TypeError(f"a test can pass plain values and the program's own objects, not a {type(value).__name__}")


def examine(requests: IO[str], replies: IO[str], case: IO[str], verdict: IO[str]) -> None:
    """Run the tests, in order, against a program in the other sandbox. Writes "loaded", "passed" after each test, and
    then the nonce; or, where something fails, "failed" and the error, and no more."""
    given, program, names, setup, tests, nonce = receive(case, id)
    last: list[Any] = []  # what the program returned, if a call was the last request

    def ask(name: str, *args: Any) -> Any:
        last.clear()
        send(requests, (name, *args), number_of)
        succeeded, *reply = receive(replies, lambda number: Remote(number, ask))
        if succeeded is True:
            value, changed = reply
            if name == "call":
                last.append(value)
            if changed is not None:
                update(args, tuple(changed))
            return value
        kind = getattr(builtins, reply[0], None)
        # StopIteration from a call would end a map() of the test's before it has seen all
        if isinstance(kind, type) and issubclass(kind, Exception) and (kind is not StopIteration or name == "next"):
            raise kind(reply[1])
        raise RuntimeError(f"{reply[0]}: {reply[1]}")

    space: dict[str, Any] = {"__name__": "tests"}
    try:
        found = ask("load", given, program, names)
        space |= {name: found[name] for name in names if name in found}  # and no other, such as __builtins__ or abs
        print("loaded", file=verdict, flush=True)
        for text in (given, setup):
            exec(compile(text, "setup", "exec", dont_inherit=True), space)
        for test in tests:
            exec(compile(test, "test", "exec", dont_inherit=True), space)
            print("passed", file=verdict, flush=True)
        print(nonce, file=verdict, flush=True)
    except BaseException as error:  # noqa: BLE001  whatever ends a test before its end
        said = str(error) or (f"the last call returned {last[0]!r}" if last else "")
        line = f"{type(error).__name__}: {said}".removesuffix(": ")[:MAX_ERROR]
        print("failed", line.encode("utf-8", "replace").hex(), file=verdict, flush=True)


# Both -----------------------------------------------------------------------------------------------------------------
def main(role: str, seconds: int, memory: int, user: int, *pipes: int) -> None:
    """Begin with nothing but limits and the pipes. memory: bytes. user: to become, 0 to stay the same."""
    import resource

    said, told = open(posix.dup(0)), open(posix.dup(1), "w")  # noqa: SIM115
    null = posix.open("/dev/null", posix.O_RDWR)
    for number in range(3):
        posix.dup2(null, number)
    for what, limit in (
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_CPU, seconds + 1),
        (resource.RLIMIT_FSIZE, MAX_FILE),
        (resource.RLIMIT_NPROC, MAX_PROCESSES),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(what, (limit, limit))
    if user:
        posix.setgroups([])
        posix.setresgid(user, user, user)
        posix.setresuid(user, user, user)
    try:
        if role == "program":
            serve_program(said, told)
        else:
            examine(open(pipes[0], "w"), open(pipes[1]), said, told)  # noqa: SIM115
    finally:
        posix._exit(0)  # Python's own way out takes a tenth of a verdict
