/* PIL's 8-bit resampling of RGB images, restricted to the window that a crop needs.
 *
 * Every output byte is clip8((2^21 + sum of pixel * tap) >> 22) with PIL's integer taps, one axis after the other with
 * uint8 between them, so that the bytes are PIL's. The speed comes from the order of the loops: the horizontal pass
 * works on 16 rows side by side, transposed, so that both passes are plain multiply-adds over neighbouring bytes.
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
#define LANES 8                 /* bytes that one vector instruction multiplies */
#define VECTORS (PIXEL / LANES)
#define MAX_STEPS 32

enum { FILTER_BOX = 0, FILTER_BICUBIC = 1 };

/* One axis of one resize, for outputs lo..hi: output o reads inputs first[o - lo] .. first[o - lo] + count[o - lo]. */
typedef struct {
    int in_size, out_size, lo, hi, in_lo, in_hi, width;
    int32_t *first, *count, *taps;
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
    int32_t *taps = axis->taps + (ptrdiff_t)(o - axis->lo) * axis->width;
    for (int k = 0; k < last - first; k++) {
        double fixed = (total != 0.0 ? weights[k] / total : weights[k]) * (1 << PRECISION_BITS);
        taps[k] = (int32_t)(fixed < 0 ? fixed - 0.5 : fixed + 0.5);
    }
    axis->first[o - axis->lo] = first;
    axis->count[o - axis->lo] = last - first;
}

static int make_axis(axis_t *axis, int in_size, int out_size, int filter, int lo, int hi) {
    memset(axis, 0, sizeof *axis);
    axis->in_size = in_size, axis->out_size = out_size, axis->lo = lo, axis->hi = hi;
    if (in_size == out_size) {
        axis->in_lo = lo, axis->in_hi = hi;
        return 1;
    }
    const double scale = (double)in_size / out_size;
    axis->width = (int)ceil((filter == FILTER_BOX ? 0.5 : 2.0) * (scale < 1.0 ? 1.0 : scale)) * 2 + 1;
    const size_t outputs = (size_t)(hi - lo);
    axis->first = malloc(outputs * sizeof(int32_t) * (size_t)(2 + axis->width));
    double *weights = malloc((size_t)axis->width * sizeof(double));
    if (axis->first && weights) {
        axis->count = axis->first + outputs;
        axis->taps = axis->count + outputs;
        for (int o = lo; o < hi; o++) {
            taps_of(axis, filter, o, weights);
        }
        axis->in_lo = axis->first[0];
        axis->in_hi = axis->first[outputs - 1] + axis->count[outputs - 1];
    }
    free(weights);
    return axis->count != NULL;
}

static inline uint8_t clip8(int32_t sum) {
    const int32_t value = sum >> PRECISION_BITS;
    return (uint8_t)(value < 0 ? 0 : value > 255 ? 255 : value);
}

/* out[j] = clip8(sum over k of taps[k] * in[k * stride + j]) for LANES * VECTORS neighbouring bytes. */
#ifdef __AVX2__
static inline void weigh(const int32_t *taps, int count, const uint8_t *in, ptrdiff_t stride, uint8_t *out) {
    __m256i sum[VECTORS];
    for (int j = 0; j < VECTORS; j++) {
        sum[j] = _mm256_set1_epi32(ROUNDING);
    }
    for (int k = 0; k < count; k++, in += stride) {
        const __m256i tap = _mm256_set1_epi32(taps[k]);
        for (int j = 0; j < VECTORS; j++) {
            const __m256i wide = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i *)(in + j * LANES)));
            sum[j] = _mm256_add_epi32(sum[j], _mm256_mullo_epi32(wide, tap));
        }
    }
    for (int j = 0; j < VECTORS; j++) {
        const __m256i value = _mm256_srai_epi32(sum[j], PRECISION_BITS);
        const __m128i words = _mm_packus_epi32(_mm256_castsi256_si128(value), _mm256_extracti128_si256(value, 1));
        _mm_storel_epi64((__m128i *)(out + j * LANES), _mm_packus_epi16(words, words));
    }
}
#else
static inline void weigh(const int32_t *taps, int count, const uint8_t *in, ptrdiff_t stride, uint8_t *out) {
    int32_t sum[VECTORS * LANES];
    for (int j = 0; j < VECTORS * LANES; j++) {
        sum[j] = ROUNDING;
    }
    for (int k = 0; k < count; k++, in += stride) {
        for (int j = 0; j < VECTORS * LANES; j++) {
            sum[j] += taps[k] * in[j];
        }
    }
    for (int j = 0; j < VECTORS * LANES; j++) {
        out[j] = clip8(sum[j]);
    }
}
#endif

