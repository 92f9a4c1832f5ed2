/* SPDX-License-Identifier: MIT */
/* Tiles, and the order in which threads take them. Where many anchors share their candidates, their
 * cosines are computed by tiles, a block of anchors against a block of candidates; what is done with a
 * tile is in tiles.h. In ntxent c_ij = c_ji, so half of the tiles do.
 *
 * Every number of the result is a sum over tiles, so each block must meet its tiles in one order,
 * whatever the number of threads. The order is made of rounds in which no block is in two tiles, as
 * in the games of a tournament. Threads draw tickets in that order, and a tile waits until both of
 * its blocks have done their earlier tiles. It waits for lower tickets only, which other threads hold
 * already, so chunks that run one after another cannot block each other. A thread that waits gives
 * up the processor. */
#ifndef HEX_SCHEDULE_H
#define HEX_SCHEDULE_H

#include "blocks.h"

/* The rows that meet, as ranges of unit rows; blocks of them. A block of candidates is a multiple
 * of every NR, one of anchors of every MR, and a tile of cosines fits the second-level cache. */
typedef struct {
    range_t anchors, candidates;
    int64_t row_block, column_block;
    bool symmetric; /* both are the same */
    bool both;      /* candidates are anchors too */
} field_t;

#define LARGEST_BLOCK (sizeof(real) > 4 ? 96 : 192)

static field_t field_of(const hex_problem_t *p)
{
    const bool symmetric = p->mode == HEX_NTXENT;
    const range_t anchors = symmetric ? (range_t){0, p->B + p->M} : rows_of(p, 0);
    const int64_t rows = anchors.end, most = LARGEST_BLOCK;
    /* small blocks where there are few, for they are what threads share */
    const int64_t few = symmetric      ? (rows <= 1024 ? 96 : 192)
                        : rows <= 384  ? 48
                        : rows <= 1536 ? 96
                                       : 192;
    const int64_t block = few < most ? few : most;
    return (field_t){anchors,   met_by(p, 0),
                     block,     symmetric ? block : most,
                     symmetric, symmetric || p->mode == HEX_CROSS};
}

static void count_blocks(const field_t *f, int64_t *blocks)
{
    blocks[0] = (f->anchors.end - f->anchors.begin + f->row_block - 1) / f->row_block;
    blocks[1] = (f->candidates.end - f->candidates.begin + f->column_block - 1) / f->column_block;
}

static int64_t count_tiles(const field_t *f)
{
    int64_t n[2];
    count_blocks(f, n);
    return f->symmetric ? n[0] * (n[0] + 1) / 2 : n[0] * n[1];
}

/* From row to row of a tile: an odd number of cache lines, see stride_of. */
static int64_t tile_stride(const field_t *f)
{
    return f->column_block + 64 / (int64_t)sizeof(real);
}

/* Room for the cosines that are kept for the backward: for the rows of few candidates, which never
 * go by tiles, and else for tiles of the largest blocks, which take no less than those in use. Of the
 * sizes no more is asked than whether there are enough columns, for torch.compile has to write it
 * down for all of them (kept_numbers in hex/ops.py); memory that is not used is never touched. *used:
 * whether the core has a use for it. */
static int64_t kept_room(const hex_problem_t *p, bool *used)
{
    *used = p->mode < HEX_PAIRED;
    if (!*used)
        return 0;
    if (p->block || columns_of(p) < ENOUGH)
        return kept_numbers(p);
    field_t f = field_of(p);
    f.row_block = f.column_block = LARGEST_BLOCK;
    const int64_t room =
        count_tiles(&f) * f.row_block * tile_stride(&f) + KEPT_ROWS * (ENOUGH + KEPT_LINE);
    *used = by_tiles(p) || kept_numbers(p) <= room;
    return room;
}

/* ---- the order ---- */

/* A tile: unit rows from i on, `rows` of them, of a block of anchors, against those from j on. */
typedef struct {
    int64_t i, rows, j, columns, ld;
    real *c;   /* cosines, c[a * ld + b]; whole register tiles may be written */
    real *out; /* room for as many other numbers, maybe c itself */
} tile_t;

typedef void (*tile_function_t)(void *context, const tile_t *t, real *scratch);

typedef struct {
    const unit_t *unit;
    const panels_t *panels; /* of the candidates */
    field_t field;
    int64_t blocks[2]; /* of anchors, of candidates */
    int64_t scratch;   /* numbers of scratch for the function, beside the tile's */
    tile_function_t visit;
    void *context;
    real *kept; /* cosines of all tiles, if there is room; */
    bool keep;  /* to be written, or written by an earlier pass */
    atomic_long ticket;
    atomic_int *done[2]; /* tiles that a block has behind it; one array in a symmetric field */
    atomic_bool no_memory;
} schedule_t;

typedef struct {
    int64_t block[2],
        before[2]; /* the two blocks of a tile, and how many tiles each has done before */
} meeting_t;

/* Of a symmetric field: first each block with itself, then rounds by the circle method, which wants
 * an even number of blocks; of an odd number, each sits out once, block b in round b. */
