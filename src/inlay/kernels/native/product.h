/* Products with a frozen weight that is unpacked as it is packed, in fp32: AVX-512 only.
 *
 * A block of x (rows, DEPTH) stays in the second-level cache. For each strip of WIDTH outputs the
 * weight's numbers are packed (DEPTH, WIDTH), and HEIGHT rows at a time are multiplied with them,
 * all in registers. Sums are kept from one block of the depth to the next. A low-rank term is more
 * depth: the last block ends with its two factors. What is written at the end is y.
 */

#define INLINE static inline __attribute__((always_inline))

enum { DEPTH = 384, SPARE = 32, STRIDE = DEPTH + SPARE + 16 };
enum { HEIGHT = 14, WIDTH = 32, ROWS = 40 * HEIGHT, LATE = 64 };
/* Sums of more rows times strips than FAR leave every cache: PANEL strips at a time stay. */
enum { FAR = 1 << 17, PANEL = 16 };
enum { FLOATS, HALVES, CODES, BYTES };
/* What is multiplied: fp32 numbers, or bfloat16 ones (halves.h) in vectors or in tiles. */
enum { SINGLES, PAIRS, TILES };

/* y (m, n) = x (m, k) @ W + scale * left (m, rank) @ right + bias. The weight is (k, n), or (n, k)
 * if transposed, and its rows have no gaps; right is (rank, n) or (n, rank). */
struct product_args {
    const void *x, *weight;
    const float *absmax; /* BYTES: rows of whole strips, and an absmax each */
    struct nf4 codes;    /* CODES: rows of whole blocks */
    const float *left, *right, *bias;
    float *sums; /* (m, n), between blocks of the depth; y itself if that is fp32 */
    void *y;
    int x_dtype, y_dtype, kind, arithmetic, transposed, right_transposed;
    float scale;
    int64_t m, k, n, rank;
    int64_t rows, strips, across; /* of a piece; how many pieces have the same rows */
};

/* A piece of the product, and the block of k + rank at hand: from `first` on, `depth` of the
 * weight and then `term` of the low-rank term. */
struct piece {
    const struct product_args *of;
    int64_t row, rows, first, depth, term;
};

static _Thread_local float packed_rows[ROWS * STRIDE] __attribute__((aligned(64)));

INLINE __mmask32 first_lanes(int64_t count) {
    return count >= 32 ? ~(__mmask32)0 : count <= 0 ? 0 : ((__mmask32)1 << count) - 1;
}

/* Transpose 16 rows of 16 words. */
INLINE void transpose(__m512i *r) {
    __m512i t[16];
    for (int i = 0; i < 16; i += 2) {
        t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
        t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
    }
    for (int i = 0; i < 16; i += 4) {
        r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
        r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
        r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
        r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
    }
    for (int j = 0; j < 4; j++) {
        t[j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0x88);
        t[4 + j] = _mm512_shuffle_i32x4(r[j], r[4 + j], 0xdd);
        t[8 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0x88);
        t[12 + j] = _mm512_shuffle_i32x4(r[8 + j], r[12 + j], 0xdd);
    }
    for (int j = 0; j < 4; j++) {
        r[j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0x88);
        r[8 + j] = _mm512_shuffle_i32x4(t[j], t[8 + j], 0xdd);
        r[4 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0x88);
        r[12 + j] = _mm512_shuffle_i32x4(t[4 + j], t[12 + j], 0xdd);
    }
}

INLINE __m512 widened(__m256i halves) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/* Round to the nearest bfloat16, to even; what is no number stays none. */
INLINE __m256i narrowed(__m512 x) {
    __m512i bits = _mm512_castps_si512(x), quiet = _mm512_set1_epi32(0x7fc0);
    __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    __mmask16 none = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(up, 16), none, quiet));
}

static void widen(const uint16_t *from, int64_t count, float *to) {
    for (int64_t i = 0; i < count; i += 16) {
        __mmask16 lanes = (__mmask16)first_lanes(count - i);
        _mm512_mask_storeu_ps(to + i, lanes, widened(_mm256_maskz_loadu_epi16(lanes, from + i)));
    }
}

