# SPDX-License-Identifier: MIT
"""Whether the emulation finds the errors one makes in CUDA: each entry of MUTANTS is one, planted
in the kernels' source, and a battery of right answers, or the bank conflicts counted, must show it.

All are compiled into one library, each behind a number; a process of its own runs each, since some
end in a crash or a deadlock.
"""

import os
import shutil
import signal

import emulator
import pytest

# file: (what stands there once, what stands there instead): statements, which end in ";", or an
# expression.
MUTANTS = {
    "tile.cuh": [
        # copies and barriers
        ("copy_wait();", ""),
        ("fence_async();\n        __syncthreads();", ""),
        ("__syncthreads(); // the shared memory is free again", ";"),
        ("*(uint4 *)(to + swizzle(r, c)) = make_uint4(0, 0, 0, 0);", ""),
        ("resident && next_col != first_col", "resident"),
        ("value0 + next_panel - panels", "next_panel - panels"),
        # lanes and swizzle
        ("16 * n + (lane & 7) + (lane >> 4 << 3)", "16 * n + (lane & 7) + (lane & 8)"),
        ("2 * k + (lane >> 3 & 1)", "2 * k + (lane >> 4)"),
        ("warp * 16 + (lane & 15)", "warp * 16 + (lane & 7)"),
        ("(chunk ^ row) & 7", "(chunk ^ (row & 3)) & 7"),
        ("(chunk ^ row) & 7", "chunk & 7"),
        ("term == 2 ? ROWS * PANEL : 0", "0"),
        ("term == 1 ? B_HALVES : 0", "0"),
        ("acc[n][q] += part[n][q];", "acc[n][q] = part[n][q];"),
        # tails and classes of tiles
        ("own[h] >= 0 || positive[h] >= 0", "own[h] >= 0"),
        ("own[h] >= 0 || positive[h] >= 0", "positive[h] >= 0"),
        ("col_end - col < BN", "false"),
        ("col >= valid", "col > valid"),
        ("slice * part.tiles * BN", "slice * BN"),
    ],
    "forward.cu": [
        ("c = -1e30f; // its exponential is 0", ";"),
        ("end += 32 * WARPS;", "end += 1;"),
        ("k < 4", "k < 2"),
        ("sums[h].raise_rest(top, scale);", ""),
        ("all.v[n] += (double)other.v[n];", "all.v[n] = (double)other.v[n];"),
        ("other.raise_hard(hard_top, s.scale, s.beta);", ""),
        ("sums[block.ticket] = value;", "sums[0] = value;"),
    ],
    "core.cuh": [
        ("fb * pow2(d)", "fb"),
        ("f * (v[SUM_REST_T] + d * v[SUM_REST])", "f * v[SUM_REST_T]"),
        ("atomicAdd(ticket, 1u) == total - 1", "atomicAdd(ticket, 1u) == 0"),
        ("clamped && some", "some"),
        ("65535.f", "65536.f"),
        ("lane >= k ? other : 0", "other"),
        ("upto > *rank", "upto >= *rank"),
        ("__dmul_rn(rule.momentum, stored - candidate)", "0."),
        ("updates == 0", "true"),
    ],
    "threshold.cu": [
        ("at & 1 ? 65536u : 1u", "1u"),
        ("words[k] = 0;", ""),
        ("counts[k] = 0;", ""),
        ("bin >> 8 == coarse[h]", "true"),
        ("KIND == FINE ? r.parts.row_blocks + 1 : 0", "0"),
        ("extra[k] >> 8 == coarse_of", "true"),
        ("row * PITCH + 4 * lane + k / 2", "row * PITCH + lane + k / 2"),
        ("k / WORDS * PITCH + k % WORDS", "k"),
    ],
    "backward.cu": [
        ("acc[2 * k + (q >> 1)] + 2 * (q & 1)", "acc[2 * k + (q & 1)] + 2 * (q >> 1)"),
        ("x[0] * unit[q & 1]", "x[0] * unit[q >> 1]"),
        ("ldmatrix_transposed(y, b + at);", "ldmatrix(y, b + at);"),
        ("mma_f16(part[2 * d], low[k], y[0], y[1]);", ""),
        (
            "swizzle(16 * k + (lane & 15), 2 * d + (lane >> 4))",
            "swizzle(16 * k + (lane & 7), 2 * d + (lane >> 4))",
        ),
        (
            "swizzle(16 * k + (lane & 15), 4 * half + 2 * d + (lane >> 4))",
            "swizzle(16 * k + (lane & 7), 4 * half + 2 * d + (lane >> 4))",
        ),
        ("out[4 * half + n][q] += part[n][q];", "out[4 * half + n][q] = part[n][q];"),
        ("acc[n][q] = 0;", ""),
        ("chunk * VALUES", "0"),
        ("bring_coefficients(col + BN);", "bring_coefficients(col);"),
        ("out[n][q] *= factor[q >> 1];", ""),
        ("!(tau >= 1. / 32)", "false"),
        ("k < 4 /* lanes of a row */", "k < 2"),
    ],
    "project.cu": [
        ("(du(d) - along * u)", "du(d)"),
        ("slice * step + d", "slice + d"),
        ("partial[d] = (real)sum;", ""),
        ("row0 + block * (THREADS / 32)", "block * (THREADS / 32)"),
        ("from < first ? from : first", "from"),
        ("end = to;", "end = from;"),
    ],
    "launch.cu": [
        ("r.tickets += tickets;", ""),
        ("r.partial = r.counts;", "r.partial = r.tickets;"),
        ("hex_project(*p, r, rest, first, end)", "hex_project(*p, r, rest, first, end - 1)"),
    ],
    "unit.cu": [("v - (double)f16_to_float(high)", "0.")],
    "plain.cu": [
        ("lane == 0 && (pass == 0 || at >> 8 == coarse)", "pass == 0 || at >> 8 == coarse"),
        ("j != i", "true"),
        ("__syncthreads(); // w is free again", ";"),
    ],
}
NUMBERED = [(name, *pair) for name, pairs in MUTANTS.items() for pair in pairs]  # from 1 on


