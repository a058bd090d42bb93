/* The functions Python calls: they check a job, choose the variant of the arithmetic and deal out the work items.
 *
 * Links the C library and threads of the system only: no Python, no PyTorch, no OpenMP. Work items and the order of all sums follow
 * from the shapes alone, so results are the same bit for bit for any number of threads.
 */
#include "scan.h"
#include "threads.h"

#include <stdlib.h>
#include <string.h>

#if defined(__linux__)
#include <sys/mman.h>
#include <unistd.h>
#endif
#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#include <xmmintrin.h>
#endif

#if defined(_WIN32)
#define EXPORT __declspec(dllexport)
#else
#define EXPORT __attribute__((visibility("default")))
#endif

#ifndef MM_SOURCE_HASH
#define MM_SOURCE_HASH "unknown"
#endif

/* ---- variants ---- */

extern const mm_kernels mm_kernels_baseline;
#ifdef MM_HAVE_AVX2
extern const mm_kernels mm_kernels_avx2;
#endif
#ifdef MM_HAVE_AVX512
extern const mm_kernels mm_kernels_avx512;
#endif

enum { BASELINE, AVX2, AVX512, NUM_VARIANTS };

#if defined(MM_HAVE_AVX2) || defined(MM_HAVE_AVX512)
/* The best variant that the processor has the instructions for and the system keeps the registers of. Asked of the processor
 * itself, because __builtin_cpu_supports needs a library that Clang does not link everywhere. */
static int64_t ask_processor(void) {
    const unsigned int in_1 = 1u << 12 | 1u << 27 | 1u << 28 | 1u << 29; /* ECX of leaf 1: FMA, XGETBV, AVX, F16C */
    const unsigned int in_7 = 1u << 16 | 1u << 17 | 1u << 30 | 1u << 31; /* EBX of leaf 7: AVX-512 F, DQ, BW, VL */
    unsigned int a, b, c, d, kept, high;
    if (!__get_cpuid(1, &a, &b, &c, &d) || (c & in_1) != in_1) return BASELINE;
    __asm__ volatile("xgetbv" : "=a"(kept), "=d"(high) : "c"(0));
    if ((kept & 0x6u) != 0x6u) return BASELINE;
    if (!__get_cpuid_count(7, 0, &a, &b, &c, &d) || !(b & 1u << 5)) return BASELINE;
#if defined(__APPLE__)
    kept |= 0xe0u; /* macOS keeps the registers of AVX-512 from their first use on, and says so only then */
#endif
    return (b & in_7) == in_7 && (kept & 0xe0u) == 0xe0u ? AVX512 : AVX2;
}

static int64_t best_variant(void) {
    static int64_t known = -1; /* a virtual machine takes microseconds to answer */
    int64_t best = __atomic_load_n(&known, __ATOMIC_RELAXED);
    if (best < 0) __atomic_store_n(&known, best = ask_processor(), __ATOMIC_RELAXED);
    return best;
}
#endif

static const mm_kernels *variant(int64_t index) {
    switch (index) {
    case BASELINE:
        return &mm_kernels_baseline;
#ifdef MM_HAVE_AVX2
    case AVX2:
        return best_variant() >= AVX2 ? &mm_kernels_avx2 : NULL;
#endif
#ifdef MM_HAVE_AVX512
    case AVX512:
        return best_variant() >= AVX512 ? &mm_kernels_avx512 : NULL;
#endif
    default:
        return NULL;
    }
}

/* Name of variant `index` if this machine can run it, else null. */
EXPORT const char *mm_variant_name(int64_t index) {
    const mm_kernels *kernels = variant(index);
    return kernels ? kernels->name : NULL;
}

EXPORT int64_t mm_num_variants(void) { return NUM_VARIANTS; }
EXPORT int64_t mm_abi(void) { return MM_ABI; }
EXPORT const char *mm_source_hash(void) { return MM_SOURCE_HASH; }
EXPORT int64_t mm_scan_job_size(void) { return (int64_t)sizeof(mm_scan_job); }
EXPORT int64_t mm_conv_job_size(void) { return (int64_t)sizeof(mm_conv_job); }

EXPORT double mm_probe(int64_t index, int64_t kind, int64_t rounds) {
    const mm_kernels *kernels = variant(index);
    return kernels && kind >= 0 && kind <= 3 && rounds > 0 ? kernels->probe(kind, rounds) : 0.0;
}

