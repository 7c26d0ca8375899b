/* Every loop, compiled once per instruction set: SET is its name, LEVEL its number. */

#define INLINE static inline __attribute__((always_inline))

INLINE uint32_t NAME(bits)(float x) { uint32_t u; memcpy(&u, &x, 4); return u; }
INLINE float NAME(value)(uint32_t u) { float x; memcpy(&x, &u, 4); return x; }

/* x as bfloat16 rounds it, in fp32. */
INLINE float NAME(rounded)(float x) {
    uint32_t u = NAME(bits)(x);
    uint32_t r = (u + 0x7fffu + ((u >> 16) & 1u)) & 0xffff0000u;
    return NAME(value)((u & 0x7fffffffu) > 0x7f800000u ? 0x7fc00000u : r);
}

INLINE float NAME(from_half)(uint16_t h) {
    uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
    if (rest >= 0x7c00u) return NAME(value)(sign | 0x7f800000u | (rest & 0x3ffu) << 13);
    float magnitude = NAME(value)(rest << 13) * 0x1p112f;
    return NAME(value)(sign | NAME(bits)(magnitude));
}

static void NAME(load)(float *restrict to, const void *from, int64_t at, int64_t n, int dtype) {
    if (dtype == F32) {
        memcpy(to, (const float *)from + at, (size_t)n * 4);
    } else if (dtype == BF16) {
        const uint16_t *p = (const uint16_t *)from + at;
#pragma omp simd
        for (int64_t i = 0; i < n; i++) to[i] = NAME(value)((uint32_t)p[i] << 16);
    } else {
        const uint16_t *p = (const uint16_t *)from + at;
        int64_t i = 0;
#if LEVEL >= 1
        for (; i + 8 <= n; i += 8)
            _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128((const __m128i *)(p + i))));
#endif
        for (; i < n; i++) to[i] = NAME(from_half)(p[i]);
    }
}

static void NAME(store)(void *to, int64_t at, const float *restrict from, int64_t n, int dtype) {
    if (dtype == F32) {
        memcpy((float *)to + at, from, (size_t)n * 4);
    } else {
        uint16_t *p = (uint16_t *)to + at;
#pragma omp simd
        for (int64_t i = 0; i < n; i++)
            p[i] = (uint16_t)(NAME(bits)(NAME(rounded)(from[i])) >> 16);
    }
}

/* Round in place to what `dtype` holds. */
INLINE void NAME(round_tile)(float *x, int64_t n, int dtype) {
    if (dtype == F32) return;
#pragma omp simd
    for (int64_t i = 0; i < n; i++) x[i] = NAME(rounded)(x[i]);
}

#if LEVEL >= 1
#define FMA(a, b, c) __builtin_fmaf(a, b, c)
#else
#define FMA(a, b, c) ((a) * (b) + (c))
#endif

/* exp to 1.2e-7 relative; 0 below -87, and about 3e38 above 88. */
INLINE float NAME(exp)(float x) {
    float c = x < -87.0f ? -87.0f : x > 88.0f ? 88.0f : x;
    float shifted = FMA(c, 1.44269504f, ROUNDER);
    float n = shifted - ROUNDER;
    float r = FMA(n, 2.12194440e-4f, FMA(n, -0.693359375f, c));
    float p = 1.9875691500e-4f;
    p = FMA(p, r, 1.3981999507e-3f);
    p = FMA(p, r, 8.3334519073e-3f);
    p = FMA(p, r, 4.1665795894e-2f);
    p = FMA(p, r, 1.6666665459e-1f);
    p = FMA(p, r, 5.0000001201e-1f);
    p = FMA(p * r, r, r) + 1.0f;
    float y = p * NAME(value)((NAME(bits)(shifted) + 127u) << 23);
    return x < -87.0f ? 0.0f : y;
}

/* The largest magnitude; a NaN is larger than all. */
INLINE float NAME(largest)(const float *x, int64_t n) {
    int32_t m = 0;
#pragma omp simd reduction(max : m)
    for (int64_t i = 0; i < n; i++) {
        int32_t u = (int32_t)(NAME(bits)(x[i]) & 0x7fffffffu);
        m = u > m ? u : m;
    }
    return NAME(value)((uint32_t)m);
}

/* Integers in the order of floats, a NaN last; the map is its own inverse. */
INLINE int32_t NAME(ordered)(int32_t u) { return u ^ ((u >> 31) & 0x7fffffff); }

