"""What devices send each other, read from the text of a compiled program.

A loop's body counts as often as its condition says. A collective's `sent` is what each
device of its group has to send, by the best algorithm on a ring: of n devices, (n - 1)
parts of n of what is gathered, scattered or exchanged, twice that of what is summed.
TPUs sum onto shards in functions called all-reduce-scatter, whose sum is of all shards.
"""

import collections
import dataclasses
import functools
import math
import re
from collections.abc import Iterator

import numpy as np

KINDS = (
    *("all-reduce", "reduce-scatter", "all-gather", "all-to-all"),
    "collective-permute",
)
SCATTER = "all-reduce-scatter"
BITS = {"pred": 8, "f8e4m3fn": 8, "f8e5m2": 8, "bf16": 16}  # others end in their bits

Array = tuple[str, tuple[int, ...]]  # type and shape

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\) -> .*\{\s*$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*?) ([a-z][\w\-]*)\((.*)$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")
_NAME = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:calls|to_apply|body|called_computations)=\{?(%[\w.\-, %]+)")
_BRANCHES = re.compile(r"(?:branch|true|false)_computations?=\{?(%[\w.\-, %]+)")


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program: what results, among whom, how many times a call.

    `groups` are positions in the program's order of devices, in one array or as pairs
    of sender and receiver; empty where the text leaves them open: all devices.
    """

    kind: str
    results: tuple[Array, ...]
    groups: tuple[tuple[int, ...], ...]
    times: int

    @property
    def bytes(self) -> int:
        """Give the size of one result on one device."""
        return sum(math.prod(shape) * bits(kind) for kind, shape in self.results) // 8

    def sent(self, devices: int) -> float:
        """Give the bytes that one of `devices` sends in all calls of it."""
        n = len(self.groups[0]) if self.groups else devices
        each = {
            "all-reduce": 2 * (n - 1) / n,
            "reduce-scatter": n - 1,
            "collective-permute": 1,
        }.get(self.kind, (n - 1) / n)
        return self.times * self.bytes * each


def bits(kind: str) -> int:
    """Give the size of an element of a type as programs write it."""
    return BITS.get(kind) or int(re.search(r"\d+", kind)[0])


def collectives(program: str) -> list[Collective]:
    """Read all collectives of a compiled program that a call of it runs.

    Their results are those of the shapes on one device, counters left out.
    """
    lines = _computations(program)
    times = _times_called(lines)
    found = []
    for name, count in times.items():
        for line in lines[name]:
            kind = line.operation.removesuffix("-start")
            if kind not in KINDS:
                continue
            results = _arrays(line.result)
            if line.operation != kind and kind != "all-reduce" and len(results) > 1:
                # What is sent, as many results that come, and perhaps counters.
                results = [x for x in results if x[1]]
                results = results[len(results) // 2 :]
            groups = _groups(line.rest)
            if groups and len(groups[0]) == 1:
                continue  # nobody to send to
            kind = SCATTER if name.startswith(SCATTER) else kind
            found.append(Collective(kind, tuple(results), groups, count))
    return found


@dataclasses.dataclass(frozen=True)
class _Line:
    root: bool
    name: str
    result: str
    operation: str
    rest: str  # operands and attributes

    @functools.cached_property
    def operands(self) -> list[str]:
        return _NAME.findall(self.rest.split(")", 1)[0])

    def called(self) -> Iterator[str]:
        if not self.operation.endswith(("-done", "-update")):
            for names in (*_CALLED.findall(self.rest), *_BRANCHES.findall(self.rest)):
                yield from _NAME.findall(names)


def _computations(program: str) -> dict[str, list[_Line]]:
    """Cut a program into its functions; the one that is called first has no name."""
    found, lines = {}, []
    for text in program.splitlines():
        if header := _HEADER.match(text):
            lines = found["" if header[1] else header[2]] = []
        elif line := _LINE.match(text):
            lines.append(_Line(bool(line[1]), *line.groups()[1:]))
    return found


def _times_called(lines: dict[str, list[_Line]]) -> dict[str, int]:
    """Count how often each function runs in a call of the first one."""
    times = collections.Counter()

    def visit(name: str, count: int) -> None:
        times[name] += count
        for line in lines.get(name, ()):
            each = _turns(line, lines) if line.operation == "while" else 1
            for called in line.called():
                visit(called, count * each)

    visit("", 1)
    return {name: count for name, count in times.items() if name in lines}


def _turns(loop: _Line, lines: dict[str, list[_Line]]) -> int:
    """Say how often a loop turns: until its counter, from 0, is not below a limit.

    A limit that is not written as a number is taken for one turn.
    """
    if known := re.search(r'known_trip_count[^\d]*"?(\d+)', loop.rest):
        return int(known[1])
    condition, body = (
        {x.name: x for x in lines.get(re.search(rf"{part}=%([\w.\-]+)", loop.rest)[1])}
        for part in ("condition", "body")
    )
    (root,) = (x for x in condition.values() if x.root)
    if root.operation != "compare":
        return 1
    limits = [_constant(condition.get(name)) for name in root.operands]
    counters = [condition[n].rest for n in root.operands if n in condition]
    places = [re.search(r"index=(\d+)", rest) for rest in counters]
    if not any(limits) or not any(places):
        return 1
    place = next(int(place[1]) for place in places if place)
    return math.ceil(max(limits) / _step(body, place))


def _step(body: dict[str, _Line], place: int) -> int:
    """Say what a loop adds to the counter at a place of its tuple."""
    (root,) = (x for x in body.values() if x.root)
    if root.operation == "tuple" and place < len(root.operands):
        counter = body.get(root.operands[place])
        if counter is not None and counter.operation == "add":
            return max(map(_constant, map(body.get, counter.operands))) or 1
    return 1


def _constant(line: _Line | None) -> int:
    number = line and line.operation == "constant" and re.match(r"\d+", line.rest)
    return int(number[0]) if number else 0


def _arrays(result: str) -> list[Array]:
    return [
        (kind, tuple(int(n) for n in shape.split(",") if n))
        for kind, shape in _ARRAY.findall(result)
        if kind != "token"
    ]


def _groups(rest: str) -> tuple[tuple[int, ...], ...]:
    """Read who belongs together, in any of the ways that it is written."""
    if lists := re.search(r"(?:groups|pairs)=\{(\{[\d,{}]*\})\}", rest):
        groups = re.findall(r"\{([\d,]+)\}", lists[1])
        return tuple(tuple(map(int, group.split(","))) for group in groups)
    tiles = re.search(
        r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest
    )
    if tiles:
        size, shape, order = (
            text and [int(n) for n in text.split(",")] for text in tiles.groups()
        )
        places = np.arange(math.prod(shape)).reshape(shape)
        places = places.transpose(order) if order else places
        return _rows(places.reshape(size))
    named = re.search(r"replica_groups=mesh\[([^\]]*)\]\s*\{([^}]*)\}", rest)
    if named:
        sizes = {n: int(s) for n, s in re.findall(r"'(\w+)'=(\d+)", named[1])}
        inside = re.findall(r"'(\w+)'", named[2])
        places = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
        last = [list(sizes).index(name) for name in inside]
        first = [i for i in range(len(sizes)) if i not in last]
        places = places.transpose(first + last)
        return _rows(places.reshape(-1, math.prod(sizes[n] for n in inside)))
    return ()


def _rows(places: np.ndarray) -> tuple[tuple[int, ...], ...]:
    return tuple(tuple(map(int, row)) for row in places)
