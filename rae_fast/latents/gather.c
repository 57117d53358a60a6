/* Rows of shards into one buffer, each checked against its CRC-32C; called through ctypes, so without the GIL.

   A row is a range of a file, optionally followed by a second range (its scales) that its checksum covers too. Three ways
   to get at the bytes: MAPPED copies from memory maps, BUFFERED reads through the page cache, DIRECT reads past it: on
   Linux by one thread that keeps many reads in flight, which takes two thirds of the processor time of a thread for each
   read, and elsewhere by threads. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>

#if defined(__linux__)
#include <linux/aio_abi.h>
#include <sys/syscall.h>
#endif

#if defined(__x86_64__)
#include <nmmintrin.h>
#elif defined(__ARM_FEATURE_CRC32)
#include <arm_acle.h>
#endif

enum { MAPPED = 0, BUFFERED = 1, DIRECT = 2 };
enum { CHECKSUM = -1, CUT_SHORT = -2, NO_MEMORY = -3 }; /* problems that are no errno */

#define PAGE 4096
#define MAX_THREADS 64
#define POLYNOMIAL 0x82f63b78u /* Castagnoli, reflected */
/* Bytes of each of three interleaved streams, which hide the instruction's latency: long ones for data that come from
   memory, since prefetching wants time to see a stream, short ones for what lies in the first-level cache. */
#define LONG_LANE 32768
#define SHORT_LANE 2048
#define COPY_BLOCK (3 * SHORT_LANE) /* stays in the first-level cache between its copy and its checksum */
#define PREFETCH 2048               /* bytes ahead of a copy */
#define CRC_PREFETCH 512            /* bytes ahead of a checksum, in each stream */
#define LINE 64                     /* of a cache */

/* --- CRC-32C ------------------------------------------------------------------------------------------------------ */

static uint32_t byte_table[256];
typedef struct {
    uint32_t one[4][256], two[4][256]; /* advance a checksum over the zero bytes of one and of two lanes */
} Lane;
static Lane long_lane, short_lane;
static pthread_once_t tables_once = PTHREAD_ONCE_INIT;

static uint32_t apply(const uint32_t *matrix, uint32_t vector) {
    uint32_t sum = 0;
    for (; vector; vector >>= 1, matrix++)
        if (vector & 1) sum ^= *matrix;
    return sum;
}

static void advance_table(uint32_t table[4][256], size_t zeros) {
    uint32_t step[32], whole[32], squared[32];
    for (int bit = 0; bit < 32; bit++) { /* one zero byte */
        uint32_t crc = 1u << bit;
        for (int i = 0; i < 8; i++) crc = (crc >> 1) ^ (crc & 1 ? POLYNOMIAL : 0);
        step[bit] = crc;
        whole[bit] = 1u << bit;
    }
    for (; zeros; zeros >>= 1) {
        if (zeros & 1)
            for (int bit = 0; bit < 32; bit++) whole[bit] = apply(step, whole[bit]);
        for (int bit = 0; bit < 32; bit++) squared[bit] = apply(step, step[bit]);
        memcpy(step, squared, sizeof step);
    }
    for (int byte = 0; byte < 4; byte++)
        for (uint32_t value = 0; value < 256; value++) table[byte][value] = apply(whole, value << (8 * byte));
}

static void make_tables(void) {
    for (uint32_t value = 0; value < 256; value++) {
        uint32_t crc = value;
        for (int i = 0; i < 8; i++) crc = (crc >> 1) ^ (crc & 1 ? POLYNOMIAL : 0);
        byte_table[value] = crc;
    }
    advance_table(long_lane.one, LONG_LANE);
    advance_table(long_lane.two, 2 * LONG_LANE);
    advance_table(short_lane.one, SHORT_LANE);
    advance_table(short_lane.two, 2 * SHORT_LANE);
}

static uint32_t advance(const uint32_t table[4][256], uint32_t crc) {
    return table[0][crc & 255] ^ table[1][crc >> 8 & 255] ^ table[2][crc >> 16 & 255] ^ table[3][crc >> 24];
}