def plant(folder):
    """The sources with every mutant in them; number k acts where hex_emu_mutant(k) was called."""
    shutil.copytree(emulator.ROOT / "csrc", folder / "csrc")
    source = folder / "csrc/cuda"
    for name, pairs in MUTANTS.items():
        text = (source / name).read_text()
        for old in dict.fromkeys(old for old, _ in pairs):
            assert text.count(old) == 1, (name, old, text.count(old))
            planted = old
            for k, mutant in enumerate(NUMBERED, 1):
                if mutant[:2] == (name, old):
                    planted = choice(f"emu::S.mutant == {k}", mutant[2], planted)
            text = text.replace(old, planted)
        (source / name).write_text(text)
    return sorted(source.glob("*.cu"))


def choice(condition, new, old):
    if ";" in old:
        return f"if ({condition}) {{ {new}\n}} else {{ {old}\n}}"
    return f"({condition} ? ({new}) : ({old}))"


@pytest.fixture(scope="module")
def mutants(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mutants")
    return emulator.Emulator(emulator.compile(folder / "mutants.so", "-w", sources=plant(folder)))


def outcome(mutants, number):
    """Of the battery with a mutant: "right", or how the error showed."""
    mutants.library.hex_emu_mutant(number)
    with mutants.in_use():
        for seed, device in zip(emulator.SEEDS, (emulator.SMALL, emulator.HOPPER), strict=True):
            mutants.seed(seed)
            mutants.device(*device)
            before = mutants.conflicts
            try:
                emulator.battery()
            except (AssertionError, RuntimeError):
                return "wrong"
            if mutants.conflicts > before:
                return "bank conflicts"
    return "right"


def in_a_child(mutants, number):
    """The same in a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(60)  # an endless loop
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the emulation says of a deadlock
            os.write(write, outcome(mutants, number).encode())
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    status = os.waitpid(child, 0)[1]
    return said or f"ended by signal {status & 127}"


@pytest.mark.skipif(emulator.SANITIZED, reason="the errors are meant to happen")
def test_the_battery_finds_every_planted_error(mutants):
    assert len(NUMBERED) >= 30
    assert in_a_child(mutants, 0) == "right"
    missed = [m for k, m in enumerate(NUMBERED, 1) if in_a_child(mutants, k) == "right"]
    assert not missed
