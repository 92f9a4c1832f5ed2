# SPDX-License-Identifier: MIT
"""Whether the emulation finds the errors one makes in CUDA: each entry of MUTANTS is one, planted
in the kernels' source, and a battery of right answers, or the bank conflicts counted, must show it.

All are compiled into one library, each behind a number, and into a second one as for Hopper; a
process of its own runs each, since some end in a crash or a deadlock. An error of what all GPUs run
must show in one of the two, one of what is there on Hopper alone in the second.

HEX_MUTANTS=3 in the environment, as .ci/run has it, takes one in three, others in each run; which,
is printed, and HEX_MUTANTS=3:1 takes these again. Without it all of them run, for half an hour.
"""

import os
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import batteries
import emulator
import pytest
import set_batteries

# file: (what stands there once, what stands there instead): statements, which end in ";", or an
# expression.
MUTANTS = {
    "panels.cuh": [
        # products
        (
            "ldmatrix(x, a + swizzle(warp * 16 + (lane & 15), 2 * k + (lane >> 4)));",
            "ldmatrix(x, a + swizzle(warp * 16 + (lane & 7), 2 * k + (lane >> 4)));",
        ),
        (
            "ldmatrix(to[k], a + swizzle(warp * 16 + (lane & 15), 2 * k + (lane >> 4)));",
            "ldmatrix(to[k], a + swizzle(warp * 16 + (lane & 15), 2 * k + (lane >> 3 & 1)));",
        ),
        ("mma_f16(acc[2 * n], x, y[0], y[1]);", "mma_f16(acc[2 * n], x, y[0], y[2]);"),
        (
            "mma_f16(acc[2 * n + 1], a[k], y[2], y[3]);",
            "mma_f16(acc[2 * n + 1], a[k], y[1], y[3]);",
        ),
        (
            "ldmatrix_transposed(y, b + swizzle(16 * k + (lane & 15), 2 * d + (lane >> 4)));",
            "ldmatrix(y, b + swizzle(16 * k + (lane & 15), 2 * d + (lane >> 4)));",
        ),
        (
            "ldmatrix_transposed(y, b + swizzle(16 * k + (lane & 15), 2 * d + (lane >> 4)));",
            "ldmatrix_transposed(y, b + swizzle(16 * k + (lane & 7), 2 * d + (lane >> 4)));",
        ),
        ("mma_f16(acc[2 * d + 1], a[k], y[2], y[3]);", "mma_f16(acc[2 * d], a[k], y[2], y[3]);"),
    ],
    "stream.cuh": [
        # products
        (
            "multiply_panel<true>(part, x + HALVES, y);",
            "multiply_panel<false>(part, x + HALVES, y);",
        ),
        ("multiply_panel<true>(part, x + HALVES, y);", "multiply_panel<true>(part, x, y);"),
        ("multiply_panel<false>(part, x, y + HALVES);", ""),
        ("acc[n][q] += part[n][q];", "acc[n][q] = part[n][q];"),
        (
            "multiply_panel<true>(acc, kept[0], b_panel(now));",
            "multiply_panel<false>(acc, kept[0], b_panel(now));",
        ),
        ("kept[KEEP ? k : 0]", "kept[0]"),
        (
            "clear(acc);\n        if (PANELS)\n            now = next();",
            "if (PANELS)\n            now = next();",
        ),
        # where things are
        ("over && more > rows", "false"),
        ("panel * (resident ? wide : 1 + blocks)", "panel * wide"),
        ("tiles || slots > 2 ? slots : 1", "1"),
        ("in_slot * (PANELS || resident ? WIDE : 1 + BLOCKS)", "in_slot * WIDE"),
        ("a + (block * panels() + panel) * PIECE", "a + panel * PIECE"),
        ("b_panel(in_slot, 1 + block)", "b_panel(in_slot, 1)"),
        ("a + (block * PANELS + k) * PIECE", "a + k * PIECE"),
        ("b_panel(now, PANELS ? panel : 0)", "b_panel(now, 0)"),
        ("(int64_t)block * panels() + panel", "(int64_t)block * panels()"),
        # the stream
        ("source += 16 * THREADS, target += 16 * THREADS;", "target += 16 * THREADS;"),
        ("next_panel == last ? side_bytes : 0", "0"),
        ("panel0 + next_panel", "next_panel"),
        ("blocks = blocks < BLOCKS ? blocks : BLOCKS;", "blocks = blocks < 1 ? blocks : 1;"),
        ("place(next_tile, panel)", "place(next_tile, 0)"),
        ("place(row_block + k, panel)", "place(row_block, panel)"),
        ("side + next_side * side_bytes", "side"),
        ("(int64_t)next_tile * side_pitch", "0"),
        ("next_slot = next_slot + 1 == slots ? 0 : next_slot + 1;", ""),
        ("next_tile += stride;", "next_tile++;"),
        ("next_side = next_side + 1 == sides ? 0 : next_side + 1;", ""),
        ("(int)(row0 / BN)", "0"),
        ("row_blocks - row_block < BLOCKS ? row_blocks - row_block : BLOCKS", "1"),
        ("copy_wait();\n            __syncthreads();", "__syncthreads();"),
        ("copy_wait();\n            __syncthreads();", "copy_wait();"),
        ("__syncthreads(); // the place is free for the kernel", ";"),
        ("slot = slot + 1 == slots ? 0 : slot + 1;", ""),
        ("copy_wait();\n        __syncthreads();", "__syncthreads() ;"),
        ("copy_wait();\n        __syncthreads();", "copy_wait();"),
        ("side + side_slot * side_bytes", "side"),
        ("side_slot = side_slot + 1 == sides ? 0 : side_slot + 1;", ""),
        ("row < from || row >= to", "false"),
        ("row < from || row >= to", "row >= from && row < to"),
        ("row < from || row >= to", "row >= to"),
        ("fence_async();\n        __syncthreads();", "fence_async();"),
    ],
    "tile.cuh": [
        # where things are
        ("keep && !side", "keep"),
        # tails and classes of tiles
        ("(lane >> 2) + 8 * h", "(lane >> 2) + h"),
        ("is_in(row[0] - col)", "false"),
        ("is_in(partner[0] - col)", "false"),
        ("is_in(partner[1] - col)", "false"),
        ("col < col0 || col + BN > col1", "col + BN > col1"),
        ("col < col0 || col + BN > col1", "col < col0"),
        ("from = col < col0 ? col0 - col : 0;", "from = 0;"),
        ("valid = col1 - col < BN ? col1 - col : BN;", "valid = BN;"),
        ("is_in(o) ? o : -1", "-1"),
        ("is_in(q) ? q : -1", "-1"),
        ("col >= valid || col < from", "col > valid || col < from"),
        ("col >= valid || col < from", "col >= valid || col <= from"),
        (
            "leaves_out(q >> 1, 8 * n + 2 * t + (q & 1))",
            "leaves_out(q & 1, 8 * n + 2 * t + (q & 1))",
        ),
        ("part.row0 / BN * BN + ticket * rows", "part.row0 + ticket * rows"),
        ("part.col0 / BN + slice * part.tiles", "part.col0 / BN + slice"),
        ("ticket += parts.part[i].row_blocks;", ""),
        ("i >= part.row0 && i < part.row1", "i < part.row1"),
        ("i >= part.row0 && i < part.row1", "i >= part.row0"),
        ("part.first_row + i - part.row0", "i - part.row0"),
        ("part.first_row + i - part.row0", "i"),
        ("__syncthreads(); // the shared memory is free again", ";"),
    ],
    "forward.cu": [
        (
            "SETS ? all.v[SUM_NEGATIVES] : (double)negatives_of_a_row(p)",
            "(double)negatives_of_a_row(p)",
        ),
        ("places.blank(acc, NOTHING);", ";"),
        ("hard(h, k) = k == SUM_HARD_TOP ? HEX_LOWEST : 0;", ";"),
        ("h ? end[1] : end[0]", "end[0]"),
        ("end[0] = list(0), end[1] = list(1);", ";"),
        ("end[0] > list(0) + FEW * THREADS", "false"),
        ("end[1] > list(1) + FEW * THREADS", "false"),
        ("rest_t[h] += sum_t;\n            end[h] = to;", "rest_t[h] += sum_t;"),
        ("to += THREADS;\n                        c = NOTHING;", "c = NOTHING ;"),
        ("to += THREADS;\n                        c = NOTHING;", "to += THREADS ;"),
        ("fmaf(c, scale, -scale)", "c * scale"),
        ("rest_t[h] = f * (rest_t[h] + d * rest[h]);", "rest_t[h] *= f;"),
        ("top[h] = most;", ""),
        ("!SETS && tau >= 1. / 32", "true"),
        ("s.shared_shift ? 1.f : HEX_LOWEST", "1.f"),
        ("s.shared_shift ? 1.f : HEX_LOWEST", "HEX_LOWEST"),
        ("s.add_lists();", ";"),
        ("k < 4", "k < 2"),
        ("(lane & 3) == 0 && block.has(i)", "(lane & 3) == 0"),
        ("threadIdx.x < ROWS && block.has(i)", "block.has(i)"),
        ("other.raise_rest(top, s.scale);", ""),
        ("all.v[n] += (double)other.v[n];", "all.v[n] = (double)other.v[n];"),
        ("other.raise_hard(hard_top, s.scale, s.beta);", ""),
        ("sums[block.ticket] = value;", "sums[0] = value;"),
        # of several positives
        ("add_positives(acc, marks.positive);", ";"),
        (
            "negatives[h] += __popc(marks.negative & BITS_OF_ROW(h));",
            "negatives[h] += __popc(marks.negative);",
        ),
        ("unknown[h] += __popc(unknown_bits & BITS_OF_ROW(h));", ";"),
        ("of.end[h] += THREADS;", ""),
        ("marks.negative & ~hard & bit ? acc[n][q] : NOTHING", "~hard & bit ? acc[n][q] : NOTHING"),
        ("pos_t[h] += d * (float)positives[h];", ";"),
        ("pos_te[h] = f * (pos_te[h] + d * pos_e[h]);", ";"),
        ("other.raise_positives(pos_top, s.scale);", ";"),
        ("all.v[SUM_POS_TOP] = (double)pos_top;", ";"),
    ],
    "core.cuh": [
        ("p.mode == HEX_CROSS && j < p.B", "false"),
        ("p.mode == HEX_UNPAIRED && !p.several ? p.B + p.M : p.B", "p.B"),
        ("(chunk ^ row) & 7", "(chunk ^ (row & 3)) & 7"),
        ("(chunk ^ row) & 7", "chunk & 7"),
        (
            "(i >> 6) * u.panels + u.first + (d >> 6)",
            "(i >> 6) + (u.first + (d >> 6)) * ((u.count + 63) >> 6)",
        ),
        ("(i >> 6) * u.panels + u.first + (d >> 6)", "(i >> 6) * u.panels + (d >> 6)"),
        ("u.split ? 13 : 12", "12"),
        ("(i >> 6) * K_ALL", "(i >> 6) * K_ROWS"),
        ("atomicAdd(ticket, 1u) == total - 1", "atomicAdd(ticket, 1u) == 0"),
        ("parts.part[k].row0 + n", "n"),
    ],
    "row.cuh": [
        ("fb * pow2(d)", "fb"),
        ("f * (v[SUM_REST_T] + d * v[SUM_REST])", "f * v[SUM_REST_T]"),
        ("clamped && some", "some"),
        ("f * (v[SUM_POS_TE] + d * v[SUM_POS_E])", "f * v[SUM_POS_TE]"),
        ("v[SUM_POS_T] += v[SUM_POS_COUNT] > 0 ? d * v[SUM_POS_COUNT] : 0;", ";"),
        (
            "raise_positives(positive, scale), o.raise_positives(positive, scale);",
            "o.raise_positives(positive, scale);",
        ),
        ("v[SUM_NEGATIVES] += 1;", ";"),
        ("p.by_group ? (real)0.5 : row_threshold<real>(p, at)", "row_threshold<real>(p, at)"),
        ("score != score && c == c ? 1 : 0", "0"),
        # what becomes of them
        ("loss -= log(s.v[SUM_POS_E]);", ";"),
        ("s.v[SUM_POS_TE] / scale / s.v[SUM_POS_E]", "0"),
        ("-1 / t / positives", "-1 / t"),
        ("largest + pos_x / positives", "largest"),
        ("given && some && rest_top > hard_top", "false"),
        ("(largest - centre) / t", "0"),
        ("released || decoupled || inside || positives == 1", "true"),
        (
            "released || decoupled || inside || positives == 1",
            "released || inside || positives == 1",
        ),
        ("released || p.variant == HEX_EXCLUDED", "released"),
        ("leaves_out ? 0 : count", "count"),
        (
            "decoupled ? (shift - centre) / t : fmax(m, (shift - centre) / t)",
            "fmax(m, (shift - centre) / t)",
        ),
        ("fmin(-m, 600.0)", "-m"),
        ("fmin(below - m, 600.0)", "below - m"),
        ("clamped && decoupled", "false"),
        ("some ? fmax(top, lowest) : lowest", "top"),
        ("rest_unit = some ? exp(top - m) : 0;", ";"),
        ("local = floor_ = near * exp(lowest - m);", ";"),
        ("decoupled ? S : E + S", "E + S"),
        ("inside ? log(pos_e) : 0", "0"),
        (
            "floor_ = near * exp(lowest - m);\n        clamped = local < floor_ || local <= 0;",
            "floor_ = near * exp(lowest); clamped = local < floor_ || local <= 0;",
        ),
        ("p.tau_plus * E / positives", "p.tau_plus * E"),
        ("-k * S / pos_e - debias", "-k * S / pos_e"),
        ("W = S / pos_e;", "W = S;"),
        ("W = S + (positives > 1 ? E - e0 : 0);", "W = S;"),
        ("return log1p(W * exp(m));", "return log1p(W);"),
        ("x <= 0 ? log1p(exp(x)) : x + log1p(exp(-x))", "x + log1p(exp(-x))"),
        ("fmax(fmax(s.v[SUM_TOP], s.v[SUM_HARD_TOP]), largest)", "largest"),
        ("fmax(fmax(s.v[SUM_TOP], s.v[SUM_HARD_TOP]), largest)", "fmax(s.v[SUM_TOP], largest)"),
        ("m + log(W)", "log(W)"),
        ("(decoupled ? 0 : k * pos_unit) - debias", "k * pos_unit - debias"),
        ("(decoupled ? 0 : k * pos_unit) - debias", "decoupled ? 0 : k * pos_unit"),
        ("debias * pos_e / positives", "debias * pos_e"),
        ("return x + (double)INFINITY;", "return x;"),
        ("pos_e * (e - pos_mean) + positive", "pos_e * e + positive"),
        ("is_positive ? pos_shift : shift", "shift"),
        ("beta == 1 ? e : beta == 0 ? 1 : pow2(beta * t)", "e"),
    ],
    "bins.cuh": [
        ("65535.f", "65536.f"),
        ("lane >= k ? other : 0", "other"),
        ("upto > *rank", "upto >= *rank"),
        ("apart[0] < 0 ? 0 : 1", "0"),
        ("negatives && !negative", "false"),
        ("(apart[0] >= 0) + (apart[1] >= 0)", "0"),
        ("sum += there ? x : 0, count += there;", "sum += there ? x : 0, count += 1;"),
    ],
    "marks.cuh": [
        ("several ? 0 : p.B", "p.B"),
        ("several ? 0 : p.B", "0"),
        ("several && p.mode == HEX_UNPAIRED ? (int)(p.B + p.M) : 0", "0"),
        ("ids[places.row[h]]", "ids[places.row[0]]"),
        ("groups[places.row[h]]", "groups[places.row[0]]"),
        ("pair_at(ids + first + 8 * n)", "pair_at(ids + first + 4 * n)"),
        ("q ? of.second : of.first", "of.first"),
        ("pair_at(groups + first + 8 * n)", "pair_at(groups + first)"),
        ("of.first == id[h]", "of.first == id[0]"),
        ("of.second == id[h]", "of.first == id[h]"),
        ("of.first == group[h]", "of.first == group[0]"),
        ("of.second == group[h]", "of.first == group[h]"),
        ("pair_at(places_in_mask + first + 8 * n)", "pair_at(places_in_mask + first + 4 * n)"),
        ("places_in_mask[places.row[h]]", "places_in_mask[places.row[0]]"),
        ("code_in_mask(mask, place[h], other)", "code_in_mask(mask, other, 0 + place[h])"),
        ("code_in_mask(mask, other, place[h])", "code_in_mask(mask, 0 + place[h], other)"),
        ("code == HEX_CODE_POSITIVE && several", "code == HEX_CODE_POSITIVE"),
        ("code == HEX_CODE_LEFT_OUT", "false"),
        ("positive_to = positive;", "positive_to = 0;"),
        ("places.row[h] < views ? BITS_OF_ROW(h) : 0", "0"),
        ("seen & ~(positive_to | row_of_z1 | out_to)", "~(positive_to | row_of_z1 | out_to)"),
        ("seen & ~(positive_to | row_of_z1 | out_to)", "seen & ~(positive_to | row_of_z1)"),
        ("tile * BN < views", "false"),
        ("tile * BN + col < views", "tile * BN + col <= views"),
        ("positive & seen", "positive"),
        ("seen & ~(positive | of_z1 | out)", "seen & ~(positive | out)"),
        ("seen & ~(positive | of_z1 | out)", "seen & ~(positive | of_z1)"),
        ("seen & ~(positive | of_z1 | out)", "~(positive | of_z1 | out)"),
        ("seen |= places.leaves_out(q >> 1, col) ? 0 : bit;", "seen |= bit;"),
        ("acc[n][q] > limit(q >> 1, col)", "acc[n][q] > limit(q & 1, col)"),
        ("h ? eps[1] : eps[0]", "eps[0]"),
        ("marks.unknown = bits_not_numbers(acc) & marks.negative;", ";"),
        ("!r.groups && r.unit.first == 0", "true"),
    ],
    "sets.cuh": [
        (
            "p.several || p.mask.data || p.by_group || p.G > 0",
            "p.several || p.mask.data || p.by_group",
        ),
        ("p.several || p.mask.data || p.by_group || p.G > 0", "p.several || p.by_group || p.G > 0"),
        ("return p.several || p.mask.data;", "return p.several;"),
        ("row | column << 32", "row"),
        ("(anchor & 0xffffffff) * m.row", "(candidate & 0xffffffff) * m.row"),
        ("(candidate >> 32) * m.col", "(anchor >> 32) * m.col"),
        ("m.codes ? code : code != 0", "code != 0"),
        (
            "i % m.rows * m.row + j % m.columns * m.col",
            "i % m.rows * m.row + i % m.columns * m.col",
        ),
        (
            "r.places ? code_in_mask(p.mask, r.places[i], r.places[j]) : 0",
            "r.places ? code_in_mask(p.mask, r.places[j], r.places[i]) : 0",
        ),
        (
            "(r.ids && r.ids[i] == r.ids[j]) || code == HEX_CODE_POSITIVE",
            "r.ids && r.ids[i] == r.ids[j]",
        ),
        ("j == i", "false"),
        ("p.mode == HEX_NTXENT && i == j", "false"),
        ("p.mode == HEX_UNPAIRED && j < views", "false"),
    ],
    "logits.cu": [
        ("t >= 0 && t < columns ? t : -1", "t"),
        ("j != target && v != (real)-INFINITY", "j != target"),
        ("j != target && v != (real)-INFINITY", "v != (real)-INFINITY"),
        ("p.first + at", "at"),
        ("p.first + blockIdx.x", "blockIdx.x"),
        ("p.first + place", "place"),
        ("stats[k * anchors + at] = (real)NAN;", ";"),
        ("bins.finite = (double)NAN;", ";"),
        ("bins.add_apart(1);", ";"),
        ("!negative && j != row.target", "!negative"),
        ("v == (real)INFINITY", "false"),
        ("c < -2", "false"),
        ("j == row.target", "false"),
        ("v * row.tau > k.eps", "v > k.eps"),
        ("place * row.columns + j", "i * row.columns + j"),
        ("counts[threadIdx.x] = 0;", ";"),
    ],
    "../tracker.h": [
        ("t->momentum > 0", "false"),
        ("!(s[HEX_STATE_WEIGHT] > 0)", "true"),
        ("s[HEX_STATE_UPDATES]++;", ";"),
        ("s[HEX_STATE_WEIGHT] = 1;", ";"),
        ("2 * anchors < fmax(s[HEX_STATE_MOST], s[HEX_STATE_BEFORE])", "true"),
        ("fmax(s[HEX_STATE_MOST], anchors)", "anchors"),
    ],
    "fours.cuh": [
        ("127 + e", "126 + e"),
    ],
    "threshold.cu": [
        ("p.several || r.unit.positive[image_of(i, p.B)] * 0 == 0", "true"),
        ("(extra0 >= 0)", "0"),
        ("at & 1 ? 65536u : 1u", "1u"),
        ("all[k] = 0;", ""),
        ("counts[k] = 0;", ""),
        ("bin >> 8 == coarse[h]", "true"),
        ("KIND == FINE ? r.parts.row_blocks + 1 : 0", "0"),
        ("extra[k] >> 8 == coarse_of", "true"),
        ("row * PITCH + 4 * lane + k / 2", "row * PITCH + lane + k / 2"),
        ("k / WORDS * PITCH + k % WORDS", "k"),
        ("word == 0 || !block.has(block.row0 + row)", "word == 0"),
        ("(unsigned *)(shared + fit.at.ring)", "(unsigned *)(shared + fit.at.more)"),
        ("ends < ROWS ? (int)ends : ROWS", "ROWS"),
        ("begins > 0 ? (int)begins : 0", "0"),
        ("row < skip", "false"),
        ("sum += r.unit.inverse[block.ticket * share + k] * 0;", ""),
        ("finite[h] += c * 0;", ""),
        ("low[h] = fminf(low[h], c);", "low[h] = c;"),
        ("(lane & 3) == 0 && block.has(i)", "(lane & 3) == 0"),
        ("s.chosen[block.place(block.row0 + k)] < 0", "false"),
        ("KIND == COARSE || block.slice > 0", "KIND == COARSE"),
        ("k >= block.part.col0 && k < block.part.col1", "true"),
        ("r.unit.positive[image_of(i, p.B)] * 0 == 0", "true"),
        ("s.spoilt[block.ticket] == 0", "true"),
        ("r.counts + block.place(block.row0) * WORDS", "r.counts + block.row0 * WORDS"),
        (
            "sum += bin_middle(s.chosen[block.place(block.row0 + row)]);",
            "sum = bin_middle(s.chosen[block.place(block.row0 + row)]);",
        ),
        # of several positives
        ("negatives ? marks.negative : row", "row"),
        ("spoilt[h] |= (nan & BITS_OF_ROW(h)) != 0;", ";"),
        ("(marks.negative | marks.positive) & bit", "marks.negative & bit"),
        ("(extra1 >= 0) - 1", "0 - 1"),
        ("empty ? -1 : 256 * coarse + bin", "256 * coarse + bin"),
        ("sum += x != (double)INFINITY ? x : 0;", "sum += x;"),
        ("count += x != (double)INFINITY;", "count += 1;"),
    ],
    "sample.cu": [
        ("counts[k] = 0;", ""),
        ("bins[warp * 16 + (lane >> 2) + 8 * h] = fold.bins[h];", ""),
        ("0.3f * reach", "1.3f * reach"),
        ("tiles / (2 * some) + block.ticket * 5", "tiles / (2 * some) + block.slice"),
        ("*(uint4 *)(counts + k) = make_uint4(0, 0, 0, 0);", ""),
        ("row * PITCH + 8 * lane + k", "row * PITCH + 4 * lane + k"),
    ],
    "bracket.cu": [
        ("r.bracket.tickets + r.bracket.sample.row_blocks", "r.bracket.tickets"),
        ("fmaxf(c.x, c.y) > limit", "c.x > limit"),
        ("c.x = -4;", ""),
        ("c.y = -4;", ""),
        ("bin >= first[h] && bin <= last[h]", "bin >= first[h]"),
        ("bin >= first[h] && bin <= last[h]", "bin <= last[h]"),
        ("above[h] += bin > last[h];", ""),
        ("at[h] += THREADS;", ""),
        ("h * r.bracket.depth * THREADS", "0"),
        ("4 * (row & 7)", "4 * (row >> 1)"),
        ("!in.fits || rank < 0 || rank >= inside", "!in.fits || rank < 0"),
        ("!in.fits || rank < 0 || rank >= inside", "!in.fits || rank >= inside"),
        ("!in.fits || rank < 0 || rank >= inside", "rank < 0 || rank >= inside"),
        ("bins[k] = 0;", ""),
        ("bin >> 8 == coarse", "true"),
        ("all += extra[k] >= 0;", ""),
        ("above += extra[k] > last;", ""),
        ("inside += extra[k] >= 0;", ""),
        ("extra[k] < first || extra[k] > last", "false"),
        ("to = __shfl_sync(~0u, to, 0);", ""),
        ("to += in.count[t];", ""),
        ("atomicAdd(counts + 2 * at + 1, in.above);", ""),
        ("in.global = lists + at * most;", "in.global = lists + i * most;"),
        ("in.fits ? in.all : (uint32_t)most + 1", "in.all"),
    ],
    "weights.cuh": [
        ("c > row[h][K_EPS]", "false"),
        ("c > k[K_EPS * BN]", "false"),
        ("beta == 1 ? e : ex2(beta * c * scale)", "e"),
        ("column[K_EPS * BN + lane + 32]", "column[K_EPS * BN + lane]"),
        ("lowest = fminf(lowest, __shfl_xor_sync(~0u, lowest, k));", ";"),
        ("fminf(lowest, row[0][K_EPS])", "lowest"),
        ("fminf(lowest, row[1][K_EPS])", "lowest"),
        ("c > limit[h]", "c > limit[0]"),
        ("q & 1 ? rest.y : rest.x", "rest.x"),
        ("places.leaves_out(q >> 1, 8 * n + 2 * t + (q & 1))", "false"),
        ("tau >= 1. / 32 && (1 + p.beta) * HEX_LOG2E <= 80 * tau", "true"),
        ("tau >= 1. / 32 && (1 + p.beta) * HEX_LOG2E <= 80 * tau", "tau >= 1. / 32"),
        ("k < K_REST || apart", "true"),
        # their scale
        ("power > 227 ? 227 : power < 1 ? 1 : power", "power < 1 ? 1 : power"),
        ("factor[h] = wanted[h] / unit[h];", ""),
        ("unit[h] = wanted[h];", ""),
        ("larger = true;", ""),
        ("out[v][n][q] *= factor[q >> 1];", "out[v][n][q] *= factor[q & 1];"),
        (
            "top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], k));",
            "top[h] = fmaxf(top[h], __shfl_xor_sync(~0u, top[h], k & 1));",
        ),
        # the second product
        ("acc[2 * k + (q >> 1)] + 2 * (q & 1)", "acc[2 * k + (q & 1)] + 2 * (q >> 1)"),
        ("x[0] * unit[q & 1]", "x[0] * unit[q >> 1]"),
        ("pack_f16(x0, x1)", "pack_f16(x1, x0)"),
        ("multiply_transposed(part, low, b);", ""),
        ("multiply_transposed(part, high, b + HALVES);", ""),
        ("out[n][q] += part[n][q];", "out[n][q] = part[n][q];"),
        # to memory
        ("more ? *at : make_float2(0, 0)", "make_float2(0, 0)"),
        ("more ? *at : make_float2(0, 0)", "*at"),
        ("out[v][n][2 * h] = out[v][n][2 * h + 1] = 0;", ";"),
        ("v < panels && mine.has(rows[h])", "v < panels"),
        ("v < panels && mine.has(rows[h])", "mine.has(rows[h])"),
        ("mine.slice * r.parts.rows", "0"),
        ("mine.part.first_row - mine.part.row0", "-mine.part.row0"),
        ("panel0 * PANEL", "0"),
        ("block.ticket * (WEIGHT_ROWS / 16)", "0"),
        ("rows * r.weights.tiles", "rows"),
        ("block.tile0 - block.part.col0 / BN", "0"),
    ],
    "backward.cu": [
        ("SIDE_BYTES / K_ROWS * K_ALL", "SIDE_BYTES"),
        ("stream.b_panel(slot, v)", "stream.b_panel(slot, 0)"),
        ("tile * BN < col0 || (tile + 1) * BN > col1", "false"),
        ("tile * BN < col0 || (tile + 1) * BN > col1", "(tile + 1) * BN > col1"),
        ("stream.clear_others(slot, places.from, places.valid);", ";"),
        (
            "stream.clear_others(slot, places.from, places.valid);",
            "stream.clear_others(slot, 0, places.valid);",
        ),
        ("tile - mine.tile0 > MOST_TILES", "true"),
        ("tile - mine.tile0 > MOST_TILES", "false"),
    ],
    "weights.cu": [
        ("SIDE_BYTES / K_ROWS * K_ALL", "SIDE_BYTES"),
        ("scale[0] = unit[0], scale[8] = unit[1];", "scale[0] = scale[8] = unit[0];"),
        ("to += WEIGHT_QUADS(SPLIT), scale += 16;", "to += WEIGHT_QUADS(SPLIT);"),
        ("to[32 * (4 + k)]", "to[32 * k]"),
        # by marks
        ("marks.hard & bit", "false"),
        ("(marks.positive | marks.negative) & bit", "true"),
        ("term(other, acc[n][q], bit, of_columns)", "0.f"),
        ("term(other, acc[n][q], bit, of_columns)", "term(other, acc[n][q], bit, of_rows)"),
        ("!guided && !r.groups", "true"),
        ("!guided && !r.groups", "false"),
        ("eps[col]", "eps[0]"),
    ],
    "product.cu": [
        ("lower_unit(unit, out, next.unit);", ";"),
        ("pack_f16(at[h] / unit[h], at[h] / unit[h])", "pack_f16(1, 1)"),
        ("multiply_f16(x.y, by[1])", "multiply_f16(x.y, by[0])"),
        ("multiply_f16(y.z, by[0])", "multiply_f16(y.w, by[0])"),
        ("unit[0] = scales[0], unit[1] = scales[8];", "unit[0] = unit[1] = scales[0];"),
        ("chunk * panels / chunks", "0"),
        ("halves += WEIGHT_QUADS(SPLIT), scales += 16;", "scales += 16;"),
        ("from > 0 || to < BN", "false"),
        ("from > 0 || to < BN", "to < BN"),
        ("stream.clear_others(now, from, to);", "stream.clear_others(now, 0, to);"),
        ("r.weights.more || tile - block.tile0 > MOST_TILES", "r.weights.more"),
        (
            "r.weights.more || tile - block.tile0 > MOST_TILES",
            "tile - block.tile0 > MOST_TILES",
        ),
        ("r.weights.more || tile - block.tile0 > MOST_TILES", "true"),
    ],
    "project.cu": [
        ("(du(d) - along * u)", "du(d)"),
        ("slice * own.step + d", "slice + d"),
        ("own.partial[d] = (real)sum;", ""),
        ("input < 2 ? p.first : 0", "0"),
        ("rows.rows += both.end - both.begin;", "rows.rows = both.end - both.begin;"),
        ("p.B + p.first", "p.first"),
        ("n < left", "true"),
        ("partial += step", "partial += 1"),
        ("weight * over_length((number)y[k], theirs)", "weight * (number)y[k]"),
        ("along += __shfl_xor_sync(~0u, along, k);", ";"),
        ("!p.several && o < p.B + p.M", "o < p.B + p.M"),
    ],
    "parts.cuh": [
        ("add_part(parts, B + p.first, B + end1, col0, col1);", ";"),
        (
            "add_part(parts, B + p.first, B + end1, col0, col1);",
            "add_part(parts, B + p.first, B + end, col0, col1);",
        ),
        (
            "part.row_blocks = cut(part.row1 - part.row0 / TILE * TILE, rows);",
            "part.row_blocks = cut(part.row1 - part.row0, rows);",
        ),
        ("part.first_row = parts.rows;", "part.first_row = 0;"),
        ("(tile + tiles) * TILE", "part.col1"),
        ("part.col0 / TILE + first", "first"),
        ("if (p.several)\n            add_views(p, parts, false, g.dz[1], 0, B);", ";"),
        ("add_part(parts, 0, B + p.M, col0, col1)", "add_part(parts, 0, 2 * B, col0, col1)"),
    ],
    "launch.cu": [
        ("r.tickets += tickets;", ""),
        ("r.partial = r.counts;", "r.partial = r.tickets;"),
        (
            "hex_project(*p, r, rest, band)",
            "hex_project(*p, r, rest, {band.begin, band.end - 1})",
        ),
        ("n + p->B + p->M - views", "n"),
        ("some.weights.more = true", "some.weights.more = false"),
        ("has_sets(*p) || !hex_holds_tiles(r)", "!hex_holds_tiles(r)"),
        ("p.several && p.mode != HEX_LOGITS", "false"),
        ("are_uneven(p) ? anchors : 0", "0"),
        ("p.mask.data && p.mode != HEX_PAIRED", "false"),
        ("narrow &= p.guide[0].dtype == HEX_F16 || p.guide[0].dtype == HEX_BF16;", ";"),
    ],
    "unit.cu": [
        ("v - (double)f16_to_float(high)", "0."),
        ("fmaf(z[k], by.high, -rounded)", "0.f"),
        ("(uint2 *)(to + 4096)", "(uint2 *)to"),
        ("make_uint2(high[0], high[1])", "make_uint2(high[1], high[0])"),
        ("full[h] && d < D", "full[h]"),
        ("d >= width", "d >= D"),
        ("pair ? item : item + work.pairs", "item"),
        ("sum[n] += __shfl_xor_sync(~0u, sum[n], k);", ";"),
        ("sum[2] * inverse[0] * inverse[1]", "sum[2] * inverse[0]"),
        ("along = block_sum(along, scratch);", ""),
        ("k < work.zero_count", "k < work.zero_count - 1"),
        ("(double)k[K_REST] * unit", "(double)k[K_REST]"),
        ("hard_unit * unit", "hard_unit"),
        ("(double)k[K_HARD] * hard_unit", "(double)k[K_HARD] * unit"),
        ("exp2(p.beta * x)", "exp2(x)"),
        ("i % p.mask.rows", "i"),
        ("candidate_of(p, i) % p.mask.columns", "i % p.mask.columns"),
        (
            "from.input == 0 ? labels[0] : from.input == 1 ? labels[1] : labels[2]",
            "from.input == 0 ? labels[0] : labels[1]",
        ),
        ("guide.input[k] = p.guide[k];", "guide.input[k] = p.guide[0];"),
        ("k[K_POS_MEAN] = stats[HEX_STAT_POS_MEAN * anchors];", ";"),
        ("go * (double)stats[HEX_STAT_POS_E * anchors]", "(double)stats[HEX_STAT_POS_E * anchors]"),
    ],
    "plain.cu": [
        (
            "p->mode == HEX_PAIRED ? own_kind_of(*p, i, j) : kind_of(*p, *r, i, j)",
            "p->mode == HEX_PAIRED ? NEGATIVE : kind_of(*p, *r, i, j)",
        ),
        ("kind == LEFT_OUT ? 0 : r.unit.own[n]", "r.unit.own[n]"),
        ("lane == 0 && at >= 0", "at >= 0"),
        ("(i - first) * K + j", "i * K + j"),
        ("p.first + blockIdx.x / blocks", "blockIdx.x / blocks"),
        ("kind == NEGATIVE || !choice.of.negatives", "true"),
        ("__syncthreads(); // w is free again", ";"),
    ],
    "total.cu": [
        ("i * x.row + j * x.col", "i * x.columns + j"),
        ("there ? x : 0", "x"),
        ("count += there;", "count += 1;"),
    ],
}
# What is there on Hopper alone, by bulk copies and warpgroup products.
HOPPER = {
    "panels.cuh": [
        # products
        ("wgmma_f16<true>(acc, pa, pb);", "wgmma_f16<false>(acc, pa, pb);"),
        (
            "wgmma_f16<false>(acc, pa + 2 * k, pb + 2 * k);",
            "wgmma_f16<false>(acc, pa, pb + 2 * k);",
        ),
        ("wgmma_f16<false>(acc, a[k], pb + 2 * k);", "wgmma_f16<false>(acc, a[k], pb + k);"),
        (
            "wgmma_f16_transposed(acc, a[k], pb + 128 * k);",
            "wgmma_f16_transposed(acc, a[k], pb + 2 * k);",
        ),
    ],
    "stream.cuh": [
        # products
        (
            "multiply_panel<true>(acc, a_panel(0, now), b_panel(now));",
            "multiply_panel<false>(acc, a_panel(0, now), b_panel(now));",
        ),
        (
            "multiply_panel<false>(acc, a_panel(k, now), b_panel(now, k));",
            "multiply_panel<false>(acc, a_panel(1, now), b_panel(now, k));",
        ),
        # bytes and barriers
        ("over ? 0 : at.barriers + slots * RING_BARRIERS", "over ? 0 : at.barriers"),
        ("tiles || slots > 2", "tiles"),
        ("barrier_expect(full + next_slot, bytes * (1 + blocks) + beside);", ""),
        (
            "barrier_expect(full + next_slot, bytes * (1 + blocks) + beside);",
            "barrier_expect(full + next_slot, bytes + beside);",
        ),
        (
            "barrier_expect(full + next_slot, bytes * (1 + blocks) + beside);",
            "barrier_expect(full + next_slot, bytes * (1 + blocks));",
        ),
        ("next_tile >= end_tile", "next_tile > end_tile"),
        ("barrier_start(full + k, 1);", "barrier_start(full + k, 2);"),
        ("barrier_start(empty + k, WARPS);", "barrier_start(empty + k, 1);"),
        ("barrier_start(empty + k, WARPS);", "barrier_start(empty + k, WARPS + 1);"),
        ("barrier_start(empty + slots, 1);", "barrier_start(empty + slots, 2);"),
        (
            "parity = next_parity = 0, ahead = 0;\n        __syncthreads();",
            "parity = next_parity = 0, ahead = 0;",
        ),
        ("barrier_expect(empty + slots, bytes);", "barrier_expect(empty + slots, bytes - 16);"),
        (
            "for (int k = 0; k < slots; k++)\n                request();",
            "for (int k = 0; k < slots - 1; k++) request();",
        ),
        ("barrier_wait(empty + slots, 0);", ";"),
        ("barrier_wait_together(full + now, parity);", ";"),
        ("parity ^= slot == 0;", ";"),
        ("parity ^= slot == 0;", "parity ^= 1;"),
        ("barrier_arrive(empty + in_slot);", ";"),
        ("(threadIdx.x & 31) == 0", "threadIdx.x == 0"),
        ("barrier_wait(empty + next_slot, next_parity);", ";"),
        ("next_parity ^= next_slot == 0;", ";"),
        ("next_parity ^= next_slot == 0;", "next_parity ^= 1;"),
        ("ahead = 1;", ";"),
        ("done(now);", ";"),
    ],
    "tile.cuh": [
        # bytes and barriers
        ("stream.stop();", ";"),
        ("stream.done(slot);", ";"),
    ],
    "backward.cu": [
        ("stream.done(slot);", ";"),
    ],
    "product.cu": [
        ("stream.done(now);", ";"),
    ],
}
# What one battery alone goes through.
OF_BRACKETS, OF_SETS = ("sample.cu", "bracket.cu"), ("marks.cuh", "sets.cuh", "logits.cu")
COMMON, ON_HOPPER = (
    [(name, *pair) for name, pairs in mutants.items() for pair in pairs]
    for mutants in (MUTANTS, HOPPER)
)
NUMBERED = COMMON + ON_HOPPER  # from 1 on


