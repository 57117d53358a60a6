/* PIL's 8-bit resampling of RGB images, restricted to the window that a crop needs.
 *
 * Every output byte is clip8((2^21 + sum of pixel * tap) >> 22) with PIL's integer taps, one axis after the other with
 * uint8 between them, so that the bytes are PIL's. The speed comes from the order of the loops: the horizontal pass
 * works on 16 rows side by side, transposed, so that both passes are plain multiply-adds over neighbouring bytes. Where
 * there are vectors, they multiply words of 16 bits, two taps at once: a tap is high * 2^11 + low, and the two sums are
 * put together at the end.
 *
 * Compiled without contraction of floating-point expressions: a fused multiply-add would give other taps.
 */
#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#ifdef __AVX2__
#include <immintrin.h>
#endif

#define PRECISION_BITS 22
#define ROUNDING (1 << (PRECISION_BITS - 1))
#define CHANNELS 3
#define ROWS 16                 /* rows that the horizontal pass takes at once */
#define PIXEL (CHANNELS * ROWS) /* bytes of one column of such a block */
#define LOW_BITS 11             /* of a tap's low half; both fit words of 16 bits, and their sums 32 */
#define MAX_STEPS 32

enum { FILTER_BOX = 0, FILTER_BICUBIC = 1 };

/* Two neighbouring taps, one in either half of a word. */
typedef struct {
    uint32_t high, low;
} pair_t;

/* One axis of one resize, for outputs lo..hi: output o reads the `width` inputs from first[o - lo] on, in_lo..in_hi in
 * all. Taps are [hi - lo][width]; pairs, where `width` is even, the same. */
typedef struct {
    int in_size, out_size, lo, hi, in_lo, in_hi, width;
    int32_t *first, *taps;
    pair_t *pairs;
} axis_t;

typedef struct {
    int width, height, filter, vertical_first;
} resize_t;

/* A rectangle of an interleaved RGB image that lies in memory at `pixels`, its first pixel being (x, y). */
typedef struct {
    const uint8_t *pixels;
    ptrdiff_t stride;
    int x, y;
} view_t;

static double filter_value(int filter, double x) {
    const double a = -0.5;
    if (filter == FILTER_BOX) {
        return x > -0.5 && x <= 0.5 ? 1.0 : 0.0;
    }
    x = fabs(x);
    if (x < 1.0) {
        return ((a + 2.0) * x - (a + 3.0)) * x * x + 1;
    }
    return x < 2.0 ? (((x - 5) * x + 8) * x - 4) * a : 0.0;
}

