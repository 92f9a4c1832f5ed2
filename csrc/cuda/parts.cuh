// SPDX-License-Identifier: MIT
// How the work of a call is cut: which rows meet which columns, in blocks of rows and slices of
// columns, on the host, for launch.cu.
#pragma once
#include "core.cuh"

#define TILE 64

static int64_t cut(int64_t n, int64_t by) { return (n + by - 1) / by; }

static void add_part(hex_parts &parts, int64_t row0, int64_t row1, int64_t col0, int64_t col1)
{
    if (row0 < row1)
        parts.part[parts.count++] = {row0, row1, col0, col1, 0, 0, 0, 0, 0};
}

// In the place of `places` below, for a block of anchors: slices that depend on the columns alone,
// not on how many rows there are, so that the bits of a row do not depend on the cut of the batch.
// A rank may have few rows, so that they are many (`limit`), of two tiles at least.
#define ANY_ROWS (-1)
#define ANY_SLICES 32

// Blocks of rows, and slices of at most `most` tiles; both begin at a multiple of TILE. `places` is
// how many blocks the device runs at a time: the slices are as many as leave the fewest of them
// idle at the end, and no more than `limit`.
static void slice_parts(hex_parts &parts, int64_t rows, int64_t most, int64_t places,
                        int64_t limit = ANY_SLICES)
{
    int64_t blocks = 0, longest = 1;
    for (int k = 0; k < parts.count; k++) {
        const hex_part &part = parts.part[k];
        const int64_t tiles = cut(part.col1 - part.col0 / TILE * TILE, TILE);
        blocks += cut(part.row1 - part.row0 / TILE * TILE, rows);
        longest = tiles > longest ? tiles : longest;
    }
    // Rounds of blocks times the tiles of each, and a little for the start of a block.
    int64_t wanted = 1, least = INT64_MAX;
    for (int64_t n = 1; places > 0 && n <= limit && n <= longest; n++) {
        const int64_t cost = cut(blocks * n, places) * (8 * cut(longest, n) + 8);
        if (cost < least)
            wanted = n, least = cost;
    }
    parts.blocks = parts.row_blocks = parts.rows = 0;
    for (int k = 0; k < parts.count; k++) {
        hex_part &part = parts.part[k];
        const int64_t tiles = cut(part.col1 - part.col0 / TILE * TILE, TILE);
        const int64_t fewest = cut(tiles, most);
        if (places == ANY_ROWS)
            wanted = cut(tiles, 2) < limit ? cut(tiles, 2) : limit;
        const int64_t slices = wanted > fewest ? wanted : fewest;
        part.tiles = slices < tiles ? cut(tiles, slices) : 1;
        part.slices = tiles > 0 ? cut(tiles, part.tiles) : 1;
        part.row_blocks = cut(part.row1 - part.row0 / TILE * TILE, rows);
        part.first_block = parts.blocks;
        part.first_row = parts.rows;
        parts.blocks += part.row_blocks * part.slices;
        parts.row_blocks += part.row_blocks;
        parts.rows += part.row1 - part.row0;
    }
}

static int64_t most_slices(const hex_parts &parts)
{
    int64_t most = 0;
    for (int k = 0; k < parts.count; k++)
        most = parts.part[k].slices > most ? parts.part[k].slices : most;
    return most;
}

// The block's rows of z0 against some columns, and of z1; where that is all rows, they are one part.
static void add_views(const hex_problem_t &p, hex_parts &parts, bool z0, bool z1, int64_t col0,
                      int64_t col1)
{
    const int64_t B = p.B, end = p.first + p.count;
    const int64_t end1 = p.first + hex_block_rows(&p, 1); // of z1 there may be other numbers
    if (z0 && z1 && p.count == B)
        return add_part(parts, 0, B + p.M, col0, col1);
    if (z0)
        add_part(parts, p.first, end, col0, col1);
    if (z1)
        add_part(parts, B + p.first, B + end1, col0, col1);
}

// The anchors and their candidates.
static void anchor_parts(const hex_problem_t &p, hex_parts &parts)
{
    const int64_t B = p.B, views = p.B + p.M;
    switch (p.mode) {
    case HEX_NTXENT:
        add_views(p, parts, true, true, 0, views);
        break;
    case HEX_QUERY:
    case HEX_CROSS:
        add_views(p, parts, true, false, B, views);
        if (p.mode == HEX_CROSS)
            add_views(p, parts, false, true, 0, B);
        break;
    case HEX_UNPAIRED: // rows of z1 are seen only where positives are several
        add_views(p, parts, true, false, p.several ? B : views, views + p.K);
        break;
    default:
        add_views(p, parts, true, false, 0, 0);
    }
}

// The rows whose gradient is wanted, and those they meet as an anchor or as a candidate. A queue is
// met by all anchors, those of the other ranks too.
static void owner_parts(const hex_problem_t &p, const hex_gradient_t &g, hex_parts &parts)
{
    const int64_t B = p.B, views = p.B + p.M;
    switch (p.mode) {
    case HEX_NTXENT:
        add_views(p, parts, g.dz[0], g.dz[1], 0, views);
        break;
    case HEX_QUERY:
    case HEX_CROSS:
        add_views(p, parts, g.dz[0], false, B, views);
        add_views(p, parts, false, g.dz[1], 0, B);
        break;
    case HEX_UNPAIRED:
        add_views(p, parts, g.dz[0], false, p.several ? B : views, views + p.K);
        if (p.several)
            add_views(p, parts, false, g.dz[1], 0, B);
        if (g.dz[2])
            add_part(parts, views, views + p.K, 0, B);
        break;
    default:
        add_views(p, parts, g.dz[0], false, 0, 0);
    }
}

// Of all parts what lies in some rows.
static hex_parts band_of(const hex_parts &all, hex_span rows)
{
    hex_parts band = {};
    for (int k = 0; k < all.count; k++) {
        const hex_part &part = all.part[k];
        const hex_span both = common({part.row0, part.row1}, rows);
        add_part(band, both.begin, both.end, part.col0, part.col1);
    }
    return band;
}

static int64_t most_tiles(const hex_parts &parts)
{
    int64_t most = 0;
    for (int k = 0; k < parts.count; k++) {
        const int64_t tiles = cut(parts.part[k].col1, TILE) - parts.part[k].col0 / TILE;
        most = tiles > most ? tiles : most;
    }
    return most;
}

// Of the parts' tiles of columns some from the first-th on; a part keeps its place though none of
// its are left.
static hex_parts columns_of(hex_parts parts, int64_t first, int64_t tiles)
{
    for (int k = 0; k < parts.count; k++) {
        hex_part &part = parts.part[k];
        const int64_t tile = part.col0 / TILE + first;
        const hex_span both = common({part.col0, part.col1}, {tile * TILE, (tile + tiles) * TILE});
        part.col0 = both.begin < both.end ? both.begin : part.col1 / TILE * TILE;
        part.col1 = both.begin < both.end ? both.end : part.col0;
    }
    return parts;
}