INLINE float NAME(maximum)(const float *x, int64_t n) {
    int32_t m = INT32_MIN;
#pragma omp simd reduction(max : m)
    for (int64_t i = 0; i < n; i++) {
        int32_t u = NAME(ordered)((int32_t)NAME(bits)(x[i]));
        m = u > m ? u : m;
    }
    return NAME(value)((uint32_t)NAME(ordered)(m));
}

/* ---- NF4 ---- */

/* Thresholds in the order of a binary heap: k -> 2k below, 2k+1 above; the root is 1. */
static const float NAME(heap)[16] = {
    0, MIDPOINT(7), MIDPOINT(3), MIDPOINT(11), MIDPOINT(1), MIDPOINT(5), MIDPOINT(9), MIDPOINT(13),
    MIDPOINT(0), MIDPOINT(2), MIDPOINT(4), MIDPOINT(6), MIDPOINT(8), MIDPOINT(10), MIDPOINT(12),
    MIDPOINT(14),
};

/* The nearest quantiles of 64 numbers in [-1, 1], the lower on a tie; NaN is the first. */
INLINE void NAME(pack_block)(const float *x, uint8_t *out) {
#if LEVEL == 2
    const __m512 heap = _mm512_loadu_ps(NAME(heap));
    const __m512i one = _mm512_set1_epi32(1);
    for (int i = 0; i < BLOCK; i += 16) {
        __m512 v = _mm512_loadu_ps(x + i);
        __m512i k = one;
        for (int step = 0; step < 4; step++) {
            __mmask16 above = _mm512_cmp_ps_mask(v, _mm512_permutexvar_ps(k, heap), _CMP_GT_OQ);
            k = _mm512_add_epi32(k, k);
            k = _mm512_mask_add_epi32(k, above, k, one);
        }
        k = _mm512_and_si512(k, _mm512_set1_epi32(15));
        k = _mm512_or_si512(_mm512_slli_epi64(k, 4), _mm512_srli_epi64(k, 32));
        _mm_storel_epi64((__m128i *)(out + i / 2), _mm512_cvtepi64_epi8(k));
    }
#elif LEVEL == 1
    const __m256 low = _mm256_loadu_ps(NAME(heap)), high = _mm256_loadu_ps(NAME(heap) + 8);
    for (int i = 0; i < BLOCK; i += 8) {
        __m256 v = _mm256_loadu_ps(x + i);
        __m256i k = _mm256_set1_epi32(1);
        for (int step = 0; step < 4; step++) {
            __m256 t = _mm256_permutevar8x32_ps(step < 3 ? low : high, k);
            __m256i above = _mm256_castps_si256(_mm256_cmp_ps(v, t, _CMP_GT_OQ));
            k = _mm256_sub_epi32(_mm256_add_epi32(k, k), above);
        }
        k = _mm256_and_si256(k, _mm256_set1_epi32(15));
        k = _mm256_or_si256(_mm256_slli_epi64(k, 4), _mm256_srli_epi64(k, 32));
        k = _mm256_shuffle_epi8(k, _mm256_set1_epi64x(0x0800));
        uint16_t first = (uint16_t)_mm256_extract_epi16(k, 0);
        uint16_t second = (uint16_t)_mm256_extract_epi16(k, 8);
        memcpy(out + i / 2, &first, 2);
        memcpy(out + i / 2 + 2, &second, 2);
    }
#else
    int32_t index[BLOCK] = {0};
    for (int t = 1; t < 16; t++)
        for (int i = 0; i < BLOCK; i++) index[i] += x[i] > NAME(heap)[t];
    for (int i = 0; i < BLOCK / 2; i++) out[i] = (uint8_t)(index[2 * i] << 4 | index[2 * i + 1]);
#endif
}

static void NAME(quantize)(const void *args, int64_t begin, int64_t end) {
    const struct quantize_args *a = args;
    float x[BLOCK];
    uint8_t last[BLOCK / 2];
    for (int64_t b = begin; b < end; b++) {
        int64_t at = b * BLOCK, n = a->count - at;
        if (n >= BLOCK) {
            NAME(load)(x, a->x, at, BLOCK, a->dtype);
            float m = NAME(largest)(x, BLOCK);
            float inverse = 1.0f / (m < SMALLEST ? SMALLEST : m);
            a->absmax[b] = m;
            for (int i = 0; i < BLOCK; i++) x[i] *= inverse;
            NAME(pack_block)(x, a->packed + at / 2);
        } else {
            memset(x, 0, sizeof x);
            NAME(load)(x, a->x, at, n, a->dtype);
            float m = NAME(largest)(x, n);
            m = m < SMALLEST ? SMALLEST : m;
            a->absmax[b] = m;
            for (int i = 0; i < n; i++) x[i] /= m;
            NAME(pack_block)(x, last);
            memcpy(a->packed + at / 2, last, (size_t)(n + 1) / 2);
        }
    }
}

