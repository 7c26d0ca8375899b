/* Products in bfloat16 arithmetic, two numbers of the depth at once: AVX512-BF16, or tiles (AMX).
 *
 * As in product.h a block of x stays in the second-level cache, a strip of the weight in the first,
 * and a low-rank term is more depth. A strip holds pairs: word (i, j) is what rows 2i and 2i + 1 of
 * column j hold. It is multiplied PART by PART of its depth, and the sums of a strip are kept
 * beside it. What is no bfloat16 number yet is rounded as it is packed; sums are fp32. The depth of
 * a block, and of its term, is filled up with zeros to whole STEPs.
 */

#define INLINE static inline __attribute__((always_inline))

enum { STEP = 32, PART = 512, WIDE_DEPTH = 2 * PART, WIDE_FULL = WIDE_DEPTH + SPARE + 2 * STEP };
enum { WIDE_STRIDE = WIDE_FULL + STEP, TALL = 32, WIDE_ROWS = 14 * TALL };

static _Thread_local uint16_t wide_rows[WIDE_ROWS * WIDE_STRIDE] __attribute__((aligned(64)));

INLINE int64_t whole_steps(int64_t depth) { return (depth + STEP - 1) / STEP * STEP; }

INLINE __m512i pairs_of(__m512 first, __m512 second) {
    return (__m512i)_mm512_cvtne2ps_pbh(second, first);
}

