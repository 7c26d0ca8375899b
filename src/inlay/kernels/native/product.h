/* Products of fp32 rows with a frozen weight that is unpacked as it is packed: AVX-512 only.
 *
 * A block of x (rows, DEPTH) stays in the second-level cache. For each strip of WIDTH outputs the
 * weight's numbers are packed (DEPTH, WIDTH), and HEIGHT rows at a time are multiplied with them,
 * all sums in registers. What a later block of the depth finds is added to what is in y.
 */

#define INLINE static inline __attribute__((always_inline))

enum { DEPTH = 384, STRIDE = DEPTH + 16, HEIGHT = 14, WIDTH = 32, ROWS = 40 * HEIGHT, LATE = 64 };

/* A weight of (n, k), or (k, n) unless transposed; its rows have no gaps. */
struct product_args {
    const float *x;
    enum { HALVES, CODES, BYTES } kind;
    const uint16_t *halves; /* bfloat16 */
    struct nf4 codes;       /* with rows of whole blocks */
    const int8_t *bytes;    /* with rows of whole strips, and an absmax each */
    const float *absmax;
    int transposed;
    float *y;
    int64_t m, k, n;
    int64_t rows, strips, across; /* of a piece; how many pieces have the same rows */
};

/* A piece of the product, and the part of k at hand. */
struct piece {
    const struct product_args *of;
    const float *x;
    float *y;
    int64_t rows, first, depth;
};

static _Thread_local float packed_rows[ROWS * STRIDE] __attribute__((aligned(64)));

static void pack_rows(const struct piece *p) {
    for (int64_t i = 0; i < p->rows; i++)
        memcpy(packed_rows + i * STRIDE, p->x + i * p->of->k + p->first, (size_t)p->depth * 4);
}

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

/* bfloat16 (k, n): a strip's columns lie side by side. */
static void pack_halves(const struct piece *p, int64_t column, float *strip) {
    const struct product_args *a = p->of;
    const uint16_t *w = a->halves + p->first * a->n + column;
    __mmask32 lanes = first_lanes(a->n - column);
    for (int64_t k = 0; k < p->depth; k++, w += a->n, strip += WIDTH) {
        __m512i numbers = _mm512_maskz_loadu_epi16(lanes, w);
        __m512i low = _mm512_cvtepu16_epi32(_mm512_castsi512_si256(numbers));
        __m512i high = _mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(numbers, 1));
        _mm512_store_si512(strip, _mm512_slli_epi32(low, 16));
        _mm512_store_si512(strip + 16, _mm512_slli_epi32(high, 16));
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
                const uint16_t *w = a->halves + row * a->k + p->first + k;
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
    __m512i q = _mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i *)(a->bytes + at)));
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

static void pack_strip(const struct piece *p, int64_t column, float *strip) {
    const struct product_args *a = p->of;
    if (a->kind == HALVES && a->transposed) pack_halves_transposed(p, column, strip);
    else if (a->kind == HALVES) pack_halves(p, column, strip);
    else if (a->transposed) pack_numbers_transposed(p, column, strip);
    else pack_numbers(p, column, strip);
}

/* Ask for some of a strip's numbers: a line is 32 of a row if transposed, else a row's. */
static void fetch(const struct piece *p, int64_t column, int64_t begin, int64_t end) {
    const struct product_args *a = p->of;
    int64_t lines = (p->depth + 31) / 32;
    for (int64_t i = begin; i < end; i++) {
        int64_t row = a->transposed ? column + i / lines : p->first + i;
        int64_t at = a->transposed ? p->first + 32 * (i % lines) : column;
        if (row >= (a->transposed ? a->n : p->first + p->depth)) return;
        at += row * (a->transposed ? a->k : a->n);
        const char *place = a->kind == HALVES  ? (const char *)(a->halves + at)
                            : a->kind == CODES ? (const char *)(a->codes.packed + at / 2)
                                               : (const char *)(a->bytes + at);
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

/* y is asked for late: before, the strip and x would push it out of the first-level cache. */
INLINE void multiply(const struct piece *p, const float *x, const float *strip, float *y,
                     __mmask32 lanes, int rows) {
    __m512 sums[HEIGHT][2];
    __mmask16 low = (__mmask16)lanes, high = (__mmask16)(lanes >> 16);
    int64_t late = p->depth > LATE ? p->depth - LATE : 0, n = p->of->n;
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
    add_products(sums, x, strip, 0, late, rows);
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        __builtin_prefetch(y + r * n, 1);
        __builtin_prefetch(y + r * n + 16, 1);
    }
    add_products(sums, x, strip, late, p->depth, rows);
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++, y += n) {
        if (p->first) {
            sums[r][0] = _mm512_add_ps(sums[r][0], _mm512_maskz_loadu_ps(low, y));
            sums[r][1] = _mm512_add_ps(sums[r][1], _mm512_maskz_loadu_ps(high, y + 16));
        }
        _mm512_mask_storeu_ps(y, low, sums[r][0]);
        _mm512_mask_storeu_ps(y + 16, high, sums[r][1]);
    }
}

typedef void (*multiplier)(const struct piece *p, const float *x, const float *strip, float *y,
                           __mmask32 lanes);
#define MULTIPLY(rows) \
    static void multiply_##rows(const struct piece *p, const float *x, const float *strip, \
                                float *y, __mmask32 lanes) { \
        multiply(p, x, strip, y, lanes, rows); \
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
    float strip[DEPTH * WIDTH] __attribute__((aligned(64)));
    int64_t lines = p->of->transposed ? WIDTH * ((next->depth + 31) / 32) : next->depth;
    int64_t share = lines * HEIGHT / p->rows + 1;
    pack_strip(p, column, strip);
    for (int64_t i = 0, asked = 0; i < p->rows; i += HEIGHT, asked += share) {
        int64_t rows = p->rows - i < HEIGHT ? p->rows - i : HEIGHT;
        fetch(next, next_column, asked, asked + share);
        multipliers[rows - 1](p, packed_rows + i * STRIDE, strip, p->y + i * p->of->n + column,
                              first_lanes(p->of->n - column));
    }
}

/* Return the next part of k. */
static struct piece deeper(struct piece p) {
    p.first += p.depth;
    p.depth = p.of->k - p.first < DEPTH ? p.of->k - p.first : DEPTH;
    return p;
}

static void multiply_pieces(const void *args, int64_t begin, int64_t end) {
    const struct product_args *a = args;
    for (; begin < end; begin++) {
        int64_t row = begin / a->across * a->rows, first = begin % a->across * a->strips * WIDTH;
        int64_t last = first + a->strips * WIDTH < a->n ? first + a->strips * WIDTH : a->n;
        struct piece p = {a, a->x + row * a->k, a->y + row * a->n, a->m - row, 0, 0};
        if (p.rows > a->rows) p.rows = a->rows;
        if (p.rows <= 0) continue;
        for (p = deeper(p); p.depth > 0; p = deeper(p)) {
            struct piece next = deeper(p);
            pack_rows(&p);
            for (int64_t i = first; i < last; i += WIDTH) {
                int ends = i + WIDTH >= last;
                multiply_strip(&p, i, ends ? &next : &p, ends ? first : i + WIDTH);
            }
        }
    }
}

#undef MULTIPLY
#undef INLINE