/* How many of the 255 sorted midpoints lie below x; of NaN all, as torch.bucketize says. */
INLINE uint8_t NAME(code)(const float *midpoints, float x) {
    int k = 0;
    for (int step = 128; step; step >>= 1) k += midpoints[k + step - 1] < x ? step : 0;
    return (uint8_t)k;
}

static void NAME(nest)(const void *args, int64_t begin, int64_t end) {
    const struct nest_args *a = args;
    float x[NESTED_BLOCK];
    for (int64_t b = begin; b < end; b++) {
        int64_t at = b * NESTED_BLOCK, n = a->count - at;
        n = n < NESTED_BLOCK ? n : NESTED_BLOCK;
        for (int64_t i = 0; i < n; i++) x[i] = a->absmax[at + i] - a->offset;
        float m = NAME(largest)(x, n), inverse = 1.0f / m;
        a->scale[b] = m;
        for (int64_t i = 0; i < n; i++) {
            float s = x[i] * inverse;
            s = s < -1.0f ? -1.0f : s > 1.0f ? 1.0f : s;
            float step = (s + 1.0f) * 0.5f * 65535.0f + 0.5f;
            int32_t whole = step == step ? (int32_t)step : 0;
            float snapped = -1.0f + 2.0f * (float)whole / 65535.0f;
            a->codes[at + i] = m == 0.0f ? 0 : NAME(code)(a->midpoints, snapped);
        }
    }
}

INLINE float NAME(scale)(const struct nf4 *w, int64_t block) {
    if (w->absmax) return w->absmax[block];
    float code = w->nested_map[w->codes[block]];
    return code * w->nested_absmax[block / NESTED_BLOCK] + w->offset;
}

/* 64 nibbles -> the table's entries, in order; the high nibble is the even one. */
INLINE void NAME(expand_f32)(const uint8_t *in, const float *table, float *out) {
#if LEVEL >= 1
    const __m128i mask = _mm_set1_epi8(15);
#if LEVEL == 2
    const __m512 all = _mm512_loadu_ps(table);
#else
    const __m256 low = _mm256_loadu_ps(table), high = _mm256_loadu_ps(table + 8);
#endif
    for (int half = 0; half < 2; half++) {
        __m128i b = _mm_loadu_si128((const __m128i *)(in + 16 * half));
        __m128i even = _mm_and_si128(_mm_srli_epi16(b, 4), mask), odd = _mm_and_si128(b, mask);
        __m128i pair[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
        for (int j = 0; j < 2; j++) {
            float *to = out + 32 * half + 16 * j;
#if LEVEL == 2
            __m512i k = _mm512_cvtepu8_epi32(pair[j]);
            _mm512_storeu_ps(to, _mm512_permutexvar_ps(k, all));
#else
            for (int part = 0; part < 2; part++) {
                __m256i k = _mm256_cvtepu8_epi32(part ? _mm_srli_si128(pair[j], 8) : pair[j]);
                __m256 below = _mm256_permutevar8x32_ps(low, k);
                __m256 above = _mm256_permutevar8x32_ps(high, k);
                __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(k, 28));
                _mm256_storeu_ps(to + 8 * part, _mm256_blendv_ps(below, above, upper));
            }
#endif
        }
    }
#else
    for (int i = 0; i < BLOCK / 2; i++) {
        out[2 * i] = table[in[i] >> 4];
        out[2 * i + 1] = table[in[i] & 15];
    }
#endif
}

