"""What the assembler made of a kernel: its instructions, and the loops that they stand in.

Reads the text of ``nvdisasm`` (part of CUDA, and of triton), without a GPU. Loops are natural loops
of the control flow, so that waiting code which the assembler put elsewhere is not taken for one.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import networkx

MATRIX = re.compile(r"\b(HGMMA|HMMA|IMMA|QGMMA|DMMA)\b")
LOCAL = re.compile(r"\b(LDL|STL)\b")
_LINE = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?P<text>.*?);")
_LABEL = re.compile(r"^(?P<label>\.L\w+):")
_TARGET = re.compile(r"\.L_\w+")


@dataclass
class Block:
    """Instructions that run one after the other."""

    index: int
    labels: list[str] = field(default_factory=list)
    instructions: list[str] = field(default_factory=list)


def tool(name: str) -> str:
    """Path of a CUDA tool: on the PATH, else the one that triton brings.

    Raises: FileNotFoundError: if it is in neither place.
    """
    import triton

    bundled = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    found = shutil.which(name) or (str(bundled) if bundled.exists() else None)
    if found is None:
        raise FileNotFoundError(f"{name} is neither on the path nor in triton's own folder.")
    return found


def disassemble(cubin: bytes) -> str:
    """The text of ``nvdisasm -c``."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        command = [tool("nvdisasm"), "-c", str(path)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def blocks_of(text: str) -> list[Block]:
    """Basic blocks in the order of their addresses."""
    blocks = [Block(0)]
    for line in text.splitlines():
        label = _LABEL.match(line)
        if label:
            if blocks[-1].instructions:
                blocks.append(Block(len(blocks)))
            blocks[-1].labels.append(label["label"])
            continue
        found = _LINE.search(line)
        if found is None:
            continue
        blocks[-1].instructions.append(found["text"].strip())
        if _ends(found["text"]):
            blocks.append(Block(len(blocks)))
    return [block for block in blocks if block.instructions]


def _ends(instruction: str) -> bool:
    return re.search(r"\b(BRA|BRX|EXIT|RET|JMP)\b", instruction) is not None


def _goes_on(instruction: str) -> bool:
    """Whether what follows may run after this instruction."""
    if not _ends(instruction):
        return True
    return instruction.startswith("@") or "BRA.DIV" in instruction


def flow(blocks: Sequence[Block]) -> networkx.DiGraph:
    """Which block may follow which; nodes are places in ``blocks``."""
    place = {label: i for i, block in enumerate(blocks) for label in block.labels}
    graph = networkx.DiGraph()
    graph.add_nodes_from(range(len(blocks)))
    for i, block in enumerate(blocks):
        last = block.instructions[-1]
        if _ends(last):
            graph.add_edges_from((i, place[to]) for to in _TARGET.findall(last) if to in place)
        if _goes_on(last) and i + 1 < len(blocks):
            graph.add_edge(i, i + 1)
    return graph


def loops_of(blocks: Sequence[Block]) -> list[set[int]]:
    """Natural loops, as places in ``blocks``; those with one head are one."""
    graph = flow(blocks)
    parents = {**networkx.immediate_dominators(graph, 0), 0: 0}
    loops: dict[int, set[int]] = {}
    for tail, head in graph.edges:
        if tail not in parents or not _dominates(head, tail, parents):
            continue
        body = loops.setdefault(head, {head})
        waiting = [tail]
        while waiting:
            node = waiting.pop()
            if node not in body:
                body.add(node)
                waiting.extend(n for n in graph.predecessors(node) if n in parents)
    return list(loops.values())


def _dominates(head: int, node: int, parents: dict[int, int]) -> bool:
    while node != head:
        if node == 0:
            return False
        node = parents[node]
    return True


def tile_loops(text: str) -> list[list[str]]:
    """Instructions of each innermost loop that holds matrix products: the loops over tiles."""
    blocks = blocks_of(text)
    holding = [
        loop
        for loop in loops_of(blocks)
        if any(MATRIX.search(text) for i in loop for text in blocks[i].instructions)
    ]
    inner = [loop for loop in holding if not any(other < loop for other in holding)]
    return [
        [instruction for i in sorted(loop) for instruction in blocks[i].instructions]
        for loop in sorted(inner, key=min)
    ]


def count(pattern: re.Pattern[str] | str, instructions: Iterable[str]) -> int:
    """Instructions that match."""
    return sum(re.search(pattern, instruction) is not None for instruction in instructions)


def late_exponentials(loop: Sequence[str]) -> int:
    """Exponentials of a loop that stand behind its last wait for the matrix units.

    They could have run beside a product. Of a loop that waits for nothing: all.
    """
    waits = [i for i, text in enumerate(loop) if "WARPGROUP.DEPBAR" in text]
    return count(r"MUFU\.EX2", loop[waits[-1] + 1 if waits else 0 :])