/* ---- threads ---- */

/* Work in stages: no item of one is begun before all of the one before it are done and `sums` has been called for them.
 * What stands behind the blank line is changed atomically only. */
typedef struct {
    void (*run)(const void *context, int64_t stage, int64_t item, void *scratch);
    void (*sums)(const void *context, int64_t stage); /* may be null */
    const void *context;
    size_t scratch;
    int64_t items, stages; /* items of each stage */

    int64_t next, done; /* items of all stages: the one to be taken, and how many are done */
    int64_t open;       /* the last stage of which items may be begun */
    int failed;
} work;

/* Subnormal numbers cost a hundred cycles each on some machines, and decaying states produce them without end. */
static unsigned int flush_subnormals(void) {
#if defined(__SSE__)
    unsigned int before = _mm_getcsr();
    _mm_setcsr(before | 0x8040u);
    return before;
#else
    return 0;
#endif
}

static void restore_subnormals(unsigned int before) {
#if defined(__SSE__)
    _mm_setcsr(before);
#else
    (void)before;
#endif
}

/* Waits for the items of the stages before; others are at work on them. Returns 0 if the work has failed. */
static int wait_for_stage(work *w, int64_t stage) {
    for (int64_t rounds = 0; __atomic_load_n(&w->open, __ATOMIC_ACQUIRE) < stage; rounds++) {
        if (__atomic_load_n(&w->failed, __ATOMIC_RELAXED)) return 0;
#if defined(__SSE__)
        _mm_pause();
#endif
        if (rounds > 1000) give_way(); /* the others may be waiting for this very processor */
    }
    return 1;
}

static void take_items(work *w) {
    char *memory = malloc(w->scratch + 64);
    if (!memory) {
        __atomic_store_n(&w->failed, 1, __ATOMIC_RELAXED);
        return;
    }
    void *scratch = memory + (64 - (uintptr_t)memory % 64);
    unsigned int before = flush_subnormals();
    for (;;) {
        int64_t item = __atomic_fetch_add(&w->next, 1, __ATOMIC_RELAXED), stage = item / w->items;
        if (stage >= w->stages || __atomic_load_n(&w->failed, __ATOMIC_RELAXED) || !wait_for_stage(w, stage)) break;
        w->run(w->context, stage, item % w->items, scratch);
        if (__atomic_add_fetch(&w->done, 1, __ATOMIC_ACQ_REL) < (stage + 1) * w->items) continue;
        if (w->sums) w->sums(w->context, stage);
        __atomic_store_n(&w->open, stage + 1, __ATOMIC_RELEASE);
    }
    restore_subnormals(before);
    free(memory);
}

enum { MAX_WORKERS = 255 };

/* Workers sleep on `wake` between jobs. `owner` serves one caller at a time; a second caller does its work alone. */
static struct {
    lock_type owner, lock;
    condition_type wake, done;
    work *job;
    uint64_t generation;
    int workers, wanted, busy;
} pool = {LOCK_INIT, LOCK_INIT, CONDITION_INIT, CONDITION_INIT, NULL, 0, 0, 0, 0};

/* Threads do not survive a fork: the child starts with an empty pool, whatever the parent was doing. */
static void forget_workers(void) {
    lock_type lock = LOCK_INIT;
    condition_type condition = CONDITION_INIT;
    memcpy(&pool.owner, &lock, sizeof lock);
    memcpy(&pool.lock, &lock, sizeof lock);
    memcpy(&pool.wake, &condition, sizeof condition);
    memcpy(&pool.done, &condition, sizeof condition);
    pool.job = NULL;
    pool.workers = pool.wanted = pool.busy = 0;
}

__attribute__((constructor)) static void when_loaded(void) { call_after_fork(forget_workers); }

static void worker(uint64_t seen) {
    take_lock(&pool.lock);
    for (;;) {
        while (pool.generation == seen || !pool.wanted) {
            if (pool.generation != seen) seen = pool.generation; /* enough others took part */
            wait_for(&pool.wake, &pool.lock);
        }
        seen = pool.generation;
        pool.wanted--;
        work *job = pool.job;
        give_lock(&pool.lock);
        take_items(job);
        take_lock(&pool.lock);
        if (--pool.busy == 0) wake_one(&pool.done);
    }
}