static inline void exchange(uint64_t row[8], int distance, uint64_t mask) {
#pragma GCC unroll 8
    for (int r = 0; r < 8; r++) {
        if (!(r & distance)) {
            const uint64_t swap = ((row[r] >> (8 * distance)) ^ row[r + distance]) & mask;
            row[r] ^= swap << (8 * distance);
            row[r + distance] ^= swap;
        }
    }
}

/* dst[c][r] = src[r][c] for 8 x 8 bytes, by exchanging ever smaller blocks within 64-bit words. */
static inline void transpose_8x8(const uint8_t *src, ptrdiff_t src_stride, uint8_t *dst, ptrdiff_t dst_stride) {
    uint64_t row[8];
    for (int r = 0; r < 8; r++) {
        memcpy(&row[r], src + r * src_stride, 8);
    }
    exchange(row, 4, 0x00000000FFFFFFFFu);
    exchange(row, 2, 0x0000FFFF0000FFFFu);
    exchange(row, 1, 0x00FF00FF00FF00FFu);
    for (int c = 0; c < 8; c++) {
        memcpy(dst + c * dst_stride, &row[c], 8);
    }
}

/* dst[c][r] = src[r][c] for `rows` x `columns` bytes. */
static void transpose(const uint8_t *src, ptrdiff_t src_stride, int rows, int columns, uint8_t *dst,
                      ptrdiff_t dst_stride) {
    int r = 0;
    for (; r + 8 <= rows; r += 8) {
        int c = 0;
        for (; c + 8 <= columns; c += 8) {
            transpose_8x8(src + r * src_stride + c, src_stride, dst + c * dst_stride + r, dst_stride);
        }
        for (; c < columns; c++) {
            for (int i = r; i < r + 8; i++) {
                dst[c * dst_stride + i] = src[i * src_stride + c];
            }
        }
    }
    for (; r < rows; r++) {
        for (int c = 0; c < columns; c++) {
            dst[c * dst_stride + r] = src[r * src_stride + c];
        }
    }
}

/* Rows y_lo..y_hi of `in`, columns resampled: `out` [y_hi - y_lo][hi - lo] pixels. `block`: scratch for both sides. */
static void horizontal(const axis_t *axis, view_t in, int y_lo, int y_hi, uint8_t *out, uint8_t *block) {
    const int in_columns = axis->in_hi - axis->in_lo, out_columns = axis->hi - axis->lo;
    const ptrdiff_t out_stride = (ptrdiff_t)out_columns * CHANNELS;
    uint8_t *resampled = block + (ptrdiff_t)in_columns * PIXEL;
    for (int y = y_lo; y < y_hi; y += ROWS) {
        const int rows = y_hi - y < ROWS ? y_hi - y : ROWS;
        const uint8_t *src = in.pixels + (y - in.y) * in.stride + (ptrdiff_t)(axis->in_lo - in.x) * CHANNELS;
        transpose(src, in.stride, rows, in_columns * CHANNELS, block, ROWS);
        for (int o = 0; o < out_columns; o++) {
            const int32_t *taps = axis->taps + (ptrdiff_t)o * axis->width;
            const uint8_t *column = block + (ptrdiff_t)(axis->first[o] - axis->in_lo) * PIXEL;
            weigh(taps, axis->count[o], column, PIXEL, resampled + (ptrdiff_t)o * PIXEL);
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
            weigh(taps, axis->count[o], row + at, in.stride, dst + at);
        }
        for (; at < bytes; at++) {
            int32_t sum = ROUNDING;
            for (int k = 0; k < axis->count[o]; k++) {
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
        free(x[s].first);
        free(y[s].first);
    }
    return fits;
}