#if defined(__x86_64__)
#define HARDWARE __attribute__((target("sse4.2")))
#define CRC_WORD(crc, word) ((uint32_t)_mm_crc32_u64((crc), (word)))
static int has_hardware(void) { return __builtin_cpu_supports("sse4.2"); }
#elif defined(__ARM_FEATURE_CRC32)
#define HARDWARE
#define CRC_WORD(crc, word) __crc32cd((crc), (word))
static int has_hardware(void) { return 1; }
#endif

static uint32_t crc_bytes(uint32_t crc, const uint8_t *data, size_t size) {
    for (; size; size--) crc = byte_table[(crc ^ *data++) & 255] ^ (crc >> 8);
    return crc;
}

#ifdef CRC_WORD
static uint64_t word_at(const uint8_t *data) {
    uint64_t word;
    memcpy(&word, data, 8);
    return word;
}

static void fetch_ahead(const uint8_t *data) { __builtin_prefetch(data + CRC_PREFETCH); }

/* As many whole triples of lanes as there are; moves `data` and `size` behind them. Inlined for constant lengths. */
HARDWARE __attribute__((always_inline)) static inline uint32_t crc_lanes(
    uint32_t crc, const uint8_t **data, size_t *size, const Lane *lane, const size_t length
) {
    for (; *size >= 3 * length; *data += 3 * length, *size -= 3 * length) {
        const uint8_t *a = *data, *b = a + length, *c = b + length;
        uint32_t second = 0, third = 0;
        for (size_t i = 0; i < length; i += LINE) {
            if (length == LONG_LANE) fetch_ahead(a + i), fetch_ahead(b + i), fetch_ahead(c + i);
            for (size_t at = i; at < i + LINE; at += 8) {
                crc = CRC_WORD(crc, word_at(a + at));
                second = CRC_WORD(second, word_at(b + at));
                third = CRC_WORD(third, word_at(c + at));
            }
        }
        crc = advance(lane->two, crc) ^ advance(lane->one, second) ^ third;
    }
    return crc;
}

HARDWARE static uint32_t crc_hardware(uint32_t crc, const uint8_t *data, size_t size) {
    crc = crc_lanes(crc, &data, &size, &long_lane, LONG_LANE);
    crc = crc_lanes(crc, &data, &size, &short_lane, SHORT_LANE);
    for (; size >= 8; data += 8, size -= 8) crc = CRC_WORD(crc, word_at(data));
    return crc_bytes(crc, data, size);
}
#endif

static uint32_t crc_extend(uint32_t crc, const uint8_t *data, size_t size) {
#ifdef CRC_WORD
    if (has_hardware()) return crc_hardware(crc, data, size);
#endif
    return crc_bytes(crc, data, size);
}

uint32_t rae_crc32c(const uint8_t *data, int64_t size, uint32_t start) {
    pthread_once(&tables_once, make_tables);
    return ~crc_extend(~start, data, (size_t)size);
}

/* --- rows --------------------------------------------------------------------------------------------------------- */

typedef struct {
    int64_t count;
    int mode, verify;
    const int64_t *file, *offset, *size; /* file: address of the map, or descriptor */
    const uint32_t *crc;
    uint8_t *out;
    int64_t stride;
    const int64_t *scale_file, *scale_offset; /* always descriptors */
    int64_t scale_bytes;
    uint8_t *scale_out;
    atomic_llong next, first_bad;
    atomic_int problem;
} Batch;

static int read_all(int file, uint8_t *out, int64_t size, int64_t offset) {
    while (size > 0) {
        ssize_t done = pread(file, out, (size_t)size, offset);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return errno;
        if (done == 0) return CUT_SHORT;
        out += done, size -= done, offset += done;
    }
    return 0;
}

/* The whole pages that hold a range of a file, and where they are read to: straight into the buffer where it is aligned,
   else into `scratch`, which is made large enough. */
typedef struct {
    int64_t begin, end, needed; /* a read that brings fewer than `needed` bytes was cut short */
    uint8_t *target;
} Pages;

typedef struct {
    uint8_t *bytes;
    int64_t room;
} Scratch;