/* Where the low-rank term's part of a block begins. */
INLINE int64_t term_of(const struct piece *p) {
    return p->first > p->of->k ? p->first - p->of->k : 0;
}

static void pack_rows(const struct piece *p) {
    const struct product_args *a = p->of;
    float *to = packed_rows;
    for (int64_t row = p->row; row < p->row + p->rows; row++, to += STRIDE) {
        int64_t at = row * a->k + p->first;
        const float *left = a->left + row * a->rank + term_of(p);
        if (a->x_dtype == HALVES) widen((const uint16_t *)a->x + at, p->depth, to);
        else memcpy(to, (const float *)a->x + at, (size_t)p->depth * 4);
        for (int64_t i = 0; i < p->term; i++) to[p->depth + i] = a->scale * left[i];
    }
}

/* fp32 (k, n), n of `width`: a strip's columns lie side by side. */
static void pack_floats(const float *w, int64_t width, int64_t column, int64_t depth,
                        float *strip) {
    __mmask32 lanes = first_lanes(width - column);
    __mmask16 low = (__mmask16)lanes, high = (__mmask16)(lanes >> 16);
    for (w += column; depth > 0; depth--, w += width, strip += WIDTH) {
        _mm512_store_ps(strip, _mm512_maskz_loadu_ps(low, w));
        _mm512_store_ps(strip + 16, _mm512_maskz_loadu_ps(high, w + 16));
    }
}

/* fp32 (n, k), of n `rows` are left: what lies beyond the depth becomes zero, up to 15 of it. */
static void pack_floats_transposed(const float *w, int64_t stride, int64_t rows, int64_t depth,
                                   float *strip) {
    for (int half = 0; half < WIDTH; half += 16, rows -= 16, w += 16 * stride)
        for (int64_t k = 0; k < depth; k += 16) {
            __m512i r[16];
            __mmask16 lanes = (__mmask16)first_lanes(depth - k);
            for (int i = 0; i < 16; i++)
                r[i] = i < rows ? _mm512_maskz_loadu_epi32(lanes, w + i * stride + k)
                                : _mm512_setzero_si512();
            transpose(r);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(strip + (k + i) * WIDTH + half, r[i]);
        }
}

/* bfloat16 (k, n): a strip's columns lie side by side. */
static void pack_halves(const struct piece *p, int64_t column, float *strip) {
    const struct product_args *a = p->of;
    const uint16_t *w = (const uint16_t *)a->weight + p->first * a->n + column;
    __mmask32 lanes = first_lanes(a->n - column);
    for (int64_t k = 0; k < p->depth; k++, w += a->n, strip += WIDTH) {
        __m512i numbers = _mm512_maskz_loadu_epi16(lanes, w);
        _mm512_store_ps(strip, widened(_mm512_castsi512_si256(numbers)));
        _mm512_store_ps(strip + 16, widened(_mm512_extracti64x4_epi64(numbers, 1)));
    }
}

/* bfloat16 (n, k): pairs of neighbours are transposed as words, then widened. */
static void pack_halves_transposed(const struct piece *p, int64_t column, float *strip) {
    const struct product_args *a = p->of;
    const __m512i odd = _mm512_set1_epi32((int)0xffff0000);
    for (int half = 0; half < WIDTH; half += 16)
        for (int64_t k = 0; k < p->depth; k += 32) {
            __m512i r[16];
            __mmask32 lanes = first_lanes(p->depth - k);
            for (int i = 0; i < 16; i++) {
                int64_t row = column + half + i;
                const uint16_t *w = (const uint16_t *)a->weight + row * a->k + p->first + k;
                r[i] = row < a->n ? _mm512_maskz_loadu_epi16(lanes, w) : _mm512_setzero_si512();
            }
            transpose(r);
            float *to = strip + k * WIDTH + half;
            for (int i = 0; i < 16; i++, to += 2 * WIDTH) {
                _mm512_store_si512(to, _mm512_slli_epi32(r[i], 16));
                _mm512_store_si512(to + WIDTH, _mm512_and_si512(r[i], odd));
            }
        }
}

/* What 16 packed numbers from place `at` on, in one row, are multiplied by. */
INLINE float scale_at(const struct product_args *a, int64_t row, int64_t at) {
    return a->kind == CODES ? scale_avx512(&a->codes, at / BLOCK) : a->absmax[row];
}