static void run_with_pool(work *w, int64_t helpers) {
    if (helpers > MAX_WORKERS) helpers = MAX_WORKERS;
    if (!try_lock(&pool.owner)) {
        take_items(w);
        return;
    }
    take_lock(&pool.lock);
    while (pool.workers < helpers) {
        if (!start_worker(pool.generation)) break; /* no more threads to be had: fewer do the same work */
        pool.workers++;
    }
    if (helpers > pool.workers) helpers = pool.workers;
    pool.job = w;
    pool.wanted = pool.busy = (int)helpers;
    pool.generation++;
    wake_all(&pool.wake);
    give_lock(&pool.lock);
    take_items(w);
    take_lock(&pool.lock);
    pool.busy -= pool.wanted; /* whoever has not woken up yet finds nothing to do */
    pool.wanted = 0;
    while (pool.busy > 0) wait_for(&pool.done, &pool.lock);
    pool.job = NULL;
    give_lock(&pool.lock);
    give_lock(&pool.owner);
}

static int run(work *w, int64_t threads) {
    if (threads > w->items) threads = w->items;
    if (threads > 1)
        run_with_pool(w, threads - 1);
    else
        take_items(w);
    return w->failed ? MM_NO_MEMORY : MM_OK;
}

/* Bytes of sums of B and C that wait to be added up, see deal_out_backward. */
enum { MM_SUMS = 256 << 10 };

/* Waking a thread costs about as much as a quarter of a million state updates. */
static int64_t useful_threads(int64_t threads, int64_t operations) {
    int64_t most = 1 + operations / (1 << 20);
    return threads < 1 ? 1 : threads < most ? threads : most;
}

/* ---- checks: what would make the arithmetic read or write outside of its arrays ---- */

static int bad_view(const mm_view *v, int needed) {
    if (!v->data) return needed;
    return v->dtype < MM_FLOAT32 || v->dtype > MM_FLOAT16;
}

/* a * b, or -1 when the product leaves the range in which all offsets are computed. */
static int64_t times(int64_t a, int64_t b) {
    int64_t product;
    if (a < 0 || b < 0 || __builtin_mul_overflow(a, b, &product) || product > (INT64_MAX >> 8)) return -1;
    return product;
}

static int bad_scan(const mm_scan_job *job, int backward) {
    if (job->batch < 1 || job->length < 1 || job->groups < 1 || job->channels < 1) return 1;
    if (job->d_state < 1 || job->d_state > MM_MAX_STATE || !job->A) return 1;
    int64_t elements = times(times(times(job->batch, job->length), job->groups), job->channels);
    if (times(elements, job->d_state) < 0) return 1;
    if (job->merge && job->groups > MM_MAX_ROUTES) return 1;
    int mapped = 0;
    for (int64_t k = 0; k < (job->merge ? job->groups : 1); k++) {
        if (job->routes[k] < MM_ROW || job->routes[k] > MM_COLUMN_REVERSED) return 1;
        mapped |= job->routes[k] == MM_COLUMN || job->routes[k] == MM_COLUMN_REVERSED;
    }
    if (mapped && (job->height < 1 || job->width < 1 || times(job->height, job->width) != job->length)) return 1;
    if (bad_view(&job->u, 1) || bad_view(&job->delta, 1) || bad_view(&job->B, 1) || bad_view(&job->C, 1)) return 1;
    if (bad_view(&job->z, 0) || (job->merge && job->z.data)) return 1;
    if (!backward) return bad_view(&job->y, 1);
    if ((!job->states && job->length > MM_CHUNK) || !job->grad_A || !job->grad_B || !job->grad_C) return 1;
    if ((job->D && !job->grad_D) || (job->delta_bias && !job->grad_delta_bias)) return 1;
    return bad_view(&job->grad_y, 1) || bad_view(&job->grad_u, 1) || bad_view(&job->grad_delta, 1) ||
           (job->z.data && bad_view(&job->grad_z, 1));
}

static int bad_conv(const mm_conv_job *job, int backward) {
    if (job->batch < 1 || job->length < 1 || job->channels < 1 || job->taps < 1 || job->taps > MM_MAX_TAPS) return 1;
    if (!job->weight || times(times(times(job->batch, job->length), job->channels), job->taps) < 0) return 1;
    if (bad_view(&job->x, 1)) return 1;
    if (!backward) return bad_view(&job->y, 1);
    if (!job->grad_weight || (job->bias && !job->grad_bias)) return 1;
    return bad_view(&job->grad_y, 1) || bad_view(&job->grad_x, 1);
}