static int pages_of(uint8_t *out, int64_t size, int64_t offset, Scratch *scratch, Pages *pages) {
    pages->begin = offset & ~(int64_t)(PAGE - 1);
    pages->end = (offset + size + PAGE - 1) & ~(int64_t)(PAGE - 1);
    pages->needed = offset - pages->begin + size;
    pages->target = out;
    int64_t length = pages->end - pages->begin;
    if (length == size && ((uintptr_t)out & (PAGE - 1)) == 0) return 0;
    if (scratch->room < length) {
        free(scratch->bytes);
        scratch->room = 0;
        if (posix_memalign((void **)&scratch->bytes, PAGE, (size_t)length)) {
            scratch->bytes = NULL;
            return NO_MEMORY;
        }
        scratch->room = length;
    }
    pages->target = scratch->bytes;
    return 0;
}

static void take_out(const Pages *pages, uint8_t *out, int64_t size, int64_t offset) {
    if (pages->target != out) memcpy(out, pages->target + (offset - pages->begin), (size_t)size);
}

static int read_direct(int file, uint8_t *out, int64_t size, int64_t offset, Scratch *scratch) {
    Pages pages;
    int problem = pages_of(out, size, offset, scratch, &pages);
    if (problem) return problem;
    int64_t have = 0;
    while (have < pages.needed) {
        ssize_t done = pread(file, pages.target + have, (size_t)(pages.end - pages.begin - have), pages.begin + have);
        if (done < 0 && errno == EINTR) continue;
        if (done < 0) return errno;
        if (done == 0) return CUT_SHORT;
        have += done;
        if (have & (PAGE - 1) && have < pages.needed) return CUT_SHORT; /* a short read ends at the file's end */
    }
    take_out(&pages, out, size, offset);
    return 0;
}

/* Copy past the caches: a batch is larger than they are, and fetching the lines that it overwrites would be a third of
   the traffic. */
static void copy_block(uint8_t *out, const uint8_t *source, size_t size) {
#if defined(__x86_64__)
    if (((uintptr_t)out & 15) == 0) {
        for (; size >= 64; size -= 64, out += 64, source += 64) {
            const __m128i *from = (const __m128i *)source;
            _mm_prefetch((const char *)source + PREFETCH, _MM_HINT_T0);
            for (int i = 0; i < 4; i++) _mm_stream_si128((__m128i *)out + i, _mm_loadu_si128(from + i));
        }
    }
#endif
    memcpy(out, source, size);
}

/* Copy and checksum block by block; returns the checksum, unfinished. */
static uint32_t copy_mapped(const Batch *b, uint8_t *out, const uint8_t *source, int64_t size) {
    uint32_t crc = ~0u;
    for (int64_t at = 0; at < size; at += COPY_BLOCK) {
        size_t block = (size_t)(size - at < COPY_BLOCK ? size - at : COPY_BLOCK);
        copy_block(out + at, source + at, block);
        if (b->verify) crc = crc_extend(crc, source + at, block);
    }
#if defined(__x86_64__)
    _mm_sfence();
#endif
    return crc;
}

/* What is left when the latents are in place: their checksum, unless it came with the copy, and the scales. */
static int complete(const Batch *b, int64_t i, uint32_t crc) {
    if (b->verify && b->mode != MAPPED) crc = crc_extend(crc, b->out + i * b->stride, (size_t)b->size[i]);
    if (b->scale_bytes) {
        uint8_t *scale = b->scale_out + i * b->scale_bytes;
        int problem = read_all((int)b->scale_file[i], scale, b->scale_bytes, b->scale_offset[i]);
        if (problem) return problem;
        if (b->verify) crc = crc_extend(crc, scale, (size_t)b->scale_bytes);
    }
    return b->verify && ~crc != b->crc[i] ? CHECKSUM : 0;
}

static int fetch(const Batch *b, int64_t i, Scratch *scratch) {
    uint8_t *out = b->out + i * b->stride;
    uint32_t crc = ~0u;
    int problem = 0;
    if (b->mode == MAPPED) {
        crc = copy_mapped(b, out, (const uint8_t *)(intptr_t)b->file[i] + b->offset[i], b->size[i]);
    } else if (b->mode == BUFFERED) {
        problem = read_all((int)b->file[i], out, b->size[i], b->offset[i]);
    } else {
        problem = read_direct((int)b->file[i], out, b->size[i], b->offset[i], scratch);
    }
    return problem ? problem : complete(b, i, crc);
}