/* Words of two rows: the low halves of one, the high halves of the other. */
INLINE __m512i interleaved(__m256i low, __m256i high) {
    return _mm512_or_si512(_mm512_cvtepu16_epi32(low),
                           _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
}

/* 32 neighbours of a row of fp32, as 16 words. */
INLINE __m512i rounded_pairs(const float *from, int64_t count) {
    __mmask32 lanes = first_lanes(count);
    return pairs_of(_mm512_maskz_loadu_ps((__mmask16)lanes, from),
                    _mm512_maskz_loadu_ps((__mmask16)(lanes >> 16), from + 16));
}

/* `count` numbers times `scale`, as bfloat16, and zeros up to a whole step. Steps of 32 numbers lie
 * `apart` times that apart. */
static void round_row(const float *from, int64_t count, float scale, uint16_t *to, int64_t apart) {
    __m512 times = _mm512_set1_ps(scale);
    for (int64_t i = 0; i < count; i += 32) {
        __mmask32 lanes = first_lanes(count - i);
        __m512 low = _mm512_maskz_loadu_ps((__mmask16)lanes, from + i);
        __m512 high = _mm512_maskz_loadu_ps((__mmask16)(lanes >> 16), from + i + 16);
        _mm512_storeu_si512(to + i * apart,
                            pairs_of(_mm512_mul_ps(low, times), _mm512_mul_ps(high, times)));
    }
}

static void copy_row(const uint16_t *from, int64_t count, uint16_t *to, int64_t apart) {
    for (int64_t i = 0; i < count; i += 32)
        _mm512_storeu_si512(to + i * apart, _mm512_maskz_loadu_epi16(first_lanes(count - i), from + i));
}

/* Where row `row` of a block begins. Tiles are read from TALL rows whose steps lie together, so that
 * what is read one after another lies so. */
INLINE uint16_t *wide_row(const struct product_args *a, int64_t row) {
    if (a->arithmetic != TILES) return wide_rows + row * WIDE_STRIDE;
    return wide_rows + row / TALL * TALL * WIDE_STRIDE + row % TALL * STEP;
}

static void pack_wide_rows(const struct piece *p) {
    const struct product_args *a = p->of;
    int64_t apart = a->arithmetic == TILES ? TALL : 1;
    for (int64_t i = 0; i < p->rows; i++) {
        uint16_t *to = wide_row(a, i);
        int64_t row = p->row + i, at = row * a->k + p->first;
        if (a->x_dtype == HALVES) copy_row((const uint16_t *)a->x + at, p->depth, to, apart);
        else round_row((const float *)a->x + at, p->depth, 1.0f, to, apart);
        if (p->term)
            round_row(a->left + row * a->rank + term_of(p), p->term, a->scale,
                      to + whole_steps(p->depth) * apart, apart);
    }
}

/* What row `row` of the weight holds in 16 columns from `column` on, as bfloat16 numbers. */
INLINE __m256i halves_at(const struct piece *p, int64_t row, int64_t column, __mmask16 lanes) {
    const struct product_args *a = p->of;
    int64_t at = row * a->n + column;
    if (row >= p->first + p->depth) return _mm256_setzero_si256();
    if (a->kind == HALVES)
        return _mm256_maskz_loadu_epi16(lanes, (const uint16_t *)a->weight + at);
    __m512 numbers = a->kind == FLOATS
        ? _mm512_maskz_loadu_ps(lanes, (const float *)a->weight + at)
        : numbers_at(a, at, scale_at(a, row, at));
    return (__m256i)_mm512_cvtneps_pbh(numbers);
}

static void pack_pairs(const struct piece *p, int64_t column, uint32_t *strip) {
    __mmask32 lanes = first_lanes(p->of->n - column);
    __mmask16 parts[2] = {(__mmask16)lanes, (__mmask16)(lanes >> 16)};
    for (int64_t k = 0; k < whole_steps(p->depth); k += 2, strip += WIDTH)
        for (int part = 0; part < 2; part++) {
            int64_t row = p->first + k, from = column + 16 * part;
            if (k >= p->depth || !parts[part]) {
                _mm512_store_si512(strip + 16 * part, _mm512_setzero_si512());
                continue;
            }
            _mm512_store_si512(strip + 16 * part,
                               interleaved(halves_at(p, row, from, parts[part]),
                                           halves_at(p, row + 1, from, parts[part])));
        }
}

/* 32 numbers from place `at` on in a row of (n, k), of which `count` are of this block. */
INLINE __m512i pairs_at(const struct product_args *a, int64_t row, int64_t at, int64_t count) {
    if (a->kind == HALVES)
        return _mm512_maskz_loadu_epi16(first_lanes(count), (const uint16_t *)a->weight + at);
    if (a->kind == FLOATS) return rounded_pairs((const float *)a->weight + at, count);
    float scale = scale_at(a, row, at);
    return pairs_of(numbers_at(a, at, scale), numbers_at(a, at + 16, scale));
}

static void pack_pairs_transposed(const struct piece *p, int64_t column, uint32_t *strip) {
    const struct product_args *a = p->of;
    for (int half = 0; half < WIDTH; half += 16)
        for (int64_t k = 0; k < p->depth; k += 32) {
            __m512i r[16];
            for (int i = 0; i < 16; i++) {
                int64_t row = column + half + i;
                r[i] = row < a->n ? pairs_at(a, row, row * a->k + p->first + k, p->depth - k)
                                  : _mm512_setzero_si512();
            }
            transpose(r);
            for (int i = 0; i < 16; i++)
                _mm512_store_si512(strip + (k / 2 + i) * WIDTH + half, r[i]);
        }
}

/* The right factor of the low-rank term: as a weight in fp32 whose depth is the rank. */
static void pack_wide_term(const struct piece *p, int64_t column, uint32_t *strip) {
    struct product_args right = *p->of;
    struct piece term = {&right, 0, 0, term_of(p), p->term, 0};
    right.weight = right.right;
    right.kind = FLOATS;
    right.k = right.rank;
    if (right.right_transposed) pack_pairs_transposed(&term, column, strip);
    else pack_pairs(&term, column, strip);
}

INLINE void add_pairs(__m512 (*sums)[2], const uint16_t *x, const uint32_t *strip, int64_t pairs,
                      int rows) {
    for (int64_t k = 0; k < pairs; k++) {
        __m512bh low = (__m512bh)_mm512_load_si512(strip + k * WIDTH);
        __m512bh high = (__m512bh)_mm512_load_si512(strip + k * WIDTH + 16);
#pragma GCC unroll 14
        for (int r = 0; r < rows; r++) {
            int word;
            memcpy(&word, x + r * WIDE_STRIDE + 2 * k, 4);
            __m512bh one = (__m512bh)_mm512_set1_epi32(word);
            sums[r][0] = _mm512_dpbf16_ps(sums[r][0], one, low);
            sums[r][1] = _mm512_dpbf16_ps(sums[r][1], one, high);
        }
    }
}

/* Rows of a strip's sums, WIDTH apart, get the products of a part of the depth. */
INLINE void multiply_wide(float *kept, const uint16_t *x, const uint32_t *strip, int64_t pairs,
                          int begins, int rows) {
    __m512 sums[HEIGHT][2];
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        sums[r][0] = begins ? _mm512_setzero_ps() : _mm512_load_ps(kept + r * WIDTH);
        sums[r][1] = begins ? _mm512_setzero_ps() : _mm512_load_ps(kept + r * WIDTH + 16);
    }
    add_pairs(sums, x, strip, pairs, rows);
#pragma GCC unroll 14
    for (int r = 0; r < rows; r++) {
        _mm512_store_ps(kept + r * WIDTH, sums[r][0]);
        _mm512_store_ps(kept + r * WIDTH + 16, sums[r][1]);
    }
}