/* ---- fresh memory ---- */

/* Arrays from 32 MB on are new memory from the system at every call, because malloc of glibc keeps none of that size.
 * Touched in pages of 4 kB it costs as much as the arithmetic, and threads wait for each other there; in pages of 2 MB,
 * which Linux gives for the asking where it is set up so, it costs a few percent. Smaller arrays lie in memory that is used
 * again, by others too, for which a page of 2 MB may be far too much. So does a large one that malloc has cut out of the
 * heap, because the end of it happened to be free: what is asked for there would stay. Asks for the whole pages inside the
 * array only. */
static void ask_for_huge_pages(void *data, int64_t bytes) {
#if defined(MADV_HUGEPAGE)
    const uintptr_t page = (uintptr_t)1 << 21;
    if (!data || bytes < (int64_t)32 << 20 || (uintptr_t)data < (uintptr_t)sbrk(0)) return; /* the heap lies lowest */
    uintptr_t first = ((uintptr_t)data + page - 1) / page * page, last = ((uintptr_t)data + (uintptr_t)bytes) / page * page;
    madvise((void *)first, last - first, MADV_HUGEPAGE); /* a refusal changes nothing but the speed */
#else
    (void)data, (void)bytes;
#endif
}

/* The same for an array that is about to be written. */
static void ask_for_view(const mm_view *v, int64_t batch, int64_t length, int64_t groups, int64_t channels) {
    if (!v->data || v->batch < 0 || v->step < 0 || v->group < 0) return;
    int64_t elements = (batch - 1) * v->batch + (length - 1) * v->step + (groups - 1) * v->group + channels;
    ask_for_huge_pages(v->data, elements * (v->dtype == MM_FLOAT32 ? 4 : 2));
}

/* ---- jobs ---- */

typedef struct {
    const void *job;
    const mm_partials *partials;
    const mm_kernels *kernels;
} context;

static void run_scan_forward(const void *c, int64_t stage, int64_t item, void *scratch) {
    const context *x = c;
    (void)stage;
    x->kernels->scan_forward(x->job, x->partials, item, scratch);
}
static void run_scan_backward(const void *c, int64_t stage, int64_t item, void *scratch) {
    const context *x = c;
    x->kernels->scan_backward(x->job, x->partials, stage, item, scratch);
}
static void scan_backward_sums(const void *c, int64_t stage) {
    const context *x = c;
    x->kernels->scan_backward_sums(x->job, x->partials, stage);
}
static void run_conv_forward(const void *c, int64_t stage, int64_t item, void *scratch) {
    const context *x = c;
    (void)stage;
    x->kernels->conv_forward(x->job, item, scratch);
}
static void run_conv_backward(const void *c, int64_t stage, int64_t item, void *scratch) {
    const context *x = c;
    (void)stage;
    x->kernels->conv_backward(x->job, x->partials, item, scratch);
}

/* target[i] = sum over k of parts[k][i], in order. */
static void add_parts(float *target, const float *first, const float *rest, int64_t count, int64_t size) {
    memcpy(target, first, (size_t)size * sizeof(float));
    for (int64_t k = 1; k < count; k++)
        for (int64_t i = 0; i < size; i++) target[i] += rest[(k - 1) * size + i];
}

/* How many parts share the channels of a group in the backward pass: about eight work items in all, but none with so few
 * channels that the sums of B and C are much of its work, and at least two where there is no other parallelism. The sums are
 * added up by part, so this must not depend on the number of threads. */
static int64_t backward_parts(const mm_scan_job *job) {
    int64_t independent = job->merge ? job->batch : job->batch * job->groups;
    int64_t parts = mm_ceil(8, independent), affordable = 1 + job->channels / (8 * job->d_state);
    if (affordable < 2) affordable = 2;
    if (parts > affordable) parts = affordable;
    int64_t blocks = mm_ceil(job->channels, MM_BLOCK);
    return parts < blocks ? parts : blocks;
}

/* Whether so many equal items keep all threads busy to the end: two or three for each of them exactly, or many. */
static int is_even(int64_t items, int64_t threads) {
    return threads == 1 || items >= 4 * threads || (items >= 2 * threads && items % threads == 0);
}