INLINE __m512 numbers_at(const struct product_args *a, int64_t at, float scale) {
    const __m512 scales = _mm512_set1_ps(scale);
    if (a->kind == CODES) {
        const __m128i mask = _mm_set1_epi8(15);
        __m128i b = _mm_loadl_epi64((const __m128i *)(a->codes.packed + at / 2));
        __m128i even = _mm_and_si128(_mm_srli_epi16(b, 4), mask), odd = _mm_and_si128(b, mask);
        __m512i k = _mm512_cvtepu8_epi32(_mm_unpacklo_epi8(even, odd));
        return _mm512_mul_ps(_mm512_permutexvar_ps(k, _mm512_loadu_ps(QUANTILES)), scales);
    }
    __m512i q = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)((const int8_t *)a->weight + at)));
    __m512 whole = _mm512_mul_ps(_mm512_cvtepi32_ps(q), scales);
    return _mm512_mul_ps(whole, _mm512_set1_ps(1.0f / 127.0f));
}

/* Packed (k, n): a strip lies within a block of each row. */
static void pack_numbers(const struct piece *p, int64_t column, float *strip) {
    for (int64_t row = p->first; row < p->first + p->depth; row++, strip += WIDTH) {
        int64_t at = row * p->of->n + column;
        float scale = scale_at(p->of, row, at);
        _mm512_store_ps(strip, numbers_at(p->of, at, scale));
        _mm512_store_ps(strip + 16, numbers_at(p->of, at + 16, scale));
    }
}

/* Packed (n, k), in steps within a block of each row. */
static void pack_numbers_transposed(const struct piece *p, int64_t column, float *strip) {
    for (int half = 0; half < WIDTH; half += 16)
        for (int64_t k = 0; k < p->depth; k += 32) {
            float scales[16] = {0};
            int64_t at = (column + half) * p->of->k + p->first + k, rows = p->of->n - column - half;
            for (int i = 0; i < 16 && i < rows; i++)
                scales[i] = scale_at(p->of, column + half + i, at + i * p->of->k);
            for (int part = 0; part < 32; part += 16) {
                __m512i r[16];
                for (int i = 0; i < 16; i++)
                    r[i] = i < rows ? _mm512_castps_si512(numbers_at(
                                          p->of, at + i * p->of->k + part, scales[i]))
                                    : _mm512_setzero_si512();
                transpose(r);
                for (int i = 0; i < 16; i++)
                    _mm512_store_si512(strip + (k + part + i) * WIDTH + half, r[i]);
            }
        }
}

static void pack_weight(const struct piece *p, int64_t column, float *strip) {
    const struct product_args *a = p->of;
    const float *w = a->weight;
    if (a->kind == FLOATS && a->transposed)
        pack_floats_transposed(w + column * a->k + p->first, a->k, a->n - column, p->depth, strip);
    else if (a->kind == FLOATS) pack_floats(w + p->first * a->n, a->n, column, p->depth, strip);
    else if (a->kind == HALVES && a->transposed) pack_halves_transposed(p, column, strip);
    else if (a->kind == HALVES) pack_halves(p, column, strip);
    else if (a->transposed) pack_numbers_transposed(p, column, strip);
    else pack_numbers(p, column, strip);
}

static void pack_term(const struct piece *p, int64_t column, float *strip) {
    const struct product_args *a = p->of;
    int64_t first = term_of(p);
    if (a->right_transposed)
        pack_floats_transposed(a->right + column * a->rank + first, a->rank, a->n - column,
                               p->term, strip);
    else pack_floats(a->right + first * a->n, a->n, column, p->term, strip);
}