/* The same for a table of bytes. */
INLINE void NAME(expand_u8)(const uint8_t *in, const uint8_t *table, uint8_t *out) {
#if LEVEL >= 1
    const __m128i mask = _mm_set1_epi8(15), all = _mm_loadu_si128((const __m128i *)table);
    for (int half = 0; half < 2; half++) {
        __m128i b = _mm_loadu_si128((const __m128i *)(in + 16 * half));
        __m128i even = _mm_shuffle_epi8(all, _mm_and_si128(_mm_srli_epi16(b, 4), mask));
        __m128i odd = _mm_shuffle_epi8(all, _mm_and_si128(b, mask));
        _mm_storeu_si128((__m128i *)(out + 32 * half), _mm_unpacklo_epi8(even, odd));
        _mm_storeu_si128((__m128i *)(out + 32 * half + 16), _mm_unpackhi_epi8(even, odd));
    }
#else
    for (int i = 0; i < BLOCK / 2; i++) {
        out[2 * i] = table[in[i] >> 4];
        out[2 * i + 1] = table[in[i] & 15];
    }
#endif
}

/* The same for a table of 16-bit words. */
INLINE void NAME(expand_u16)(const uint8_t *in, const uint16_t *table, uint16_t *out) {
#if LEVEL >= 1
    const __m128i mask = _mm_set1_epi8(15);
#if LEVEL == 2
    const __m512i all = _mm512_castsi256_si512(_mm256_loadu_si256((const __m256i *)table));
#else
    const __m128i first = _mm_loadu_si128((const __m128i *)table), byte = _mm_set1_epi16(255);
    const __m128i second = _mm_loadu_si128((const __m128i *)(table + 8));
    const __m128i low = _mm_packus_epi16(_mm_and_si128(first, byte), _mm_and_si128(second, byte));
    const __m128i high = _mm_packus_epi16(_mm_srli_epi16(first, 8), _mm_srli_epi16(second, 8));
#endif
    for (int half = 0; half < 2; half++) {
        __m128i b = _mm_loadu_si128((const __m128i *)(in + 16 * half));
        __m128i even = _mm_and_si128(_mm_srli_epi16(b, 4), mask), odd = _mm_and_si128(b, mask);
        __m128i pair[2] = {_mm_unpacklo_epi8(even, odd), _mm_unpackhi_epi8(even, odd)};
#if LEVEL == 2
        __m512i k = _mm512_cvtepu8_epi16(_mm256_set_m128i(pair[1], pair[0]));
        _mm512_storeu_si512(out + 32 * half, _mm512_permutexvar_epi16(k, all));
#else
        for (int j = 0; j < 2; j++) {
            __m128i l = _mm_shuffle_epi8(low, pair[j]), h = _mm_shuffle_epi8(high, pair[j]);
            __m128i *to = (__m128i *)(out + 32 * half + 16 * j);
            _mm_storeu_si128(to, _mm_unpacklo_epi8(l, h));
            _mm_storeu_si128(to + 1, _mm_unpackhi_epi8(l, h));
        }
#endif
    }
#else
    for (int i = 0; i < BLOCK / 2; i++) {
        out[2 * i] = table[in[i] >> 4];
        out[2 * i + 1] = table[in[i] & 15];
    }
#endif
}

INLINE void NAME(block_f32)(const uint8_t *in, float scale, float *out) {
    float table[16];
#pragma omp simd
    for (int i = 0; i < 16; i++) table[i] = QUANTILES[i] * scale;
    NAME(expand_f32)(in, table, out);
}

INLINE void NAME(block_bf16)(const uint8_t *in, float scale, uint16_t *out) {
    uint16_t table[16];
#pragma omp simd
    for (int i = 0; i < 16; i++)
        table[i] = (uint16_t)(NAME(bits)(NAME(rounded)(QUANTILES[i] * scale)) >> 16);
    NAME(expand_u16)(in, table, out);
}

/* A block's 32 bytes; the last block may have fewer, which are copied to `spare`. */
INLINE const uint8_t *NAME(block_bytes)(const struct nf4 *w, int64_t block, uint8_t *spare) {
    int64_t at = block * (BLOCK / 2), n = w->bytes - at;
    if (n >= BLOCK / 2) return w->packed + at;
    memset(spare, 0, BLOCK / 2);
    memcpy(spare, w->packed + at, (size_t)n);
    return spare;
}

