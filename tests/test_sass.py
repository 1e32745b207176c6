"""Loops and instructions of a disassembled kernel, on text that is short enough to read."""

from __future__ import annotations

import pytest

from bench import sass

# a loop over tiles (.L_x_1) in a loop over blocks (.L_x_0); the tile loop waits at .L_x_2, whose
# waiting code stands behind everything, as the assembler likes to put it
TEXT = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   STL [R1], R4 ;
.L_x_0:
        /*0020*/                   LDL R4, [R1] ;
        /*0030*/                   ISETP.GE.AND P0, PT, R4, UR4, PT ;
        /*0040*/               @P0 BRA `(.L_x_3) ;
.L_x_1:
        /*0050*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2 ;
        /*0060*/              @!P1 BRA `(.L_x_4) ;
.L_x_2:
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR16], RZ, !UPT ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x1 ;
        /*0090*/                   MUFU.EX2 R7, R24 ;
        /*00a0*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*00b0*/                   MUFU.EX2 R8, R25 ;
        /*00c0*/              @!P2 BRA `(.L_x_1) ;
        /*00d0*/                   STL.64 [R1+0x8], R6 ;
        /*00e0*/                   BRA `(.L_x_0) ;
.L_x_3:
        /*00f0*/                   EXIT ;
.L_x_4:
        /*0100*/                   SYNCS.PHASECHK.TRANS64.TRYWAIT P1, [UR4], R2 ;
        /*0110*/              @!P1 BRA `(.L_x_4) ;
        /*0120*/                   BRA `(.L_x_2) ;
.L_x_5:
        /*0130*/                   BRA `(.L_x_5);
"""


def test_loops_are_those_of_the_control_flow():
    blocks = sass.blocks_of(TEXT)
    heads = {min(loop): len(loop) for loop in sass.loops_of(blocks)}
    starts = {blocks[place].labels[0]: size for place, size in heads.items()}
    # over blocks of rows: all but entry and exit; over tiles: two blocks, and two that wait
    assert starts == {".L_x_0": 6, ".L_x_1": 4, ".L_x_4": 1}


def test_the_tile_loop_is_the_innermost_with_products():
    (loop,) = sass.tile_loops(TEXT)
    assert sass.count(sass.MATRIX, loop) == 1
    assert sass.count(r"PHASECHK", loop) == 2  # the waiting code elsewhere belongs to it
    assert sass.count(sass.LOCAL, loop) == 0
    everything = [text for block in sass.blocks_of(TEXT) for text in block.instructions]
    assert sass.count(sass.LOCAL, everything) == 3


def test_exponentials_behind_the_last_wait_are_late():
    (loop,) = sass.tile_loops(TEXT)
    assert sass.late_exponentials(loop) == 1
    moved = TEXT.replace("MUFU.EX2 R8, R25", "FADD R8, R25, R25")
    assert sass.late_exponentials(sass.tile_loops(moved)[0]) == 0
    nothing = [text for text in loop if "DEPBAR" not in text]
    assert sass.late_exponentials(nothing) == 2


def test_a_spill_in_the_loop_is_seen():
    spilling = TEXT.replace("MUFU.EX2 R8, R25", "LDL R8, [R1+0x8]")
    assert sass.count(sass.LOCAL, sass.tile_loops(spilling)[0]) == 1


def test_indirect_branches_have_all_their_targets():
    text = """
        /*0000*/     BRX R2 -0x340 (*"BRANCH_TARGETS .L_x_1,.L_x_2"*) ;
.L_x_1:
        /*0010*/     EXIT ;
.L_x_2:
        /*0020*/     EXIT ;
"""
    graph = sass.flow(sass.blocks_of(text))
    assert sorted(graph.edges) == [(0, 1), (0, 2)]


def test_a_missing_tool_is_named():
    pytest.importorskip("triton")
    with pytest.raises(FileNotFoundError, match="nothing-of-that-name is neither on the path"):
        sass.tool("nothing-of-that-name")