static void taps_of(const axis_t *axis, int filter, int o, double *weights) {
    const double scale = (double)axis->in_size / axis->out_size, stretch = scale < 1.0 ? 1.0 : scale;
    const double support = (filter == FILTER_BOX ? 0.5 : 2.0) * stretch, inverse = 1.0 / stretch;
    const double center = (o + 0.5) * scale;
    int first = (int)(center - support + 0.5), last = (int)(center + support + 0.5);
    first = first < 0 ? 0 : first;
    last = last > axis->in_size ? axis->in_size : last;
    double total = 0.0;
    for (int i = first; i < last; i++) {
        weights[i - first] = filter_value(filter, (i - center + 0.5) * inverse);
        total += weights[i - first];
    }
    /* Every output reads as many inputs, so that loops over them are of one length; those beside its own weigh 0. */
    const int before = first + axis->width > axis->in_size ? first + axis->width - axis->in_size : 0;
    int32_t *taps = axis->taps + (ptrdiff_t)(o - axis->lo) * axis->width;
    memset(taps, 0, (size_t)axis->width * sizeof *taps);
    for (int k = 0; k < last - first; k++) {
        double fixed = (total != 0.0 ? weights[k] / total : weights[k]) * (1 << PRECISION_BITS);
        taps[before + k] = (int32_t)(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
    }
    axis->first[o - axis->lo] = first - before;
    pair_t *pairs = axis->pairs + (ptrdiff_t)(o - axis->lo) * (axis->width / 2);
    for (int k = 0; k + 1 < axis->width; k += 2) {
        const int32_t mask = (1 << LOW_BITS) - 1;
        pairs[k / 2].high = ((uint32_t)(taps[k] >> LOW_BITS) & 0xFFFF) | (uint32_t)(taps[k + 1] >> LOW_BITS) << 16;
        pairs[k / 2].low = (uint32_t)(taps[k] & mask) | (uint32_t)(taps[k + 1] & mask) << 16;
    }
}

static int make_axis(axis_t *axis, int in_size, int out_size, int filter, int lo, int hi) {
    memset(axis, 0, sizeof *axis);
    axis->in_size = in_size, axis->out_size = out_size, axis->lo = lo, axis->hi = hi;
    if (in_size == out_size) {
        axis->in_lo = lo, axis->in_hi = hi;
        return 1;
    }
    const double scale = (double)in_size / out_size, stretch = scale < 1.0 ? 1.0 : scale;
    /* Between two numbers d apart lie at most floor(d) + 1 whole ones; a thousandth for how d was rounded. */
    const int most = (int)((filter == FILTER_BOX ? 1.0 : 4.0) * stretch + 1e-3) + 1, even = most + most % 2;
    axis->width = even > in_size ? in_size : even;
    const size_t outputs = (size_t)(hi - lo), width = (size_t)axis->width;
    axis->first = malloc(outputs * sizeof(int32_t) * (1 + width));
    axis->pairs = malloc(outputs * sizeof(pair_t) * (width / 2 + 1));
    double *weights = malloc((size_t)most * sizeof(double));
    const int fits = axis->first && axis->pairs && weights;
    if (fits) {
        axis->taps = axis->first + outputs;
        for (int o = lo; o < hi; o++) {
            taps_of(axis, filter, o, weights);
        }
        axis->in_lo = axis->first[0];
        axis->in_hi = axis->first[outputs - 1] + axis->width;
    }
    free(weights);
    return fits;
}

static inline uint8_t clip8(int32_t sum) {
    const int32_t value = sum >> PRECISION_BITS;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* out[j] = clip8(sum over k below `width` of taps[k] * in[k * stride + j]) for PIXEL neighbouring bytes. */
static void weigh_plainly(const int32_t *taps, int width, const uint8_t *in, ptrdiff_t stride, uint8_t *out) {
    int32_t sum[PIXEL];
    for (int j = 0; j < PIXEL; j++) {
        sum[j] = ROUNDING;
    }
    for (int k = 0; k < width; k++, in += stride) {
        for (int j = 0; j < PIXEL; j++) {
            sum[j] += taps[k] * in[j];
        }
    }
    for (int j = 0; j < PIXEL; j++) {
        out[j] = clip8(sum[j]);
    }
}

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
#define LANES 16
typedef __m512i sums_t;
#define ZERO _mm512_setzero_si512
#define ALL_EQUAL(word) _mm512_set1_epi32((int)(word))
#define ADD_PRODUCTS _mm512_dpwssd_epi32

/* Bytes a0..a15 and b0..b15 as words a0 b0 a1 b1 ... */
static inline __m512i interleaved(const uint8_t *a, const uint8_t *b) {
    const __m512i order =
        _mm512_set_epi64(0x001F000F001E000E, 0x001D000D001C000C, 0x001B000B001A000A, 0x0019000900180008,
                         0x0017000700160006, 0x0015000500140004, 0x0013000300120002, 0x0011000100100000);
    const __m256i first = _mm256_castsi128_si256(_mm_loadu_si128((const __m128i *)a));
    const __m256i both = _mm256_inserti128_si256(first, _mm_loadu_si128((const __m128i *)b), 1);
    return _mm512_maskz_permutexvar_epi8(0x5555555555555555, order, _mm512_castsi256_si512(both));
}

static inline void put(__m512i high, __m512i low, uint8_t *out) {
    const __m512i value = _mm512_srai_epi32(_mm512_add_epi32(_mm512_slli_epi32(high, LOW_BITS), low), PRECISION_BITS);
    _mm_storeu_si128((__m128i *)out, _mm512_cvtusepi32_epi8(_mm512_max_epi32(value, _mm512_setzero_si512())));
}
#elif defined(__AVX2__)
#define LANES 8
typedef __m256i sums_t;
#define ZERO _mm256_setzero_si256
#define ALL_EQUAL(word) _mm256_set1_epi32((int)(word))
#define ADD_PRODUCTS(sum, words, taps) _mm256_add_epi32(sum, _mm256_madd_epi16(words, taps))

static inline __m256i interleaved(const uint8_t *a, const uint8_t *b) {
    const __m128i rows[2] = {_mm_loadl_epi64((const __m128i *)a), _mm_loadl_epi64((const __m128i *)b)};
    return _mm256_cvtepu8_epi16(_mm_unpacklo_epi8(rows[0], rows[1]));
}

static inline void put(__m256i high, __m256i low, uint8_t *out) {
    const __m256i value = _mm256_srai_epi32(_mm256_add_epi32(_mm256_slli_epi32(high, LOW_BITS), low), PRECISION_BITS);
    const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
    _mm_storel_epi64((__m128i *)out, _mm_packus_epi16(words, words));
}
#endif

#ifdef LANES
/* As weigh_plainly, for an even `width`. Not inlined: its caller's variables would push the sums out of registers. */
__attribute__((noinline)) static void weigh_pairs(const pair_t *pairs, int width, const uint8_t *in, ptrdiff_t stride,
                                                  uint8_t *out) {
    for (int done = 0; done < PIXEL; done += 3 * LANES, in += 3 * LANES, out += 3 * LANES) {
        sums_t high0 = ZERO(), high1 = ZERO(), high2 = ZERO();
        sums_t low0 = ALL_EQUAL(ROUNDING), low1 = low0, low2 = low0;
        const uint8_t *a = in;
        for (int k = 0; k < width / 2; k++, a += 2 * stride) {
            const sums_t high = ALL_EQUAL(pairs[k].high), low = ALL_EQUAL(pairs[k].low);
            const sums_t words0 = interleaved(a, a + stride);
            const sums_t words1 = interleaved(a + LANES, a + stride + LANES);
            const sums_t words2 = interleaved(a + 2 * LANES, a + stride + 2 * LANES);
            high0 = ADD_PRODUCTS(high0, words0, high), low0 = ADD_PRODUCTS(low0, words0, low);
            high1 = ADD_PRODUCTS(high1, words1, high), low1 = ADD_PRODUCTS(low1, words1, low);
            high2 = ADD_PRODUCTS(high2, words2, high), low2 = ADD_PRODUCTS(low2, words2, low);
        }
        put(high0, low0, out), put(high1, low1, out + LANES), put(high2, low2, out + 2 * LANES);
    }
}
#endif

static inline void weigh(const axis_t *axis, int o, const uint8_t *in, ptrdiff_t stride, uint8_t *out) {
#ifdef LANES
    if (axis->width % 2 == 0) {
        weigh_pairs(axis->pairs + (ptrdiff_t)o * (axis->width / 2), axis->width, in, stride, out);
        return;
    }
#endif
    weigh_plainly(axis->taps + (ptrdiff_t)o * axis->width, axis->width, in, stride, out);
}

typedef uint8_t bytes_t __attribute__((vector_size(16)));
#ifdef __clang__
#define SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define SHUFFLE(a, b, ...) __builtin_shuffle(a, b, (bytes_t){__VA_ARGS__})
#endif

/* dst[c][r] = src[r][c] for 16 x 16 bytes: four times, rows i and i + 8 are shuffled into rows 2 i and 2 i + 1. */
static inline void transpose_16x16(const uint8_t *src, ptrdiff_t src_stride, uint8_t *dst, ptrdiff_t dst_stride) {
    bytes_t row[16], shuffled[16];
    for (int r = 0; r < 16; r++) {
        memcpy(&row[r], src + r * src_stride, 16);
    }
#pragma GCC unroll 4
    for (int round = 0; round < 4; round++) {
#pragma GCC unroll 8
        for (int i = 0; i < 8; i++) {
            const bytes_t a = row[i], b = row[i + 8];
            shuffled[2 * i] = SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            shuffled[2 * i + 1] = SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        memcpy(row, shuffled, sizeof row);
    }
    for (int c = 0; c < 16; c++) {
        memcpy(dst + c * dst_stride, &row[c], 16);
    }
}

/* dst[c][r] = src[r][c] for `rows` x `columns` bytes. The last blocks may overlap those before them. */
static void transpose(const uint8_t *src, ptrdiff_t src_stride, int rows, int columns, uint8_t *dst,
                      ptrdiff_t dst_stride) {
    if (rows < 16 || columns < 16) {
        for (int r = 0; r < rows; r++) {
            for (int c = 0; c < columns; c++) {
                dst[c * dst_stride + r] = src[r * src_stride + c];
            }
        }
        return;
    }
    for (int r = 0; r < rows; r += 16) {
        const int row = r + 16 > rows ? rows - 16 : r;
        for (int c = 0; c < columns; c += 16) {
            const int column = c + 16 > columns ? columns - 16 : c;
            transpose_16x16(src + row * src_stride + column, src_stride, dst + column * dst_stride + row, dst_stride);
        }
    }
}

/* Rows y_lo..y_hi of `in`, columns resampled: `out` [y_hi - y_lo][hi - lo] pixels. `block`: scratch for both sides. */
static void horizontal(const axis_t *axis, view_t in, int y_lo, int y_hi, uint8_t *out, uint8_t *block) {
    const int in_columns = axis->in_hi - axis->in_lo, out_columns = axis->hi - axis->lo;
    const ptrdiff_t out_stride = (ptrdiff_t)out_columns * CHANNELS;
    uint8_t *resampled = block + (ptrdiff_t)in_columns * PIXEL;
    for (int next = y_lo; next < y_hi; next += ROWS) {
        /* The last block may overlap the one before it: whole ones are faster. */
        const int y = next + ROWS > y_hi && y_hi - y_lo >= ROWS ? y_hi - ROWS : next;
        const int rows = y_hi - y < ROWS ? y_hi - y : ROWS;
        const uint8_t *src = in.pixels + (y - in.y) * in.stride + (ptrdiff_t)(axis->in_lo - in.x) * CHANNELS;
        transpose(src, in.stride, rows, in_columns * CHANNELS, block, ROWS);
        for (int o = 0; o < out_columns; o++) {
            const uint8_t *column = block + (ptrdiff_t)(axis->first[o] - axis->in_lo) * PIXEL;
            weigh(axis, o, column, PIXEL, resampled + (ptrdiff_t)o * PIXEL);
        }
        uint8_t *dst = out + (y - y_lo) * out_stride;
        transpose(resampled, ROWS, out_columns * CHANNELS, rows, dst, out_stride);
    }
}

/* Columns x_lo..x_hi of `in`, rows resampled: `out` [hi - lo][x_hi - x_lo] pixels. */
static void vertical(const axis_t *axis, view_t in, int x_lo, int x_hi, uint8_t *out) {
    const int bytes = (x_hi - x_lo) * CHANNELS;
    const uint8_t *base = in.pixels + (ptrdiff_t)(x_lo - in.x) * CHANNELS;
    for (int o = 0; o < axis->hi - axis->lo; o++) {
        const int32_t *taps = axis->taps + (ptrdiff_t)o * axis->width;
        const uint8_t *row = base + (axis->first[o] - in.y) * in.stride;
        uint8_t *dst = out + (ptrdiff_t)o * bytes;
        int at = 0;
        for (; at + PIXEL <= bytes; at += PIXEL) {
            weigh(axis, o, row + at, in.stride, dst + at);
        }
        for (; at < bytes; at++) {
            int32_t sum = ROUNDING;
            for (int k = 0; k < axis->width; k++) {
                sum += taps[k] * row[k * in.stride + at];
            }
            dst[at] = clip8(sum);
        }
    }
}

/* Runs one pass into fresh memory and frees what the last pass had made; 0 if there is no memory. */
static int pass(const axis_t *axis, int is_vertical, int lo, int hi, view_t *view, uint8_t **owned) {
    if (axis->in_size == axis->out_size) {
        return 1;
    }
    const size_t outputs = (size_t)(axis->hi - axis->lo), across = (size_t)(hi - lo);
    uint8_t *out = malloc(outputs * across * CHANNELS);
    uint8_t *block = is_vertical ? NULL : malloc((size_t)(axis->in_hi - axis->in_lo + axis->hi - axis->lo) * PIXEL);
    const int fits = out && (is_vertical || block);
    if (fits && is_vertical) {
        vertical(axis, *view, lo, hi, out);
        *view = (view_t){out, (ptrdiff_t)across * CHANNELS, lo, axis->lo};
    } else if (fits) {
        horizontal(axis, *view, lo, hi, out, block);
        *view = (view_t){out, (ptrdiff_t)outputs * CHANNELS, axis->lo, lo};
    }
    free(block);
    free(*owned);
    *owned = out;
    return fits;
}

static int run_step(const axis_t *x, const axis_t *y, int vertical_first, view_t *view, uint8_t **owned) {
    if (vertical_first) {
        return pass(y, 1, x->in_lo, x->in_hi, view, owned) && pass(x, 0, y->lo, y->hi, view, owned);
    }
    return pass(x, 0, y->in_lo, y->in_hi, view, owned) && pass(y, 1, x->lo, x->hi, view, owned);
}

/* Carries out a plan on an interleaved RGB image: `out` is planar, [3][size][size]. 0 if there is no memory for it. */
int rae_crop(const uint8_t *image, int width, int height, const resize_t *resizes, int steps, int left, int top,
             int size, uint8_t *out) {
    axis_t x[MAX_STEPS], y[MAX_STEPS];
    memset(x, 0, sizeof x);
    memset(y, 0, sizeof y);
    int x_lo = left, x_hi = left + size, y_lo = top, y_hi = top + size, fits = steps <= MAX_STEPS;
    /* Backwards: what each step must give is what the next one reads. */
    for (int s = steps - 1; fits && s >= 0; s--) {
        const int in_width = s ? resizes[s - 1].width : width, in_height = s ? resizes[s - 1].height : height;
        fits = make_axis(&x[s], in_width, resizes[s].width, resizes[s].filter, x_lo, x_hi) &&
               make_axis(&y[s], in_height, resizes[s].height, resizes[s].filter, y_lo, y_hi);
        x_lo = x[s].in_lo, x_hi = x[s].in_hi, y_lo = y[s].in_lo, y_hi = y[s].in_hi;
    }
    view_t view = {image, (ptrdiff_t)width * CHANNELS, 0, 0};
    uint8_t *owned = NULL;
    for (int s = 0; fits && s < steps; s++) {
        fits = run_step(&x[s], &y[s], resizes[s].vertical_first, &view, &owned);
    }
    if (fits) {
        const ptrdiff_t plane = (ptrdiff_t)size * size;
        for (int row = 0; row < size; row++) {
            const uint8_t *src = view.pixels + (top + row - view.y) * view.stride + (left - view.x) * CHANNELS;
            uint8_t *dst = out + (ptrdiff_t)row * size;
            for (int column = 0; column < size; column++) {
                dst[column] = src[CHANNELS * column];
                dst[plane + column] = src[CHANNELS * column + 1];
                dst[2 * plane + column] = src[CHANNELS * column + 2];
            }
        }
    }
    free(owned);
    for (int s = 0; s < steps && s < MAX_STEPS; s++) {
        free(x[s].first), free(x[s].pairs);
        free(y[s].first), free(y[s].pairs);
    }
    return fits;
}