static void NAME(dequantize)(const void *args, int64_t begin, int64_t end) {
    const struct dequantize_args *a = args;
    int64_t size = a->dtype == F32 ? 4 : 2, stop = a->first + a->count;
    uint8_t spare[BLOCK / 2];
    float cut[BLOCK];
    for (int64_t b = begin + a->first / BLOCK; b < end + a->first / BLOCK; b++) {
        int64_t from = b * BLOCK, low = from < a->first ? a->first : from;
        int64_t high = from + BLOCK > stop ? stop : from + BLOCK;
        char *out = (char *)a->out + (low - a->first) * size;
        void *to = high - low == BLOCK ? (void *)out : (void *)cut;
        const uint8_t *in = NAME(block_bytes)(&a->w, b, spare);
        float scale = NAME(scale)(&a->w, b);
        if (a->dtype == F32) NAME(block_f32)(in, scale, to);
        else NAME(block_bf16)(in, scale, to);
        if (to == (void *)cut)
            memcpy(out, (char *)cut + (low - from) * size, (size_t)((high - low) * size));
    }
}

/* What numbers are multiplied by to lie within 127; 0 where that is not finite. */
INLINE float NAME(steps)(float largest) {
    float s = 1.0f / largest * 127.0f;
    return s <= 3.4028234e38f ? s : 0.0f;
}

static void NAME(to_int8)(const void *args, int64_t begin, int64_t end) {
    const struct to_int8_args *a = args;
    uint8_t spare[BLOCK / 2], table[16], cut[BLOCK];
    for (int64_t row = begin; row < end; row++) {
        int64_t first = (a->first + row) * a->columns, stop = first + a->columns;
        float largest = 0.0f;
        for (int64_t b = first / BLOCK; b * BLOCK < stop; b++) {
            float s = fabsf(NAME(scale)(&a->w, b));
            largest = s > largest ? s : largest;
        }
        float steps = NAME(steps)(largest);
        a->scale[row] = largest / 127.0f;
        for (int64_t b = first / BLOCK; b * BLOCK < stop; b++) {
            int64_t from = b * BLOCK, low = from < first ? first : from;
            int64_t high = from + BLOCK > stop ? stop : from + BLOCK;
            int8_t *out = a->q + row * a->columns + (low - first);
            float scale = NAME(scale)(&a->w, b);
#pragma omp simd
            for (int i = 0; i < 16; i++)
                table[i] = (uint8_t)NAME(bits)(QUANTILES[i] * scale * steps + ROUNDER);
            const uint8_t *in = NAME(block_bytes)(&a->w, b, spare);
            if (high - low == BLOCK) {
                NAME(expand_u8)(in, table, (uint8_t *)out);
            } else {
                NAME(expand_u8)(in, table, cut);
                memcpy(out, cut + (low - from), (size_t)(high - low));
            }
        }
    }
}

/* ---- int8 ---- */

static void NAME(int8_dequantize)(const void *args, int64_t begin, int64_t end) {
    const struct int8_args *a = args;
    float x[TILE];
    for (int64_t row = begin; row < end; row++) {
        float absmax = a->absmax[row];
        for (int64_t c = 0; c < a->columns; c += TILE) {
            int64_t n = a->columns - c < TILE ? a->columns - c : TILE;
            const int8_t *q = a->q + row * a->columns + c;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) x[i] = (float)q[i] * absmax * (1.0f / 127.0f);
            NAME(store)(a->out, row * a->columns + c, x, n, a->dtype);
        }
    }
}

static void NAME(int8_quantize)(const void *args, int64_t begin, int64_t end) {
    const struct int8_quantize_args *a = args;
    float x[TILE];
    for (int64_t row = begin; row < end; row++) {
        float largest = 0.0f;
        for (int64_t c = 0; c < a->columns; c += TILE) {
            int64_t n = a->columns - c < TILE ? a->columns - c : TILE;
            NAME(load)(x, a->x, row * a->columns + c, n, a->dtype);
            float m = NAME(largest)(x, n);
            largest = NAME(bits)(m) > NAME(bits)(largest) ? m : largest;
        }
        float steps = NAME(steps)(largest);
        a->absmax[row] = largest;
        for (int64_t c = 0; c < a->columns; c += TILE) {
            int64_t n = a->columns - c < TILE ? a->columns - c : TILE;
            int8_t *q = a->q + row * a->columns + c;
            NAME(load)(x, a->x, row * a->columns + c, n, a->dtype);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) {
                float v = x[i] * steps + ROUNDER;
                q[i] = (int8_t)(uint8_t)NAME(bits)(v);
            }
        }
    }
}