typedef void (*wide_multiplier)(float *kept, const uint16_t *x, const uint32_t *strip,
                                int64_t pairs, int begins);
#define MULTIPLY(rows) \
    static void multiply_wide_##rows(float *kept, const uint16_t *x, const uint32_t *strip, \
                                     int64_t pairs, int begins) { \
        multiply_wide(kept, x, strip, pairs, begins, rows); \
    }
MULTIPLY(1) MULTIPLY(2) MULTIPLY(3) MULTIPLY(4) MULTIPLY(5) MULTIPLY(6) MULTIPLY(7)
MULTIPLY(8) MULTIPLY(9) MULTIPLY(10) MULTIPLY(11) MULTIPLY(12) MULTIPLY(13) MULTIPLY(14)
#undef MULTIPLY

static const wide_multiplier wide_multipliers[HEIGHT] = {
    multiply_wide_1, multiply_wide_2, multiply_wide_3, multiply_wide_4, multiply_wide_5,
    multiply_wide_6, multiply_wide_7, multiply_wide_8, multiply_wide_9, multiply_wide_10,
    multiply_wide_11, multiply_wide_12, multiply_wide_13, multiply_wide_14,
};

#if HAS_TILES
/* GCC's tile intrinsics do not say which memory they read. */
#define WRITTEN __asm__ volatile("" ::: "memory")

struct tiles { uint8_t palette, start, reserved[14]; uint16_t bytes[16]; uint8_t rows[16]; };

TILED static void open_tiles(void) {
    static const struct tiles t = {
        .palette = 1,
        .bytes = {64, 64, 64, 64, 64, 64, 64, 64},
        .rows = {16, 16, 16, 16, 16, 16, 16, 16},
    };
    WRITTEN;
    _tile_loadconfig(&t);
}

TILED static void close_tiles(void) { _tile_release(); }

/* Tiles 0 to 3 hold the sums of 32 rows and 32 columns: (0 1; 2 3). Rows of x beyond those at hand
 * are whatever the buffer holds, and what becomes of them is not written. */
TILED static void multiply_tiles(float *kept, const uint16_t *x, const uint32_t *strip,
                                 int64_t pairs, int begins) {
    WRITTEN;
    if (begins) {
        _tile_zero(0);
        _tile_zero(1);
        _tile_zero(2);
        _tile_zero(3);
    } else {
        _tile_loadd(0, kept, WIDTH * 4);
        _tile_loadd(1, kept + 16, WIDTH * 4);
        _tile_loadd(2, kept + 16 * WIDTH, WIDTH * 4);
        _tile_loadd(3, kept + 16 * WIDTH + 16, WIDTH * 4);
    }
    for (int64_t k = 0; k < pairs; k += STEP / 2, x += TALL * STEP, strip += STEP / 2 * WIDTH) {
        _tile_loadd(6, strip, WIDTH * 4);
        _tile_loadd(4, x, STEP * 2);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, strip + 16, WIDTH * 4);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, x + 16 * STEP, STEP * 2);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, kept, WIDTH * 4);
    _tile_stored(1, kept + 16, WIDTH * 4);
    _tile_stored(2, kept + 16 * WIDTH, WIDTH * 4);
    _tile_stored(3, kept + 16 * WIDTH + 16, WIDTH * 4);
}
#else
static void open_tiles(void) {}
static void close_tiles(void) {}
#define multiply_tiles(kept, x, strip, pairs, begins) ((void)0)
#endif

