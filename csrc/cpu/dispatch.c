/* SPDX-License-Identifier: MIT */
/* Which level of the CPU core runs: chosen once, when the extension is loaded. HEX_ISA names another,
 * so that every level can be tested on one machine.
 *
 * The last two differ from avx512 for bfloat16 inputs. avx512_bf16 is chosen by itself on CPUs of AMD
 * alone: vdpbf16ps is as fast as a multiply-add of floats there (Zen 4, Zen 5), while on Sapphire
 * Rapids it takes four times as long, so that floats are faster. avx512_amx is chosen where it is. */
#include "cpu.h"

#ifdef HEX_HAVE_AMX_LEVEL
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

static const hex_cpu_entry_t *entry[2]; /* float, double; since hex_cpu_select */

typedef struct {
    const char *name;
    const hex_cpu_entry_t *type[2]; /* float, double; NULL: that of the level before */
} level_t;

static const level_t base = {"base", {&hex_cpu_base_f32, &hex_cpu_base_f64}};
#ifdef HEX_HAVE_X86_LEVELS
static const level_t avx2 = {"avx2", {&hex_cpu_avx2_f32, &hex_cpu_avx2_f64}};
static const level_t avx512 = {"avx512", {&hex_cpu_avx512_f32, &hex_cpu_avx512_f64}};
#endif
#ifdef HEX_HAVE_BF16_LEVEL
static const level_t avx512_bf16 = {"avx512_bf16", {&hex_cpu_avx512_bf16_f32, NULL}};
#endif
#ifdef HEX_HAVE_NEON_LEVEL
static const level_t neon = {"neon", {&hex_cpu_neon_f32, &hex_cpu_neon_f64}};
#endif

#ifdef HEX_HAVE_AMX_LEVEL
static const level_t avx512_amx = {"avx512_amx", {&hex_cpu_avx512_amx_f32, NULL}};

/* Whether the CPU has tiles of bfloat16, and the kernel lets this process use them. */
static bool may_use_tiles(void)
{
#ifdef HEX_EMULATE_BF16
    return true;
#else
    enum { LEAF = 7, BF16 = 1 << 22, TILE = 1 << 24, REQUEST = 0x1023, TILE_DATA = 18 };
    unsigned int a, b, c, d;
    return __get_cpuid_count(LEAF, 0, &a, &b, &c, &d) && (d & BF16) && (d & TILE) &&
           syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
#endif
}
#endif

static bool supported(const level_t *l)
{
#ifdef HEX_HAVE_X86_LEVELS
    __builtin_cpu_init();
    if (l == &avx2)
        return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (l == &avx512)
        return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
               __builtin_cpu_supports("fma");
#endif
#ifdef HEX_HAVE_BF16_LEVEL
#ifdef HEX_EMULATE_BF16
    if (l == &avx512_bf16)
        return supported(&avx2);
#else
    if (l == &avx512_bf16)
        return supported(&avx512) && __builtin_cpu_supports("avx512bf16");
#endif
#endif
#ifdef HEX_HAVE_NEON_LEVEL
    if (l == &neon)
        return true; /* every aarch64 has it */
#endif
#ifdef HEX_HAVE_AMX_LEVEL
    if (l == &avx512_amx)
        return supported(&avx512_bf16) && may_use_tiles();
#endif
    return l == &base;
}

static bool only_by_name(const level_t *l)
{
#ifdef HEX_EMULATE_BF16
    return strcmp(l->name, "avx512_bf16") == 0 || strcmp(l->name, "avx512_amx") == 0;
#elif defined(HEX_HAVE_BF16_LEVEL)
    return l == &avx512_bf16 && !__builtin_cpu_is("amd");
#else
    (void)l;
    return false;
#endif
}

const char *hex_cpu_select(const char *wanted, const char **problem)
{
    static const level_t *const levels[] = {
        &base,
#ifdef HEX_HAVE_NEON_LEVEL
        &neon,
#elif defined(HEX_HAVE_X86_LEVELS)
        &avx2,
        &avx512,
#endif
#ifdef HEX_HAVE_BF16_LEVEL
        &avx512_bf16,
#endif
#ifdef HEX_HAVE_AMX_LEVEL
        &avx512_amx,
#endif
    };
    const int count = sizeof levels / sizeof *levels;
    const level_t *level = NULL;
    bool named = !wanted || !*wanted;
    *problem = NULL;
    for (int i = 0; i < count; i++) {
        const bool chosen = wanted && strcmp(wanted, levels[i]->name) == 0;
        named |= chosen;
        if (supported(levels[i]) && (chosen || !only_by_name(levels[i]))) {
            level = levels[i];
            for (int wide = 0; wide < 2; wide++)
                if (level->type[wide])
                    entry[wide] = level->type[wide];
        } else if (chosen)
            *problem = "this CPU does not have it";
        if (chosen)
            break;
    }
    static const char *const all[] = {"neon", "avx2", "avx512", "avx512_bf16", "avx512_amx"};
    for (size_t i = 0; !named && i < sizeof all / sizeof *all; i++)
        if (strcmp(wanted, all[i]) == 0) {
            *problem = "this build does not have it";
            named = true;
        }
    if (!named)
        *problem = "wanted base, neon, avx2, avx512, avx512_bf16 or avx512_amx";
    return named ? level->name : NULL;
}

const char *hex_cpu_forward(const hex_problem_t *p, void *loss, void *stats)
{
    return entry[p->compute_f64]->forward(p, loss, stats);
}

const char *hex_cpu_backward(const hex_problem_t *p, const hex_gradient_t *g)
{
    return entry[p->compute_f64]->backward(p, g);
}

const char *hex_cpu_adaptive(const hex_problem_t *p, hex_tracker_t *t, void *loss, void *stats)
{
    return entry[p->compute_f64]->adaptive(p, t, loss, stats);
}

const char *hex_cpu_threshold(const hex_problem_t *p, double quantile, bool over_negatives,
                              double *mean)
{
    return entry[p->compute_f64]->threshold(p, quantile, over_negatives, mean);
}

const char *hex_cpu_row_range(const hex_problem_t *p, void *low, void *high)
{
    return entry[p->compute_f64]->row_range(p, low, high);
}

const char *hex_cpu_row_quantiles(const hex_problem_t *p, double quantile, bool over_negatives,
                                  void *rows)
{
    return entry[p->compute_f64]->row_quantiles(p, quantile, over_negatives, rows);
}

int64_t hex_cpu_kept(const hex_problem_t *p, bool *used)
{
    return entry[p->compute_f64]->kept(p, used);
}