static void note(Batch *b, long long i, int problem) {
    long long none = -1;
    if (problem && atomic_compare_exchange_strong(&b->first_bad, &none, i)) atomic_store(&b->problem, problem);
}

/* The next row to serve, or -1: there is none, or a row was bad. */
static int64_t next_row(Batch *b) {
    if (atomic_load(&b->first_bad) >= 0) return -1;
    long long i = atomic_fetch_add(&b->next, 1);
    return i < b->count ? i : -1;
}

static void *work(void *argument) {
    Batch *b = argument;
    Scratch scratch = {NULL, 0};
    for (int64_t i; (i = next_row(b)) >= 0;) note(b, i, fetch(b, i, &scratch));
    free(scratch.bytes);
    return NULL;
}

/* --- many reads in flight ----------------------------------------------------------------------------------------- */

typedef struct Queue Queue;

#if defined(__linux__)
#define SEVERAL 4 /* reads to wait for at once: fewer wake-ups, and the disk still has most of its queue */

struct Queue {
    aio_context_t context;
    int depth, useless;
    atomic_flag busy;
};

typedef struct {
    struct iocb request;
    int64_t row;
    Pages pages;
    Scratch scratch;
} Read;

/* NULL: this system has none, or none left. */
Queue *rae_queue_open(int depth) {
    Queue *queue = calloc(1, sizeof *queue);
    if (!queue) return NULL;
    queue->depth = depth < MAX_THREADS ? depth : MAX_THREADS;
    atomic_flag_clear(&queue->busy);
    if (syscall(SYS_io_setup, queue->depth, &queue->context) == 0) return queue;
    free(queue);
    return NULL;
}

void rae_queue_close(Queue *queue) {
    if (!queue) return;
    syscall(SYS_io_destroy, queue->context); /* a child of fork has no such context, and nothing to destroy */
    free(queue);
}

static int prepare(const Batch *b, Read *read, int64_t i) {
    int problem = pages_of(b->out + i * b->stride, b->size[i], b->offset[i], &read->scratch, &read->pages);
    read->row = i;
    read->request = (struct iocb){
        .aio_data = (uintptr_t)read, .aio_lio_opcode = IOCB_CMD_PREAD, .aio_fildes = (uint32_t)b->file[i],
        .aio_buf = (uintptr_t)read->pages.target, .aio_nbytes = (uint64_t)(read->pages.end - read->pages.begin),
        .aio_offset = read->pages.begin,
    };
    return problem;
}

static void arrived(Batch *b, Read *read, int64_t result) {
    int64_t i = read->row;
    if (result < read->pages.needed) { /* an error, or less than was asked for: once more, one step at a time */
        note(b, i, fetch(b, i, &read->scratch));
        return;
    }
    take_out(&read->pages, b->out + i * b->stride, b->size[i], b->offset[i]);
    note(b, i, complete(b, i, ~0u));
}

static double clock_s(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec + 1e-9 * (double)now.tv_nsec;
}

/* Serve rows until there are none; what has arrived is looked at when the disk has its next reads. Some file systems do
   the whole read while it is handed in: a queue of theirs holds one read at a time, and the next batch is left to
   threads. */