def plant(folder):
    """The sources with every mutant in them; number k acts where hex_emu_mutant(k) was called."""
    shutil.copytree(emulator.ROOT / "csrc", folder / "csrc")
    source = folder / "csrc/cuda"
    for name in MUTANTS:
        text = (source / name).read_text()
        # so that few columns are many tiles
        text = text.replace("#define MOST_TILES 256", "#define MOST_TILES 2")
        for old in dict.fromkeys(old for file, old, _ in NUMBERED if file == name):
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
def libraries(tmp_path_factory):
    """Without and with Hopper's instructions."""
    folder = tmp_path_factory.mktemp("mutants")
    sources = plant(folder)
    return [
        emulator.Emulator(emulator.compile(folder / f"{name}.so", "-w", *flags, sources=sources))
        for name, flags in (("mma", ()), ("wgmma", ("-DHEX_WGMMA",)))
    ]


def chosen():
    """The numbers of the mutants that HEX_MUTANTS leaves."""
    share, _, first = os.environ.get("HEX_MUTANTS", "1").partition(":")
    every = int(share)
    begin = int(first) if first else int(os.environ["HEX_SEED"]) % every
    print(f"\nplanted errors: HEX_MUTANTS={every}:{begin} of {len(NUMBERED)}")
    return range(1 + begin, len(NUMBERED) + 1, every)


