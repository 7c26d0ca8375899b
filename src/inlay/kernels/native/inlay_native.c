/* Inlay's CPU kernels: no libtorch, no OpenMP library of their own, one shared object.
 *
 * kernels.h holds every loop and is compiled once for each instruction set; the widest that the
 * CPU has runs. product.h is for the widest alone. Threads come from the OpenMP runtime that is already in the process: its
 * GOMP_parallel is handed in as an address, and without it everything runs on one thread.
 */
#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

enum { F32, BF16, F16 };
enum { GENERIC, AVX2, AVX512, AVX512_BF16, AMX };
enum { BLOCK = 64, NESTED_BLOCK = 256, TILE = 512 };

#define SMALLEST 1e-38f
#define ROUNDER 12582912.0f /* 1.5 * 2^23: adding it rounds to an integer, ties to even */

static const float QUANTILES[16] = {
    -1.0f, -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f,
};

#define MIDPOINT(i) ((QUANTILES[i] + QUANTILES[(i) + 1]) / 2)

typedef void (*task)(const void *args, int64_t begin, int64_t end);
typedef void (*parallel_region)(void (*body)(void *), void *data, unsigned threads, unsigned flags);

struct nf4 {
    const uint8_t *packed;
    int64_t bytes;
    const float *absmax; /* null with double quantisation */
    const uint8_t *codes;
    const float *nested_absmax, *nested_map;
    float offset;
};
struct quantize_args { const void *x; int dtype; int64_t count; uint8_t *packed; float *absmax; };
struct nest_args {
    const float *absmax; int64_t count; float offset; const float *midpoints;
    uint8_t *codes; float *scale;
};
struct dequantize_args { struct nf4 w; void *out; int dtype; int64_t first, count; };
struct to_int8_args { struct nf4 w; int8_t *q; float *scale; int64_t first, columns; };
struct int8_args { const int8_t *q; const float *absmax; void *out; int dtype; int64_t columns; };
struct int8_quantize_args {
    const void *x; int dtype; int64_t columns; int8_t *q; float *absmax;
};
struct rescale_args {
    const int32_t *sums; const float *rows, *columns; void *out; int dtype; int64_t stride, width;
};
struct loss_args {
    float *logits; int64_t stride, vocabulary; const int64_t *labels;
    float *log_p, *entropy; uint8_t *top1;
};
struct loss_part_args {
    float *logits; int64_t first, count; const int64_t *labels;
    float *highest, *at_label; double *total, *weighted; float *scale; void *out; int dtype;
};
struct norm_args {
    const void *x, *w, *g; void *out; float *rstd; int dtype; int64_t columns; float eps;
};
struct gate_args { const void *gate, *up, *g; void *h, *g_gate, *g_up; int dtype; int64_t count; };

struct kernels {
    task quantize, nest, dequantize, to_int8, int8_dequantize, int8_quantize, rescale, loss,
        loss_part, norm, norm_backward, gate, gate_backward;
};

#define PASTE_(a, b) a##_##b
#define PASTE(a, b) PASTE_(a, b)
#define NAME(x) PASTE(x, SET)

#define SET generic
#define LEVEL 0
#include "kernels.h"
#undef SET
#undef LEVEL

#if defined(__x86_64__)
#define SET avx2
#define LEVEL 1
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SET
#undef LEVEL

#define SET avx512
#define LEVEL 2
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,prefer-vector-width=512")
#endif
#include "kernels.h"
#include "product.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#undef SET
#undef LEVEL

/* bfloat16 arithmetic, and tiles, where the compiler knows them. */
#if (defined(__clang__) && __clang_major__ >= 12) || (!defined(__clang__) && __GNUC__ >= 11)
#define HAS_HALVES 1
#define HAS_TILES 1
#define TILED __attribute__((target("amx-tile,amx-bf16")))
#if defined(__clang__)
#pragma clang attribute push( \
    __attribute__((target("avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16"))), \
    apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target( \
    "avx2,fma,f16c,avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,prefer-vector-width=512")
#endif
#include "halves.h"
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif
#endif
#ifndef HAS_HALVES
#define HAS_HALVES 0
#define HAS_TILES 0
#endif

static parallel_region region = 0;
static const struct kernels *chosen = &kernels_generic;
static int level_in_use = GENERIC;