static void NAME(rescale)(const void *args, int64_t begin, int64_t end) {
    const struct rescale_args *a = args;
    float x[TILE];
    for (int64_t row = begin; row < end; row++) {
        float scale = a->rows[row];
        for (int64_t c = 0; c < a->width; c += TILE) {
            int64_t n = a->width - c < TILE ? a->width - c : TILE;
            const int32_t *sums = a->sums + row * a->width + c;
            const float *columns = a->columns + c;
#pragma omp simd
            for (int64_t i = 0; i < n; i++) x[i] = (float)sums[i] * scale * columns[i];
            NAME(store)(a->out, row * a->stride + c, x, n, a->dtype);
        }
    }
}

/* ---- the loss ---- */

/* x become exp(x - m); they, and they times x - m, are added to two sums. */
INLINE void NAME(exps)(float *x, int64_t n, float m, double *total, double *weighted) {
    float s = 0, t = 0;
#pragma omp simd reduction(+ : s, t)
    for (int64_t i = 0; i < n; i++) {
        float d = x[i] - m, e = NAME(exp)(d);
        s += e;
        t += e * (d < -87.0f ? 0.0f : d);
        x[i] = e;
    }
    *total += s;
    *weighted += t;
}

static void NAME(loss)(const void *args, int64_t begin, int64_t end) {
    const struct loss_args *a = args;
    for (int64_t row = begin; row < end; row++) {
        float *x = a->logits + row * a->stride;
        int64_t n = a->vocabulary;
        float m = NAME(maximum)(x, n), at_label = x[a->labels[row]];
        double total = 0, weighted = 0;
        for (int64_t c = 0; c < n; c += TILE)
            NAME(exps)(x + c, n - c < TILE ? n - c : TILE, m, &total, &weighted);
        float inverse = (float)(-1.0 / total);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) x[i] *= inverse;
        x[a->labels[row]] += 1.0f;
        a->log_p[row] = (float)((double)at_label - m - log(total));
        a->entropy[row] = (float)(log(total) - weighted / total);
        a->top1[row] = at_label >= m;
    }
}

/* A part of the vocabulary: its sums go to those of the parts before it, which are rescaled where
 * a logit is higher than all of theirs. The label's own term is left out of the sums. */
static void NAME(loss_part)(const void *args, int64_t begin, int64_t end) {
    const struct loss_part_args *a = args;
    for (int64_t row = begin; row < end; row++) {
        float *x = a->logits + row * a->count;
        int64_t n = a->count, label = a->labels[row] - a->first;
        float before = a->highest[row], m = NAME(maximum)(x, n);
        if (before > m || before != before) m = before;
        if (label >= 0 && label < n) {
            a->at_label[row] = x[label];
            x[label] = -INFINITY;
        }
        double total = 0, weighted = 0;
        for (int64_t c = 0; c < n; c += TILE) {
            int64_t count = n - c < TILE ? n - c : TILE;
            NAME(exps)(x + c, count, m, &total, &weighted);
            NAME(store)(a->out, row * n + c, x + c, count, a->dtype);
        }
        double fall = before == -INFINITY ? 0.0 : (double)before - m, scale = exp(fall);
        if (before == -INFINITY) scale = 0.0;
        a->weighted[row] = scale * (a->weighted[row] + fall * a->total[row]) + weighted;
        a->total[row] = scale * a->total[row] + total;
        a->highest[row] = m;
        a->scale[row] = (float)scale;
    }
}

/* ---- RMSNorm ---- */

static void NAME(norm)(const void *args, int64_t begin, int64_t end) {
    const struct norm_args *a = args;
    float x[TILE], w[TILE];
    for (int64_t row = begin; row < end; row++) {
        double squares = 0;
        for (int64_t c = 0; c < a->columns; c += TILE) {
            int64_t n = a->columns - c < TILE ? a->columns - c : TILE;
            float s = 0;
            NAME(load)(x, a->x, row * a->columns + c, n, a->dtype);
#pragma omp simd reduction(+ : s)
            for (int64_t i = 0; i < n; i++) s += x[i] * x[i];
            squares += s;
        }
        float rstd = 1.0f / sqrtf((float)(squares / (double)a->columns) + a->eps);
        a->rstd[row] = rstd;
        for (int64_t c = 0; c < a->columns; c += TILE) {
            int64_t n = a->columns - c < TILE ? a->columns - c : TILE;
            NAME(load)(x, a->x, row * a->columns + c, n, a->dtype);
            NAME(load)(w, a->w, c, n, a->dtype);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) x[i] *= rstd;
            NAME(round_tile)(x, n, a->dtype);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) x[i] *= w[i];
            NAME(store)(a->out, row * a->columns + c, x, n, a->dtype);
        }
    }
}