/* Sums of whole strips are rounded by the CPU's own instruction. */
INLINE void end_wide_row(const struct piece *p, const struct ending *e, int64_t at, __m512 low,
                         __m512 high) {
    if (e->last && !p->first && p->of->y_dtype == HALVES) {
        __m512i both = pairs_of(_mm512_add_ps(low, e->bias[0]), _mm512_add_ps(high, e->bias[1]));
        _mm512_mask_storeu_epi16((uint16_t *)p->of->y + at, e->lanes, both);
    } else {
        end_row(p, e, at, low, high);
    }
}

/* Part of a strip: its pairs, from where in the depth they are, and whether the sums end there. */
struct part {
    uint32_t *strip;
    int64_t first, pairs;
    int ends;
};

/* Where lines of the next strip are asked for, and how many at a time. */
struct ahead {
    const struct piece *next;
    int64_t column, asked, share;
};

static void multiply_part(const struct piece *p, const struct part *of, float *sums,
                          int64_t column, struct ahead *ahead) {
    const struct product_args *a = p->of;
    int64_t height = a->arithmetic == TILES ? TALL : HEIGHT;
    struct ending e = ending_of(p, column);
    for (int64_t i = 0; i < p->rows; i += height, ahead->asked += ahead->share) {
        int64_t rows = p->rows - i < height ? p->rows - i : height;
        const uint16_t *x = wide_row(a, i) + of->first * (a->arithmetic == TILES ? TALL : 1);
        float *kept = sums + i * WIDTH;
        fetch(ahead->next, ahead->column, ahead->asked, ahead->asked + ahead->share);
        if (a->arithmetic == TILES) multiply_tiles(kept, x, of->strip, of->pairs, !of->first);
        else wide_multipliers[rows - 1](kept, x, of->strip, of->pairs, !of->first);
        for (int64_t r = 0; of->ends && r < rows; r++)
            end_wide_row(p, &e, (p->row + i + r) * a->n + column, _mm512_load_ps(kept + r * WIDTH),
                         _mm512_load_ps(kept + r * WIDTH + 16));
    }
}

static void multiply_wide_strip(const struct piece *p, int64_t column, const struct piece *next,
                                int64_t next_column) {
    const struct product_args *a = p->of;
    float sums[WIDE_ROWS * WIDTH] __attribute__((aligned(64)));
    uint32_t strip[WIDE_FULL / 2 * WIDTH] __attribute__((aligned(64)));
    int64_t height = a->arithmetic == TILES ? TALL : HEIGHT;
    int64_t lines = a->transposed ? WIDTH * ((next->depth + 31) / 32) : next->depth;
    int64_t turns = p->rows / height * ((p->depth + PART - 1) / PART) + 1;
    struct ahead ahead = {next, next_column, 0, lines / turns + 1};
    for (int64_t done = 0; done < p->depth || (!done && p->term); done += PART) {
        struct piece some = *p;
        some.first += done;
        some.depth = p->depth - done < PART ? p->depth - done : PART;
        struct part of = {strip, done, whole_steps(some.depth) / 2, done + PART >= p->depth};
        some.term = of.ends ? p->term : 0;
        if (a->transposed) pack_pairs_transposed(&some, column, strip);
        else pack_pairs(&some, column, strip);
        if (some.term) pack_wide_term(&some, column, strip + of.pairs * WIDTH);
        of.pairs += whole_steps(some.term) / 2;
        multiply_part(p, &of, sums, column, &ahead);
    }
}

static void multiply_wide_pieces(const void *args, int64_t begin, int64_t end) {
    const struct product_args *a = args;
    if (a->arithmetic == TILES) open_tiles();
    walk_pieces(a, begin, end, pack_wide_rows, multiply_wide_strip, WIDE_DEPTH);
    if (a->arithmetic == TILES) close_tiles();
}

#undef INLINE