/* Ask for some of a strip's numbers: a line is 32 of a row if transposed, else a row's. */
static void fetch(const struct piece *p, int64_t column, int64_t begin, int64_t end) {
    const struct product_args *a = p->of;
    int64_t lines = (p->depth + 31) / 32;
    for (int64_t i = begin; i < end && lines; i++) {
        int64_t row = a->transposed ? column + i / lines : p->first + i;
        int64_t at = a->transposed ? p->first + 32 * (i % lines) : column;
        if (row >= (a->transposed ? a->n : p->first + p->depth)) return;
        at += row * (a->transposed ? a->k : a->n);
        const char *place = a->kind == FLOATS   ? (const char *)((const float *)a->weight + at)
                            : a->kind == HALVES ? (const char *)((const uint16_t *)a->weight + at)
                            : a->kind == CODES  ? (const char *)(a->codes.packed + at / 2)
                                                : (const char *)a->weight + at;
        _mm_prefetch(place, _MM_HINT_T1);
    }
}

INLINE void add_products(__m512 (*sums)[2], const float *x, const float *strip, int64_t begin,
                         int64_t end, int rows) {
    for (int64_t k = begin; k < end; k++) {
        __m512 low = _mm512_load_ps(strip + k * WIDTH), high = _mm512_load_ps(strip + k * WIDTH + 16);
#pragma GCC unroll 14
        for (int r = 0; r < rows; r++) {
            __m512 one = _mm512_set1_ps(x[r * STRIDE + k]);
            sums[r][0] = _mm512_fmadd_ps(one, low, sums[r][0]);
            sums[r][1] = _mm512_fmadd_ps(one, high, sums[r][1]);
        }
    }
}

INLINE int is_last(const struct piece *p) {
    return p->first + p->depth + p->term == p->of->k + p->of->rank;
}

INLINE void write_y(const struct product_args *a, int64_t at, __m512 low, __m512 high,
                    __mmask32 lanes) {
    if (a->y_dtype == HALVES) {
        __m512i both = _mm512_castsi256_si512(narrowed(low));
        both = _mm512_inserti64x4(both, narrowed(high), 1);
        _mm512_mask_storeu_epi16((uint16_t *)a->y + at, lanes, both);
    } else {
        _mm512_mask_storeu_ps((float *)a->y + at, (__mmask16)lanes, low);
        _mm512_mask_storeu_ps((float *)a->y + at + 16, (__mmask16)(lanes >> 16), high);
    }
}

/* How the sums of a strip end. */
struct ending {
    __m512 bias[2];
    __mmask32 lanes;
    int last;
};

INLINE struct ending ending_of(const struct piece *p, int64_t column) {
    const struct product_args *a = p->of;
    struct ending e = {{_mm512_setzero_ps(), _mm512_setzero_ps()},
                       first_lanes(a->n - column), is_last(p)};
    if (e.last && a->bias) {
        e.bias[0] = _mm512_maskz_loadu_ps((__mmask16)e.lanes, a->bias + column);
        e.bias[1] = _mm512_maskz_loadu_ps((__mmask16)(e.lanes >> 16), a->bias + column + 16);
    }
    return e;
}

/* Add what was kept of the blocks before; keep the sums, or write y. */
INLINE void end_row(const struct piece *p, const struct ending *e, int64_t at, __m512 low,
                    __m512 high) {
    const struct product_args *a = p->of;
    __mmask16 first = (__mmask16)e->lanes, second = (__mmask16)(e->lanes >> 16);
    float *kept = a->sums + at;
    if (p->first) {
        low = _mm512_add_ps(low, _mm512_maskz_loadu_ps(first, kept));
        high = _mm512_add_ps(high, _mm512_maskz_loadu_ps(second, kept + 16));
    }
    if (e->last) {
        write_y(a, at, _mm512_add_ps(low, e->bias[0]), _mm512_add_ps(high, e->bias[1]), e->lanes);
    } else {
        _mm512_mask_storeu_ps(kept, first, low);
        _mm512_mask_storeu_ps(kept + 16, second, high);
    }
}

/* What is written to is asked for late: before, it would be pushed out of the first-level cache
 * by the strip and x. */
INLINE void multiply(const struct piece *p, const float *x, const float *strip, int64_t at,
                     int64_t column, int rows) {
    const struct product_args *a = p->of;
    __m512 sums[HEIGHT][2];
    int64_t depth = p->depth + p->term, late = depth > LATE ? depth - LATE : 0, n = a->n;
    int last = is_last(p);
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    add_products(sums, x, strip, 0, late, rows);
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        if (last && a->y_dtype == HALVES) __builtin_prefetch((uint16_t *)a->y + at + r * n, 1);
        if (last && !p->first) continue;
        __builtin_prefetch(a->sums + at + r * n, 1);
        __builtin_prefetch(a->sums + at + r * n + 16, 1);
    }
    add_products(sums, x, strip, late, depth, rows);
    struct ending e = ending_of(p, column);
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) end_row(p, &e, at + r * n, sums[r][0], sums[r][1]);
}