def finds_nothing(mutants, devices, file=""):
    """Whether the batteries, or those of a file, are right and meet no bank conflicts."""
    for seed, device in devices:
        mutants.seed(seed)
        mutants.device(*device)
        before = mutants.conflicts
        try:
            if file not in OF_SETS + OF_BRACKETS:
                batteries.battery()
                batteries.battery_of_blocks()
                batteries.battery_of_weights(mutants)
                mutants.device(*device)
            if file not in OF_BRACKETS:
                set_batteries.battery_of_sets()
            if file not in OF_SETS:
                batteries.battery_of_brackets(mutants)
        except (AssertionError, RuntimeError):
            return False
        if mutants.conflicts > before:
            return False
    return True


def is_missed(mutants, number, devices, seconds):
    """The same with a mutant, in a process of its own, which ends after so many seconds."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(seconds)  # an endless loop
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # what the emulation says of a deadlock
            mutants.library.hex_emu_mutant(number)
            with mutants.in_use():
                file = NUMBERED[number - 1][0] if number else ""
                code = 0 if finds_nothing(mutants, devices, file) else 1
        finally:
            os._exit(code)
    return os.waitpid(child, 0)[1] == 0


@pytest.mark.timeout(3600)
@pytest.mark.skipif(emulator.SANITIZED, reason="the errors are meant to happen")
def test_the_battery_finds_every_planted_error(libraries, capsys):
    mma, wgmma = libraries
    with capsys.disabled():
        numbers = chosen()
    devices = list(zip(emulator.SEEDS, emulator.DEVICES, strict=True))
    other_way = devices[::-1]  # the largest blocks first, of those that Hopper has
    started = time.monotonic()
    assert is_missed(mma, 0, devices, 600) and is_missed(wgmma, 0, other_way, 600)
    seconds = 60 + 2 * int(time.monotonic() - started)

    def missed(number):
        common = number <= len(COMMON)
        return (not common or is_missed(mma, number, devices, seconds)) and is_missed(
            wgmma, number, other_way, seconds
        )

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(missed, numbers))
    assert not [NUMBERED[n - 1] for n, m in zip(numbers, found, strict=True) if m]