static void NAME(norm_backward)(const void *args, int64_t begin, int64_t end) {
    const struct norm_args *a = args;
    float x[TILE], w[TILE], g[TILE];
    for (int64_t row = begin; row < end; row++) {
        float rstd = a->rstd[row];
        double product = 0;
        for (int64_t c = 0; c < a->columns; c += TILE) {
            int64_t n = a->columns - c < TILE ? a->columns - c : TILE;
            float s = 0;
            NAME(load)(x, a->x, row * a->columns + c, n, a->dtype);
            NAME(load)(g, a->g, row * a->columns + c, n, a->dtype);
            NAME(load)(w, a->w, c, n, a->dtype);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) g[i] *= w[i];
            NAME(round_tile)(g, n, a->dtype);
#pragma omp simd reduction(+ : s)
            for (int64_t i = 0; i < n; i++) s += g[i] * x[i];
            product += s;
        }
        float slope = (float)(product * rstd * rstd * rstd / (double)a->columns);
        for (int64_t c = 0; c < a->columns; c += TILE) {
            int64_t n = a->columns - c < TILE ? a->columns - c : TILE;
            NAME(load)(x, a->x, row * a->columns + c, n, a->dtype);
            NAME(load)(g, a->g, row * a->columns + c, n, a->dtype);
            NAME(load)(w, a->w, c, n, a->dtype);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) g[i] *= w[i];
            NAME(round_tile)(g, n, a->dtype);
#pragma omp simd
            for (int64_t i = 0; i < n; i++) g[i] = g[i] * rstd - x[i] * slope;
            NAME(store)(a->out, row * a->columns + c, g, n, a->dtype);
        }
    }
}

/* ---- the gate: silu(gate) * up ---- */

static void NAME(gate)(const void *args, int64_t begin, int64_t end) {
    const struct gate_args *a = args;
    float x[TILE], u[TILE];
    for (int64_t at = begin * TILE; at < end * TILE && at < a->count; at += TILE) {
        int64_t n = a->count - at < TILE ? a->count - at : TILE;
        NAME(load)(x, a->gate, at, n, a->dtype);
        NAME(load)(u, a->up, at, n, a->dtype);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) x[i] *= 1.0f / (1.0f + NAME(exp)(-x[i]));
        NAME(round_tile)(x, n, a->dtype);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) x[i] *= u[i];
        NAME(store)(a->h, at, x, n, a->dtype);
    }
}

static void NAME(gate_backward)(const void *args, int64_t begin, int64_t end) {
    const struct gate_args *a = args;
    float x[TILE], u[TILE], g[TILE], s[TILE], act[TILE];
    for (int64_t at = begin * TILE; at < end * TILE && at < a->count; at += TILE) {
        int64_t n = a->count - at < TILE ? a->count - at : TILE;
        NAME(load)(x, a->gate, at, n, a->dtype);
        NAME(load)(u, a->up, at, n, a->dtype);
        NAME(load)(g, a->g, at, n, a->dtype);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) {
            s[i] = 1.0f / (1.0f + NAME(exp)(-x[i]));
            act[i] = x[i] * s[i];
            x[i] = s[i] * (1.0f + x[i] * (1.0f - s[i]));
        }
        NAME(round_tile)(act, n, a->dtype);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) s[i] = g[i] * act[i];
        if (a->h) {
#pragma omp simd
            for (int64_t i = 0; i < n; i++) act[i] *= u[i];
            NAME(store)(a->h, at, act, n, a->dtype);
        }
#pragma omp simd
        for (int64_t i = 0; i < n; i++) g[i] *= u[i];
        NAME(round_tile)(g, n, a->dtype);
#pragma omp simd
        for (int64_t i = 0; i < n; i++) g[i] *= x[i];
        NAME(store)(a->g_up, at, s, n, a->dtype);
        NAME(store)(a->g_gate, at, g, n, a->dtype);
    }
}

static const struct kernels NAME(kernels) = {
    NAME(quantize), NAME(nest), NAME(dequantize), NAME(to_int8), NAME(int8_dequantize),
    NAME(int8_quantize), NAME(rescale), NAME(loss), NAME(loss_part), NAME(norm), NAME(norm_backward), NAME(gate),
    NAME(gate_backward),
};

#undef INLINE
#undef FMA