/* Threads come from this GOMP_parallel; null means none. */
void inlay_set_runtime(parallel_region gomp_parallel) { region = gomp_parallel; }

#if HAS_TILES && defined(__linux__)
/* Whether the CPU has tiles, and the kernel lets this process use their registers. */
static int allows_tiles(void) {
    enum { REQUEST = 0x1023, TILE_DATA = 18 };
    unsigned a, b, c, d;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return 0;
    return (d >> 22 & 1) && (d >> 24 & 1) && !syscall(SYS_arch_prctl, REQUEST, TILE_DATA);
}
#else
static int allows_tiles(void) { return 0; }
#endif

int inlay_best_level(void) {
#if defined(__x86_64__)
    __builtin_cpu_init();
    int avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
    if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")) {
        if (!HAS_HALVES || !__builtin_cpu_supports("avx512bf16")) return AVX512;
        return allows_tiles() ? AMX : AVX512_BF16;
    }
    if (avx2) return AVX2;
#endif
    return GENERIC;
}

void inlay_set_level(int level) {
    chosen = &kernels_generic;
#if defined(__x86_64__)
    if (level == AVX2) chosen = &kernels_avx2;
    if (level >= AVX512) chosen = &kernels_avx512;
#endif
    level_in_use = level;
}

struct work { task run; const void *args; int64_t items, grain, next; };

static void take_pieces(void *data) {
    struct work *w = data;
    for (;;) {
        int64_t begin = __atomic_fetch_add(&w->next, w->grain, __ATOMIC_RELAXED);
        if (begin >= w->items) return;
        int64_t end = begin + w->grain;
        w->run(w->args, begin, end < w->items ? end : w->items);
    }
}

static void spread(task run, const void *args, int64_t items, int64_t grain, int threads) {
    struct work w = {run, args, items, grain < 1 ? 1 : grain, 0};
    if (threads > 1 && region && items > w.grain) region(take_pieces, &w, (unsigned)threads, 0);
    else if (items > 0) run(args, 0, items);
}

/* Rows to take at once, so that a piece is about 16,384 numbers. */
static int64_t rows_at_once(int64_t columns) { return 1 + 16384 / (columns + 1); }

void inlay_nf4_quantize(const void *x, int dtype, int64_t count, uint8_t *packed, float *absmax,
                        int threads) {
    struct quantize_args a = {x, dtype, count, packed, absmax};
    spread(chosen->quantize, &a, (count + BLOCK - 1) / BLOCK, 512, threads);
}

void inlay_nf4_nest(const float *absmax, int64_t count, float offset, const float *midpoints,
                    uint8_t *codes, float *scale, int threads) {
    struct nest_args a = {absmax, count, offset, midpoints, codes, scale};
    spread(chosen->nest, &a, (count + NESTED_BLOCK - 1) / NESTED_BLOCK, 16, threads);
}

void inlay_nf4_dequantize(const struct nf4 *w, void *out, int dtype, int64_t first, int64_t count,
                          int threads) {
    struct dequantize_args a = {*w, out, dtype, first, count};
    int64_t blocks = (first + count + BLOCK - 1) / BLOCK - first / BLOCK;
    spread(chosen->dequantize, &a, count ? blocks : 0, 256, threads);
}

void inlay_nf4_to_int8(const struct nf4 *w, int8_t *q, float *scale, int64_t first, int64_t rows,
                       int64_t columns, int threads) {
    struct to_int8_args a = {*w, q, scale, first, columns};
    spread(chosen->to_int8, &a, rows, rows_at_once(columns), threads);
}

void inlay_int8_dequantize(const int8_t *q, const float *absmax, void *out, int dtype,
                           int64_t rows, int64_t columns, int threads) {
    struct int8_args a = {q, absmax, out, dtype, columns};
    spread(chosen->int8_dequantize, &a, rows, rows_at_once(columns), threads);
}

void inlay_int8_quantize(const void *x, int dtype, int64_t rows, int64_t columns, int8_t *q,
                         float *absmax, int threads) {
    struct int8_quantize_args a = {x, dtype, columns, q, absmax};
    spread(chosen->int8_quantize, &a, rows, rows_at_once(columns), threads);
}