/* The forward pass adds nothing up across channels, so its parts may follow the number of threads: as few as keep them all
 * busy, because narrow parts tear the rows of memory apart, else up to four items for each thread of at least four
 * blocks; and no more channels side by side than leave states and rates in the first-level cache. */
static int64_t forward_parts(const mm_scan_job *job, int64_t independent, int64_t threads) {
    int64_t blocks = mm_ceil(job->channels, MM_BLOCK);
    int64_t side_by_side = 16384 / (mm_padded_states(job->d_state) * MM_BLOCK * 2 * (int64_t)sizeof(float));
    int64_t parts = mm_ceil(blocks, side_by_side < 1 ? 1 : side_by_side);
    if (!is_even(parts * independent, threads)) {
        int64_t each = blocks * independent / (4 * threads);
        each = each < 1 ? 1 : each > 4 ? 4 : each;
        int64_t wanted = mm_ceil(each * threads, independent);
        if (parts < wanted) parts = wanted;
    }
    return parts < blocks ? parts : blocks;
}

/* How many shares a work item scans side by side: as many as fill rows of some kilobytes, as long as their `kept` numbers
 * of every state take little of the second-level cache, and all threads are busy. Has no influence on results. */
static int64_t shares_together(const mm_scan_job *job, int64_t shares, int64_t parts, int64_t kept, int64_t threads) {
    int64_t channels = mm_ceil(mm_ceil(job->channels, MM_BLOCK), parts) * MM_BLOCK;
    int64_t most = (80 << 10) / (channels * kept * mm_padded_states(job->d_state) * (int64_t)sizeof(float));
    if (job->length <= MM_CHUNK) return 1; /* nothing is come back to */
    if (most > MM_BUNDLE) most = MM_BUNDLE;
    if (most > shares) most = shares;
    while (most > 1 && !is_even(job->batch * mm_ceil(shares, most), threads)) most--;
    return most < 1 ? 1 : most;
}

EXPORT int mm_scan_forward(const mm_scan_job *job, int64_t index, int64_t threads) {
    const mm_kernels *kernels = variant(index);
    if (!kernels) return MM_NO_VARIANT;
    if (bad_scan(job, 0)) return MM_BAD_ARGUMENT;
    int64_t independent = job->batch * (job->merge ? 1 : job->groups);
    threads = useful_threads(threads, job->length * independent * job->channels * job->d_state);
    ask_for_view(&job->y, job->batch, job->length, job->groups, job->channels);
    int64_t saved = job->batch * (mm_ceil(job->length, MM_CHUNK) - 1) * job->groups * job->channels * job->d_state;
    ask_for_huge_pages(job->states, saved * (int64_t)sizeof(float));
    mm_partials partials = {.parts = forward_parts(job, independent, threads)};
    int64_t shares = independent / job->batch * partials.parts;
    partials.bundle = shares_together(job, shares, partials.parts, 2, threads);
    context c = {job, &partials, kernels};
    size_t scratch = kernels->scan_forward_scratch(job, &partials);
    work w = {.run = run_scan_forward, .context = &c, .scratch = scratch, .items = job->batch * mm_ceil(shares, partials.bundle), .stages = 1};
    return run(&w, threads);
}

/* Deals out a backward pass. A stage has some work for each thread, and sums of B and C of at most 256 kB, if that is
 * possible: what fits the second-level cache. A single thread adds everything up where it belongs. */
static mm_partials deal_out_backward(const mm_scan_job *job, int64_t threads) {
    mm_partials p = {.parts = backward_parts(job), .batches = 1, .chunks = mm_ceil(job->length, MM_CHUNK), .in_order = threads == 1};
    int64_t shares = mm_shares(job, &p);
    p.bundle = shares_together(job, shares, p.parts, 4, threads);
    p.kept_of_item = p.bundle * mm_ceil(mm_ceil(job->channels, MM_BLOCK), p.parts) * mm_backward_block(mm_padded_states(job->d_state));
    if (p.in_order) return p;
    p.batches = mm_ceil(4 * threads, mm_ceil(shares, p.bundle));
    if (p.batches > job->batch) p.batches = job->batch;
    if (p.parts > 1) {
        int64_t chunk = 2 * (shares - shares / p.parts) * p.batches * MM_CHUNK * job->d_state * (int64_t)sizeof(float);
        int64_t most = chunk < MM_SUMS ? MM_SUMS / chunk : 1;
        if (p.chunks > most) p.chunks = most;
    }
    return p;
}