static meeting_t symmetric_meeting(const schedule_t *t, int64_t ticket)
{
    const int64_t n = t->blocks[0], even = n + n % 2, circle = even - 1, each = n / 2;
    if (ticket < n)
        return (meeting_t){{ticket, ticket}, {0, 0}};
    const int64_t round = (ticket - n) / each, nth = (ticket - n) % each + n % 2;
    const int64_t I = nth == 0 ? circle : (round + nth) % circle;
    const int64_t J = nth == 0 ? round : (round - nth + circle) % circle;
    const int64_t low = I < J ? I : J, high = I < J ? J : I;
    return (meeting_t){{low, high},
                       {round + 1 - (n % 2 && low < round), round + 1 - (n % 2 && high < round)}};
}

/* Of two kinds of blocks: in round r, block g of the fewer meets block (g + r) % `more` of the
 * others. */
static meeting_t mixed_meeting(const schedule_t *t, int64_t ticket)
{
    const int large = t->blocks[1] >= t->blocks[0];
    const int64_t few = t->blocks[1 - large], more = t->blocks[large];
    const int64_t round = ticket / few, g = ticket % few, x = (g + round) % more;
    /* x has met g' = (x - r) mod more in round r, where that is one of the few */
    const int64_t from = x - round + 1, last = x < few ? x : few - 1;
    int64_t before = last - (from > 0 ? from : 0) + 1;
    before = before > 0 ? before : 0;
    if (from < 0 && few > more + from)
        before += few - (more + from);
    meeting_t m;
    m.block[1 - large] = g, m.before[1 - large] = round;
    m.block[large] = x, m.before[large] = before;
    return m;
}

static void wait_for(atomic_int *done, int64_t tiles)
{
    while (atomic_load_explicit(done, memory_order_acquire) < tiles)
        sched_yield();
}

static void run_meetings(int64_t begin, int64_t end, void *context)
{
    (void)begin, (void)end; /* a chunk is a thread: all draw from one pile */
    schedule_t *t = context;
    const field_t *f = &t->field;
    const int64_t ld = tile_stride(f), size = f->row_block * ld;
    const int64_t tiles = count_tiles(f);
    real *scratch = allocate(size + t->scratch, 1, sizeof(real));
    if (!scratch)
        t->no_memory = true; /* but the rounds go on, for other threads may wait for them */
    else
        memset(scratch, 0, (size_t)size * sizeof(real));
    for (;;) {
        const int64_t ticket = atomic_fetch_add(&t->ticket, 1);
        if (ticket >= tiles)
            break;
        const meeting_t m = f->symmetric ? symmetric_meeting(t, ticket) : mixed_meeting(t, ticket);
        const int64_t I = m.block[0], J = m.block[1];
        const bool one = f->symmetric && I == J;
        wait_for(&t->done[0][I], m.before[0]);
        if (!one)
            wait_for(&t->done[1][J], m.before[1]);
        if (scratch) {
            const int64_t i = f->anchors.begin + I * f->row_block,
                          j = f->candidates.begin + J * f->column_block;
            const int64_t rows = f->anchors.end - i, columns = f->candidates.end - j;
            tile_t tile = {.i = i,
                           .rows = rows < f->row_block ? rows : f->row_block,
                           .j = j,
                           .columns = columns < f->column_block ? columns : f->column_block,
                           .ld = ld,
                           .c = scratch,
                           .out = scratch};
            if (t->kept)
                tile.c =
                    t->kept + size * (f->symmetric ? J * (J + 1) / 2 + I : I * t->blocks[1] + J);
            if (!t->kept || t->keep)
                cosines(t->unit, i, tile.rows, t->panels, j - f->candidates.begin, tile.columns,
                        tile.c, ld);
            t->visit(t->context, &tile, scratch + size);
        }
        atomic_store_explicit(&t->done[0][I], (int)m.before[0] + 1, memory_order_release);
        if (!one)
            atomic_store_explicit(&t->done[1][J], (int)m.before[1] + 1, memory_order_release);
    }
    release(scratch);
}

/* Every tile once, `visit` with each; work: operations a cosine, roughly. kept: all tiles' cosines,
 * which are written there (keep) or are there already; or NULL. */
static const char *for_each_tile(schedule_t *t, int64_t work)
{
    const field_t *f = &t->field;
    count_blocks(f, t->blocks);
    const int64_t n = t->blocks[0] + (f->symmetric ? 0 : t->blocks[1]);
    atomic_int *done = allocate(n, 1, sizeof *done);
    if (!done)
        return HEX_NO_MEMORY;
    for (int64_t b = 0; b < n; b++)
        atomic_init(&done[b], 0);
    t->done[0] = done;
    t->done[1] = f->symmetric ? done : done + t->blocks[0];
    const bool ran =
        hex_parallel_for(count_tiles(f), f->row_block * f->column_block * work, run_meetings, t);
    release(done);
    return !ran ? HEX_NO_THREADS : t->no_memory ? HEX_NO_MEMORY : NULL;
}

#endif