void inlay_int8_rescale(const int32_t *sums, const float *rows, const float *columns, void *out,
                        int dtype, int64_t stride, int64_t height, int64_t width, int threads) {
    struct rescale_args a = {sums, rows, columns, out, dtype, stride, width};
    spread(chosen->rescale, &a, height, rows_at_once(width), threads);
}

/* Returns the first row whose label is outside the vocabulary, with nothing done; or -1. */
int64_t inlay_loss(float *logits, int64_t stride, int64_t rows, int64_t vocabulary,
                   const int64_t *labels, float *log_p, float *entropy, uint8_t *top1,
                   int threads) {
    for (int64_t i = 0; i < rows; i++)
        if (labels[i] < 0 || labels[i] >= vocabulary) return i;
    struct loss_args a = {logits, stride, vocabulary, labels, log_p, entropy, top1};
    spread(chosen->loss, &a, rows, rows_at_once(vocabulary), threads);
    return -1;
}

void inlay_loss_part(float *logits, int64_t first, int64_t count, const int64_t *labels,
                     float *highest, float *at_label, double *total, double *weighted,
                     float *scale, void *out, int dtype, int64_t rows, int threads) {
    struct loss_part_args a = {logits, first, count, labels, highest, at_label,
                               total, weighted, scale, out, dtype};
    spread(chosen->loss_part, &a, rows, rows_at_once(count), threads);
}

void inlay_norm(const void *x, const void *w, float eps, void *y, float *rstd, int dtype,
                int64_t rows, int64_t columns, int threads) {
    struct norm_args a = {x, w, 0, y, rstd, dtype, columns, eps};
    spread(chosen->norm, &a, rows, rows_at_once(columns), threads);
}

void inlay_norm_backward(const void *g, const void *x, const void *w, float *rstd, void *gx,
                         int dtype, int64_t rows, int64_t columns, int threads) {
    struct norm_args a = {x, w, g, gx, rstd, dtype, columns, 0};
    spread(chosen->norm_backward, &a, rows, rows_at_once(columns), threads);
}

void inlay_gate(const void *gate, const void *up, void *h, int dtype, int64_t count, int threads) {
    struct gate_args a = {gate, up, 0, h, 0, 0, dtype, count};
    spread(chosen->gate, &a, (count + TILE - 1) / TILE, 32, threads);
}

void inlay_gate_backward(const void *g, const void *gate, const void *up, void *g_gate, void *g_up,
                         void *h, int dtype, int64_t count, int threads) {
    struct gate_args a = {gate, up, g, h, g_gate, g_up, dtype, count};
    spread(chosen->gate_backward, &a, (count + TILE - 1) / TILE, 32, threads);
}

/* Returns 0, with nothing done, where the instruction set in use has no such loop. */
#if defined(__x86_64__)
/* Threads share the rows of x where those are more than the columns of y, and else the columns:
 * what they do not share, each packs for itself. With `arithmetic` other than SINGLES, in the
 * widest bfloat16 arithmetic of the level in use. */
int64_t inlay_product(struct product_args *a, int threads) {
    if (chosen != &kernels_avx512) return 0;
    int64_t most = ROWS, height = HEIGHT;
    task run = multiply_pieces;
#if HAS_HALVES
    if (a->arithmetic != SINGLES) {
        if (level_in_use < AVX512_BF16) return 0;
        a->arithmetic = level_in_use == AMX ? TILES : PAIRS;
        most = WIDE_ROWS;
        height = a->arithmetic == TILES ? TALL : HEIGHT;
        run = multiply_wide_pieces;
    }
#else
    if (a->arithmetic != SINGLES) return 0;
#endif
    int64_t blocks = (a->m + most - 1) / most, strips = (a->n + WIDTH - 1) / WIDTH;
    if (a->n < a->m) blocks = (blocks + threads - 1) / threads * threads;
    int64_t share = (a->m + blocks - 1) / blocks;
    a->across = (threads + blocks - 1) / blocks;
    a->rows = (share + height - 1) / height * height;
    a->strips = (strips + a->across - 1) / a->across;
    if (a->rows * a->strips > FAR) {
        a->strips = PANEL;
        a->across = (strips + PANEL - 1) / PANEL;
    }
    spread(run, a, blocks * a->across, 1, threads);
    return 1;
}
#else
int64_t inlay_product(void *a, int threads) {
    (void)a, (void)threads;
    return 0;
}
#endif