static void serve(Batch *b, Queue *queue) {
    int idle_count = 0, in_flight = 0;
    long done = 0;
    Read *reads = calloc((size_t)(2 * queue->depth), sizeof *reads), *idle[2 * MAX_THREADS];
    struct iocb *fresh[MAX_THREADS];
    struct io_event events[MAX_THREADS];
    double begun_s = clock_s(), submitting_s = 0;
    if (!reads) return;
    while (idle_count < 2 * queue->depth) idle[idle_count] = &reads[idle_count], idle_count++;
    for (;;) {
        int count = 0;
        while (in_flight + count < queue->depth && !queue->useless) {
            int64_t i = next_row(b);
            if (i < 0) break;
            Read *read = idle[--idle_count];
            int problem = prepare(b, read, i);
            if (problem) {
                note(b, i, problem);
                idle[idle_count++] = read;
            } else {
                fresh[count++] = &read->request;
            }
        }
        double asked_s = clock_s();
        long taken = count ? syscall(SYS_io_submit, queue->context, (long)count, fresh) : 0;
        submitting_s += clock_s() - asked_s;
        if (taken < count) queue->useless = 1; /* as in a child of fork */
        taken = taken < 0 ? 0 : taken;
        in_flight += (int)taken;
        for (long k = taken; k < count; k++) {
            Read *read = (Read *)(uintptr_t)fresh[k]->aio_data;
            note(b, read->row, fetch(b, read->row, &read->scratch));
            idle[idle_count++] = read;
        }
        for (long k = 0; k < done; k++) {
            Read *read = (Read *)(uintptr_t)events[k].data;
            arrived(b, read, events[k].res);
            idle[idle_count++] = read;
        }
        if (!in_flight) break;
        long least = in_flight < SEVERAL ? in_flight : SEVERAL, most = queue->depth;
        done = syscall(SYS_io_getevents, queue->context, least, most, events, NULL);
        in_flight -= done > 0 ? (int)done : 0;
    }
    if (b->count > 2 * queue->depth && submitting_s > (clock_s() - begun_s) / 2) queue->useless = 1;
    for (int k = 0; k < 2 * queue->depth; k++) free(reads[k].scratch.bytes);
    free(reads);
}

static void serve_queued(Batch *b, Queue *queue) {
    if (!queue || queue->useless || atomic_flag_test_and_set(&queue->busy)) return;
    serve(b, queue);
    atomic_flag_clear(&queue->busy);
}
#else
Queue *rae_queue_open(int depth) { return NULL; }
void rae_queue_close(Queue *queue) {}
static void serve_queued(Batch *b, Queue *queue) {}
#endif

/* Ask for all ranges that nobody has read yet before the first is touched: on a cold cache the disk then works on all of
   them at once. */
static void announce(const Batch *b, const uint8_t *fresh) {
    for (int64_t i = 0; i < b->count; i++) {
        if (!fresh[i]) continue;
        uintptr_t begin = ((uintptr_t)b->file[i] + (uintptr_t)b->offset[i]) & ~(uintptr_t)(PAGE - 1);
        uintptr_t end = (uintptr_t)b->file[i] + (uintptr_t)b->offset[i] + (uintptr_t)b->size[i];
        madvise((void *)begin, end - begin, MADV_WILLNEED);
    }
}

/* Returns -1, or the number of a row that could not be served, with the reason in `problem`: an errno, or one of the
   negative codes above. */
int64_t rae_gather(
    int64_t count, int mode, int threads, Queue *queue, int verify, const uint8_t *fresh, const int64_t *file,
    const int64_t *offset, const int64_t *size, const uint32_t *crc, uint8_t *out, int64_t stride,
    const int64_t *scale_file, const int64_t *scale_offset, int64_t scale_bytes, uint8_t *scale_out, int32_t *problem
) {
    pthread_once(&tables_once, make_tables);
    Batch batch = {
        .count = count, .mode = mode, .verify = verify, .file = file, .offset = offset, .size = size, .crc = crc,
        .out = out, .stride = stride, .scale_file = scale_file, .scale_offset = scale_offset,
        .scale_bytes = scale_bytes, .scale_out = scale_out, .next = 0, .first_bad = -1, .problem = 0,
    };
    if (mode == MAPPED) announce(&batch, fresh);
    if (mode == DIRECT) serve_queued(&batch, queue);
    int64_t left = count - atomic_load(&batch.next);
    if (threads > MAX_THREADS) threads = MAX_THREADS;
    if (threads > left) threads = (int)left;
    pthread_t helpers[MAX_THREADS];
    int started = 0;
    while (started < threads - 1 && pthread_create(&helpers[started], NULL, work, &batch) == 0) started++;
    work(&batch);
    for (int i = 0; i < started; i++) pthread_join(helpers[i], NULL);
    *problem = atomic_load(&batch.problem);
    return atomic_load(&batch.first_bad);
}