typedef void (*multiplier)(const struct piece *p, const float *x, const float *strip, int64_t at,
                           int64_t column);
#define MULTIPLY(rows) \
    static void multiply_##rows(const struct piece *p, const float *x, const float *strip, \
                                int64_t at, int64_t column) { \
        multiply(p, x, strip, at, column, rows); \
    }
MULTIPLY(1) MULTIPLY(2) MULTIPLY(3) MULTIPLY(4) MULTIPLY(5) MULTIPLY(6) MULTIPLY(7)
MULTIPLY(8) MULTIPLY(9) MULTIPLY(10) MULTIPLY(11) MULTIPLY(12) MULTIPLY(13) MULTIPLY(14)

static const multiplier multipliers[HEIGHT] = {
    multiply_1, multiply_2, multiply_3, multiply_4, multiply_5, multiply_6, multiply_7,
    multiply_8, multiply_9, multiply_10, multiply_11, multiply_12, multiply_13, multiply_14,
};

/* Multiply the rows at hand with a strip, asking for the next one meanwhile. */
static void multiply_strip(const struct piece *p, int64_t column, const struct piece *next,
                           int64_t next_column) {
    float strip[(DEPTH + 2 * SPARE) * WIDTH] __attribute__((aligned(64)));
    int64_t lines = p->of->transposed ? WIDTH * ((next->depth + 31) / 32) : next->depth;
    int64_t share = lines * HEIGHT / p->rows + 1;
    pack_weight(p, column, strip);
    pack_term(p, column, strip + p->depth * WIDTH);
    for (int64_t i = 0, asked = 0; i < p->rows; i += HEIGHT, asked += share) {
        int64_t rows = p->rows - i < HEIGHT ? p->rows - i : HEIGHT;
        fetch(next, next_column, asked, asked + share);
        multipliers[rows - 1](p, packed_rows + i * STRIDE, strip,
                              (p->row + i) * p->of->n + column, column);
    }
}

/* Return the next block; a short rest of the term is taken into the block before it. */
static struct piece deeper(struct piece p, int64_t most) {
    const struct product_args *a = p.of;
    p.first += p.depth + p.term;
    int64_t weight = p.first < a->k ? a->k - p.first : 0, rest = a->rank - term_of(&p);
    p.depth = weight < most ? weight : most;
    int64_t room = most - p.depth;
    p.term = weight > p.depth ? 0 : rest <= room + SPARE ? rest : room;
    return p;
}

typedef void (*row_packer)(const struct piece *p);
typedef void (*strip_multiplier)(const struct piece *p, int64_t column, const struct piece *next,
                                 int64_t next_column);

static void walk_pieces(const struct product_args *a, int64_t begin, int64_t end, row_packer pack,
                        strip_multiplier multiply_one, int64_t most) {
    for (; begin < end; begin++) {
        int64_t row = begin / a->across * a->rows, first = begin % a->across * a->strips * WIDTH;
        int64_t last = first + a->strips * WIDTH < a->n ? first + a->strips * WIDTH : a->n;
        struct piece p = {a, row, a->m - row, 0, 0, 0};
        if (p.rows > a->rows) p.rows = a->rows;
        if (p.rows <= 0) continue;
        for (p = deeper(p, most); p.depth + p.term > 0; p = deeper(p, most)) {
            struct piece next = deeper(p, most);
            pack(&p);
            for (int64_t i = first; i < last; i += WIDTH) {
                int ends = i + WIDTH >= last;
                multiply_one(&p, i, ends ? &next : &p, ends ? first : i + WIDTH);
            }
        }
    }
}

static void multiply_pieces(const void *args, int64_t begin, int64_t end) {
    walk_pieces(args, begin, end, pack_rows, multiply_strip, DEPTH);
}

#undef MULTIPLY
#undef INLINE
