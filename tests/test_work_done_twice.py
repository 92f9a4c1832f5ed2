# SPDX-License-Identifier: MIT
"""Whether test_work.py finds work that is done twice: each entry of PLANTED is such work, planted
in the core's source, of which a count must then be too high. Part of `make thorough`.
"""

import itertools
import re
import shutil

import pytest
import test_work
from test_work import SMALLER
from work import ROOT, build

from hex import ops

pytestmark = test_work.pytestmark

TWICE = "for (int twice = 0; twice < 2; twice++) "
# What is planted: the file, what it stands before or takes the place of, and the text.
PLANTED = {
    "every tile is gone through twice, its cosines made once":
        ("schedule.h", r"(?=t->visit\(t->context, &tile,)", TWICE),
    "the cosines of a tile are made twice":
        ("schedule.h", r"(?=cosines\(t->unit, i, tile\.rows)", TWICE),
    "kept cosines are made again":
        ("tiles.h", r"if \(!p->kept\)((?s:.*?))panels, p->kept\)", r"if (true)\1panels, NULL)"),
    "no use is made of symmetry":
        ("schedule.h", r"const bool symmetric = p->mode == HEX_NTXENT", "const bool symmetric = 0"),
    "rows are gathered twice":
        ("tiles.h", r"(?=accumulate\(g->unit)", TWICE),
    "columns are gathered twice":
        ("tiles.h", r"(?=accumulate_transposed\(g->unit)", TWICE),
    "an exponential for the row and one for the column":
        ("tiles.h", r"x = \(c\[j\] - 1\) \* scale, e = ", "x = (c[j] - 1) * scale, "
         "column_e = exp2_of(x), e = 0 * column_e + "),
    "the threshold has a pass of its own":
        ("entry.h", r"return (?=by_tiles\(p\) && listed)", "return false && "),
    "labels: the threshold has a pass of its own":
        ("entry.h", r"const bool listed = .*;", "const bool listed = !p->several;"),
    "the bound is made twice":
        ("quantile.h", r"(?=cosines\(&b->sampled, 0, m)", TWICE),
    "twice as many rows are sampled":
        ("quantile.h", r"<= 1024 \? 128 : 256", "<= 1024 ? 256 : 512"),
    "a list's quantile is selected twice":
        ("quantile.h", r"q->threshold\.low\[i\] = (?=cosine\()",
         "select_above(list.to, list.length, k, limit), q->threshold.low[i] = "),
    "every row is normalised twice":
        ("unit.h", r"c->unit->inverse\[i\] = (?=normalize\()",
         "normalize(u, D), c->unit->inverse[i] = "),
    "the positive's cosine is made for either row":
        ("quantile.h", r"s->cp\[i \+ s->p->B\] = s->cp\[i\];",
         "s->cp[i + s->p->B] = (double)positive_cosine(s->p, &s->in.unit, i + s->p->B);"),
    "row by row, the cosines are made twice":
        ("visit.h", r"(?=cosines\(c->some \?)", TWICE),
    "row by row, a row's quantile is selected twice":
        ("quantile_rows.h", r"(?=t->low\[at\] = cosine\(select_near\()", TWICE),
    "row by row, the gradient gathers twice":
        ("blocks.h", r"(?=accumulate\(unit, slice\.begin)", TWICE),
    "row by row, entries are made twice":
        ("blocks.h", r"(?=row_entries\(r\.v, r\.s, columns)", TWICE),
    "a block's cosines are made again for its gradient":
        ("blocks.h", r"return (?=keeps_cosines\(c->p\))", "return false && "),
    "a block's rows have a list each of a limit of their own":
        ("select.h", r"(?=if \(near->limit != near->limit\))", "near->limit = (real)NAN; "),
    "of a block, an exponential for the row and one for the column":
        ("blocks.h", r"c->one_shift = one_shift", "c->one_shift = false"),
    "an anchor's own negatives are multiplied twice":
        ("visit.h", r"(?=own->c\[j\] = \(real\)dot_product\()", TWICE),
    "row by row, the guide's cosines are made twice":
        ("visit.h", r"(?=cosines\(&c->in->guide)", TWICE),
    "row by row, the sets of a row are found twice":
        ("row.h", r"const sets_t of = (?=row_sets\()",
         "row_sets(r, eps, &hard, &unknown); const sets_t of = "),
    "many logits: sums are made twice":
        ("onepass_logits.h", r"l->sums = (?=row_sums\()", "l->sums = " + "row_sums(&r, 0, 0, "
         "l->limit, 1, 0, HARD_NONE, true, true), l->sums = "),
    "many logits: every row is done again":
        ("onepass_logits.h", r"if \(l->again \|\| ", "if (true || "),
    "logits: entries are made twice":
        ("blocks.h", r"(?=logits_entries\(&r, out)", TWICE),
    "row by row, kept cosines are made again for the loss":
        ("entry.h", r"with\.filled = keeps_cosines\(p\)", "with.filled = false"),
}  # fmt: skip


def is_found(core) -> bool:
    """By each mode by tiles and by rows, or by a loss of labels or logits."""
    attempts = [
        (test_work.test_a_loss_of_logits,),
        (test_work.test_many_logits_are_read_once_for_threshold_and_loss,),
    ]
    for mode, sizes in (case.values for case in SMALLER):
        attempts += [
            (test_work.test_a_loss_with_its_threshold_given, mode, sizes, 1),
            (test_work.test_a_loss_that_finds_its_threshold, mode, sizes, "gauss", 0, 0),
            (test_work.test_a_loss_that_finds_its_threshold, mode, sizes, "tight", 0, 1),
        ]
    attempts += [(test_work.test_a_block_takes_its_share_of_the_work, "ntxent")]
    for mode, guided in itertools.product(("ntxent", "query"), (False, True)):
        attempts.append((test_work.test_a_labelled_loss, mode, guided, 0))
    try:
        for test, *arguments in attempts:
            test(core, *arguments)
    except AssertionError:
        return True
    return False


def test_nothing_is_found_where_nothing_is_planted(tmp_path):
    assert not is_found(build(ops.isa(), tmp_path / "core.so"))


@pytest.mark.parametrize("planted", PLANTED)
def test_work_done_twice_is_found(planted, tmp_path):
    file, pattern, text = PLANTED[planted]
    csrc = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", csrc)
    path = csrc / "cpu" / file
    changed, places = re.subn(pattern, text, path.read_text())
    assert places == 1
    path.write_text(changed)
    assert is_found(build(ops.isa(), tmp_path / "core.so", csrc, floats_only=True))