EXPORT int mm_scan_backward(const mm_scan_job *job, int64_t index, int64_t threads) {
    const mm_kernels *kernels = variant(index);
    if (!kernels) return MM_NO_VARIANT;
    if (bad_scan(job, 1)) return MM_BAD_ARGUMENT;
    int64_t rows = job->groups * job->channels;
    threads = useful_threads(threads, job->length * job->batch * rows * job->d_state * 2);
    mm_partials p = deal_out_backward(job, threads);
    int64_t shares = mm_shares(job, &p), items = p.batches * mm_ceil(shares, p.bundle);
    float *memory = NULL;
    if (!p.in_order) {
        int64_t sums = (shares - shares / p.parts) * p.batches * p.chunks * MM_CHUNK * job->d_state;
        int64_t slots = p.batches < job->batch ? p.batches : job->batch - 1;
        int64_t kept = p.chunks * MM_CHUNK < job->length ? items * p.kept_of_item : 0;
        memory = malloc((size_t)(kept + 2 * sums + slots * rows * (job->d_state + 2)) * sizeof(float) + 64);
        if (!memory) return MM_NO_MEMORY;
        float *at = (float *)((char *)memory + (64 - (uintptr_t)memory % 64));
        if (kept) p.kept = at, at += kept;
        p.B = at, p.C = p.B + sums, p.A = p.C + sums, p.D = p.A + slots * rows * job->d_state, p.bias = p.D + slots * rows;
    }
    const mm_view *written[] = {&job->grad_u, &job->grad_delta, &job->grad_z};
    for (int i = 0; i < 3; i++) ask_for_view(written[i], job->batch, job->length, job->groups, job->channels);
    context c = {job, &p, kernels};
    work w = {.run = run_scan_backward, .sums = scan_backward_sums, .context = &c, .scratch = kernels->scan_backward_scratch(job, &p),
              .items = items, .stages = mm_num_stages(job, &p)};
    int status = run(&w, threads);
    free(memory);
    return status;
}

EXPORT int mm_conv_forward(const mm_conv_job *job, int64_t index, int64_t threads) {
    const mm_kernels *kernels = variant(index);
    if (!kernels) return MM_NO_VARIANT;
    if (bad_conv(job, 0)) return MM_BAD_ARGUMENT;
    context c = {job, NULL, kernels};
    ask_for_view(&job->y, job->batch, job->length, 1, job->channels);
    work w = {.run = run_conv_forward, .context = &c, .scratch = kernels->conv_scratch(job, 0),
              .items = job->batch * mm_ceil(job->length, MM_CONV_SEGMENT), .stages = 1};
    return run(&w, useful_threads(threads, job->batch * job->length * job->channels * 4));
}

EXPORT int mm_conv_backward(const mm_conv_job *job, int64_t index, int64_t threads) {
    const mm_kernels *kernels = variant(index);
    if (!kernels) return MM_NO_VARIANT;
    if (bad_conv(job, 1)) return MM_BAD_ARGUMENT;
    int64_t size = job->channels * (job->taps + 1);
    float *sums = malloc((size_t)(job->batch * size) * sizeof(float));
    if (!sums) return MM_NO_MEMORY;
    threads = useful_threads(threads, job->batch * job->length * job->channels * 8);
    int64_t blocks = mm_ceil(job->channels, MM_BLOCK), bundle = threads > 1 ? blocks * job->batch / (4 * threads) : blocks;
    bundle = bundle < 1 ? 1 : bundle < MM_BUNDLE ? bundle : MM_BUNDLE;
    mm_partials partials = {.parts = 1, .bundle = bundle, .A = sums, .bias = sums + job->batch * job->channels * job->taps};
    context c = {job, &partials, kernels};
    ask_for_view(&job->grad_x, job->batch, job->length, 1, job->channels);
    int64_t items = job->batch * mm_ceil(blocks, bundle);
    work w = {.run = run_conv_backward, .context = &c, .scratch = kernels->conv_scratch(job, bundle), .items = items, .stages = 1};
    int status = run(&w, threads);
    if (status == MM_OK) {
        int64_t weights = job->channels * job->taps;
        add_parts(job->grad_weight, partials.A, partials.A + weights, job->batch, weights);
        if (job->bias)
            add_parts(job->grad_bias, partials.bias, partials.bias + job->channels, job->batch, job->channels);
    }
    free(sums);
    return status;
}
