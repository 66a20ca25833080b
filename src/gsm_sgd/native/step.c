/* A step of GSM and GSMAdamW on a CPU, in float32: choose the k weights with the largest scores, and update all.
 *
 * 1. A sample of the scores gives a bracket that very likely encloses the k-th largest.
 * 2. A pass over weights and gradients counts the scores above it and gathers those inside. If the k-th largest is not
 *    among these, the bracket widens, and the pass is repeated.
 * 3. The k-th largest is found among those inside; if very many are equal, digit by digit among all.
 * 4. A second pass computes the scores again, and updates.
 *
 * The updates round as torch's operations do, so that a step has the same bits with and without this file: build it
 * with -ffp-contract=off.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <immintrin.h>

enum { MAGNITUDE = 0, TAYLOR = 1 };     /* scores */
enum { ALL = 0, SCORES = 1, MASK = 2 }; /* which weights of a tensor are active */
enum { DONE = 0, NOT_FINITE = 1, TIES = 2, NO_MEMORY = 3 };

enum { CHUNK = 1 << 14 };                 /* weights that a thread takes at a time */
enum { BLOCK = 64 };                      /* scores that are compared before those inside the bracket are gathered */
enum { MARKS = 512 };                     /* weights that are marked before they are updated */
enum { AHEAD = 256 };                     /* weights from here to those that are fetched into the cache */
enum { TAIL = 8 };                        /* torch rounds the last size % TAIL weights of a tensor in another way */
enum { LEAST_SAMPLE = 1024, RUN = 4 };    /* sampled scores; those side by side cost no more than one */
enum { LEAST_ROOM = 1 << 16 };            /* scores inside the bracket */
enum { DIGITS = 11, BINS = 1 << DIGITS }; /* bits that are counted at a time */

/* A parameter and what belongs to it, in its memory order. */
typedef struct {
    float *weight;
    const float *grad;
    float *first, *second; /* momentum, or the moments; NULL if there is none */
    const uint8_t *mask;   /* 1 where a weight is active, for MASK */
    float *own_steps;      /* how many steps it has taken, for AdamW */
    int64_t size;
    int64_t active;  /* ALL, SCORES or MASK */
    int64_t ordered; /* whether its memory order is that of its index */
    int64_t group;
} Tensor;

/* The settings of a group. */
typedef struct {
    double lr, decay, extra_decay; /* extra_decay: of passive weights, above that of active ones */
    double beta1, beta2, eps;      /* of SGD beta1 is the momentum */
    int64_t nesterov;
} Group;

/* A part of a tensor. Of a step: where in the gathered scores its own begin, how many these are, and how many of all of
 * its scores equal the threshold. */
typedef struct {
    int64_t tensor, start, size;
    int64_t place, found, equal;
} Chunk;

/* Where the largest scores end: up to (tensor, position) those equal to the value are active, the rest are not. */
typedef struct {
    float value;
    int64_t tensor, position;
} Threshold;

/* What AdamW needs of a step of one tensor. */
typedef struct {
    float kept, extra, keep2, share1, share2, rest2, step_size, root2, eps;
} Moments;

static inline float score_of(float weight, float grad, int score) {
    return fabsf(score == TAYLOR ? weight * grad : weight);
}

/* Threads round denormal numbers as the one that calls. */
static inline unsigned rounding(void) { return _mm_getcsr(); }
static inline void set_rounding(unsigned mode) { _mm_setcsr(mode); }

/* As many scores as a register holds. */
#ifdef __AVX512F__
enum { LANES = 16 };
typedef __m512 Lanes;
static inline Lanes all(float value) { return _mm512_set1_ps(value); }
static inline Lanes load(const float *from) { return _mm512_loadu_ps(from); }
static inline void store(float *to, Lanes lanes) { _mm512_storeu_ps(to, lanes); }
static inline Lanes times(Lanes a, Lanes b) { return _mm512_mul_ps(a, b); }
static inline Lanes size_of(Lanes a) { return _mm512_abs_ps(a); }
static inline unsigned above(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_GT_OQ); }
static inline unsigned not_below(Lanes a, Lanes b) { return _mm512_cmp_ps_mask(a, b, _CMP_NLT_UQ); }
#else
enum { LANES = 8 };
typedef __m256 Lanes;
static inline Lanes all(float value) { return _mm256_set1_ps(value); }
static inline Lanes load(const float *from) { return _mm256_loadu_ps(from); }
static inline void store(float *to, Lanes lanes) { _mm256_storeu_ps(to, lanes); }
static inline Lanes times(Lanes a, Lanes b) { return _mm256_mul_ps(a, b); }
static inline Lanes size_of(Lanes a) { return _mm256_andnot_ps(_mm256_set1_ps(-0.0f), a); }
static inline unsigned above(Lanes a, Lanes b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_GT_OQ)); }
static inline unsigned not_below(Lanes a, Lanes b) { return _mm256_movemask_ps(_mm256_cmp_ps(a, b, _CMP_NLT_UQ)); }
#endif

/* --- the threshold --- */

static inline uint32_t bits_of(float score) {
    uint32_t bits;
    if (score == 0) return 0; /* a denormal one too, where these count as zero */
    memcpy(&bits, &score, sizeof bits);
    return bits;
}

static inline float of_bits(uint32_t bits) {
    float score;
    memcpy(&score, &bits, sizeof score);
    return score;
}

/* Return the value of a rank, counted from 0 from the largest; the values are moved about. */
static float quickselect(float *values, int64_t count, int64_t rank) {
    int64_t low = 0, high = count - 1;
    while (low < high) {
        const float a = values[low], b = values[low + (high - low) / 2], c = values[high];
        const float pivot = fmaxf(fminf(a, b), fminf(fmaxf(a, b), c));
        int64_t i = low, j = high;
        while (i <= j) {
            while (values[i] > pivot) i++;
            while (values[j] < pivot) j--;
            if (i <= j) {
                const float kept = values[i];
                values[i++] = values[j];
                values[j--] = kept;
            }
        }
        if (rank <= j) high = j;
        else if (rank >= i) low = i;
        else break;
    }
    return values[rank];
}

/* Return the value of a rank, counted from 0 from the largest, of values from `low` to `high`; `room` is for as many.
 * The bits of numbers that are not negative are ordered as the numbers are, so their leading ones make even bins. */
static float nth_largest(const float *values, int64_t count, int64_t rank, float low, float high, float *room) {
    const uint32_t base = bits_of(low), span = bits_of(high) - base;
    int shift = 0;
    while (span >> shift >= BINS) shift++;
    int64_t counts[BINS] = {0};
    for (int64_t i = 0; i < count; i++) counts[(bits_of(values[i]) - base) >> shift]++;
    uint32_t bin = span >> shift;
    while (counts[bin] <= rank) rank -= counts[bin--];
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        room[found] = values[i];
        found += (bits_of(values[i]) - base) >> shift == bin;
    }
    return quickselect(room, found, rank);
}

/* Take a sample of the scores: short runs at equal distances. */
static int64_t take(const Tensor *tensors, int64_t count, int64_t distance, int score, float *sample) {
    int64_t taken = 0, position = distance / 2;
    for (int64_t t = 0; t < count; t++) {
        const Tensor *one = tensors + t;
        if (one->active != SCORES) continue;
        for (; position < one->size; position += distance)
            for (int64_t i = position; i < position + RUN && i < one->size; i++)
                sample[taken++] = score_of(one->weight[i], one->grad[i], score);
        position -= one->size;
    }
    return taken;
}

/* Guess two values that enclose the k-th largest of all scores, given a share k of them: it is above `low`, and at most
 * `high`. How many of a sample lie above it is about binomial: so many standard deviations, and one more. */
static void guess(const float *sample, int64_t taken, double share, double sigmas, float *room, float *low,
                  float *high) {
    const double rank = share * (double)taken, margin = sigmas * sqrt(rank * (1 - share)) + 1;
    const int64_t first = (int64_t)floor(rank - margin), last = (int64_t)ceil(rank + margin);
    *high = first >= 0 ? nth_largest(sample, taken, first, 0, INFINITY, room) : INFINITY;
    *low = last < taken ? nth_largest(sample, taken, last, 0, INFINITY, room) : 0;
}

/* What a chunk has of a bracket: how many scores above it, and those inside; and whether all is finite. */
static int look_at(const float *weight, const float *grad, int64_t size, int score, float low, float high,
                   int64_t *above_, float *inside, int64_t *inside_) {
    const Lanes lows = all(low), highs = all(high), infinity = all(INFINITY);
    int64_t larger = 0, found = 0, i = 0;
    unsigned wrong = 0;
    float scores[BLOCK];
    for (; i + BLOCK <= size; i += BLOCK) {
        uint64_t reach = 0, over = 0;
        for (int j = 0; j < BLOCK; j += LANES) {
            __builtin_prefetch(weight + i + j + AHEAD);
            __builtin_prefetch(grad + i + j + AHEAD);
            const Lanes w = load(weight + i + j), g = load(grad + i + j);
            const Lanes s = size_of(score == TAYLOR ? times(w, g) : w);
            wrong |= not_below(s, infinity) | not_below(size_of(g), infinity);
            reach |= (uint64_t)above(s, lows) << j;
            over |= (uint64_t)above(s, highs) << j;
            store(scores + j, s);
        }
        larger += __builtin_popcountll(over);
        for (uint64_t between = reach & ~over; between; between &= between - 1)
            inside[found++] = scores[__builtin_ctzll(between)];
    }
    for (; i < size; i++) {
        const float s = score_of(weight[i], grad[i], score);
        wrong |= !(s < INFINITY) | !(fabsf(grad[i]) < INFINITY);
        larger += s > high;
        if (s > low && s <= high) inside[found++] = s;
    }
    *above_ = larger, *inside_ = found;
    return !wrong;
}

/* Count the scores above a bracket, and gather those inside as long as there is room. */
static int look(const Tensor *tensors, Chunk *chunks, int64_t count, int score, float low, float high, float *inside,
                int64_t room, int64_t *above_, int64_t *inside_, int threads) {
    int64_t larger = 0, gathered = 0;
    int bad = 0;
    const unsigned mode = rounding();
#pragma omp parallel num_threads(threads) reduction(+ : larger) reduction(| : bad)
    {
        const unsigned own = rounding();
        set_rounding(mode);
        float mine[CHUNK];
#pragma omp for schedule(static)
        for (int64_t c = 0; c < count; c++) {
            const Tensor *one = tensors + chunks[c].tensor;
            if (one->active != SCORES) continue;
            const float *weight = one->weight + chunks[c].start, *grad = one->grad + chunks[c].start;
            int64_t over, found, place;
            bad |= !look_at(weight, grad, chunks[c].size, score, low, high, &over, mine, &found);
            larger += over;
#pragma omp atomic capture
            { place = gathered; gathered += found; }
            chunks[c].place = place, chunks[c].found = found;
            if (place + found <= room) memcpy(inside + place, mine, sizeof(float) * (size_t)found);
        }
        set_rounding(own);
    }
    *above_ = larger;
    *inside_ = gathered;
    return bad ? NOT_FINITE : DONE;
}

/* Find the k-th largest score by the digits of its bits: exact however many are equal, and slow. */
static float by_digits(const Tensor *tensors, int64_t count, int64_t k, int score) {
    uint32_t prefix = 0;
    for (int shift = 32; shift > 0;) {
        const int before = shift;
        shift = shift > DIGITS ? shift - DIGITS : 0;
        const uint32_t bins = 1u << (before - shift);
        int64_t counts[BINS] = {0};
        for (int64_t t = 0; t < count; t++) {
            if (tensors[t].active != SCORES) continue;
            for (int64_t i = 0; i < tensors[t].size; i++) {
                const uint32_t bits = bits_of(score_of(tensors[t].weight[i], tensors[t].grad[i], score));
                if (before == 32 || bits >> before == prefix) counts[(bits >> shift) & (bins - 1)]++;
            }
        }
        uint32_t digit = bins - 1;
        while (counts[digit] < k) k -= counts[digit--];
        prefix = prefix << (before - shift) | digit;
    }
    return of_bits(prefix);
}

/* Count in each chunk the scores that equal a value, and return how many of all are above it. */
static int64_t rank_of(const Tensor *tensors, Chunk *chunks, int64_t count, int score, float value, int threads) {
    int64_t over = 0;
    const unsigned mode = rounding();
#pragma omp parallel num_threads(threads) reduction(+ : over)
    {
        const unsigned own = rounding();
        set_rounding(mode);
#pragma omp for schedule(static)
        for (int64_t c = 0; c < count; c++) {
            const Tensor *one = tensors + chunks[c].tensor;
            chunks[c].equal = 0;
            if (one->active != SCORES) continue;
            const float *weight = one->weight + chunks[c].start, *grad = one->grad + chunks[c].start;
            int64_t larger = 0, same = 0;
            for (int64_t i = 0; i < chunks[c].size; i++) {
                const float s = score_of(weight[i], grad[i], score);
                larger += s > value;
                same += s == value;
            }
            over += larger;
            chunks[c].equal = same;
        }
        set_rounding(own);
    }
    return over;
}

/* Of scores equal to the threshold `left` are active, those at lower indices: find where they end. */
static int end_of_ties(const Tensor *tensors, const Chunk *chunks, int64_t left, int score, Threshold *found) {
    int64_t before = 0; /* of the same tensor */
    const Chunk *c = chunks;
    for (; left >= c->equal; c++) {
        left -= c->equal;
        before = c[1].tensor == c->tensor ? before + c->equal : 0;
    }
    const Tensor *one = tensors + c->tensor;
    if (!one->ordered && left + before > 0) return TIES;
    found->tensor = c->tensor;
    for (found->position = c->start; left > 0; found->position++)
        left -= score_of(one->weight[found->position], one->grad[found->position], score) == found->value;
    return DONE;
}

/* Find where the k largest scores end; ties go to the lower index. TIES if that is not here to tell. */
static int find(const Tensor *tensors, int64_t count, Chunk *chunks, int64_t num_chunks, int64_t total, int64_t k,
                int score, int threads, Threshold *found) {
    *found = (Threshold){0, -1, -1};
    const double wanted = fmax(pow((double)total, 2.0 / 3.0) * RUN / 4, LEAST_SAMPLE);
    const int64_t distance = (int64_t)fmax((double)total / wanted * RUN, RUN) | 1; /* odd: visits all columns of 2^n */
    const int64_t most = total / distance * RUN + 2 * RUN;
    const int64_t room = total / 32 > LEAST_ROOM ? total / 32 : (total < LEAST_ROOM ? total : LEAST_ROOM);
    float *sample = malloc(sizeof(float) * (size_t)(2 * most)), *inside = malloc(sizeof(float) * (size_t)(2 * room));
    int state = sample && inside ? DONE : NO_MEMORY;

    int64_t larger = 0, same = 0, taken = state == DONE ? take(tensors, count, distance, score, sample) : 0;
    for (int64_t i = 0; i < taken; i++)
        if (!(sample[i] < INFINITY)) state = NOT_FINITE;
    int is_found = 0;
    for (double sigmas = 3; state == DONE && !is_found; sigmas *= 2) { /* three in a thousand samples mislead */
        float low, high;
        int64_t over = 0, gathered = 0;
        guess(sample, taken, (double)k / (double)total, sigmas, sample + most, &low, &high);
        state = look(tensors, chunks, num_chunks, score, low, high, inside, room, &over, &gathered, threads);
        if (state != DONE) break;
        if (k <= over || (k > over + gathered && low > 0)) continue;
        is_found = 1;
        if (k > over + gathered) break; /* fewer are above zero, so zero is the end */
        if (gathered > room) {          /* very many are equal */
            found->value = by_digits(tensors, count, k, score);
            larger = rank_of(tensors, chunks, num_chunks, score, found->value, threads);
            for (int64_t c = 0; c < num_chunks; c++) same += chunks[c].equal;
            break;
        }
        found->value = nth_largest(inside, gathered, k - over - 1, low, high, inside + room);
        larger = over;
        for (int64_t c = 0; c < num_chunks; c++) {
            const float *mine = inside + chunks[c].place;
            int64_t equal = 0;
            for (int64_t i = 0; i < chunks[c].found; i++) {
                larger += mine[i] > found->value;
                equal += mine[i] == found->value;
            }
            chunks[c].equal = equal, same += equal;
        }
    }
    if (state == DONE && found->value > 0) {
        found->tensor = count;
        if (larger + same > k) state = end_of_ties(tensors, chunks, k - larger, score, found);
    }
    free(sample);
    free(inside);
    return state;
}

/* --- the update --- */

/* torch.optim.SGD's step with the gradient, or with what takes its place where a weight is passive. */
static inline void sgd(float *restrict weight, const float *restrict grad, float *restrict momentum, int64_t size,
                       const Group *group, const uint8_t *restrict active, int tail) {
    const float lr = (float)-group->lr, decay = (float)group->decay, extra = (float)group->extra_decay;
    const float beta = (float)group->beta1;
    for (int64_t i = 0; i < size; i++) {
        float w = weight[i], step = active[i] ? grad[i] : extra * w;
        if (decay != 0) step = fmaf(w, decay, step);
        if (momentum) {
            const float moved = tail ? fmaf(momentum[i], beta, step) : momentum[i] * beta + step;
            momentum[i] = moved;
            step = group->nesterov ? fmaf(moved, beta, step) : moved;
        }
        weight[i] = fmaf(step, lr, w);
    }
}

/* torch.optim.AdamW's step: passive weights have no gradient in the first moment, and a decay of their own. */
static inline void adamw(float *restrict weight, const float *restrict grad, float *restrict first,
                         float *restrict second, int64_t size, const Moments *by, const uint8_t *restrict active,
                         int tail) {
    const int near = by->share1 < 0.5f;
    for (int64_t i = 0; i < size; i++) {
        const float g = active[i] ? grad[i] : 0, rest = active[i] ? 0 : grad[i];
        float w = weight[i];
        w = active[i] ? w * by->kept : fmaf(-w, by->extra, w * by->kept);
        const float away = g - first[i];
        const float m = near ? fmaf(by->share1, away, first[i]) : fmaf(by->share1 - 1, away, g);
        float v = fmaf(by->rest2 * rest, rest, second[i]);
        v = tail ? fmaf(v, by->keep2, by->share2 * g * g) : fmaf(by->share2 * g, g, v * by->keep2);
        first[i] = m;
        second[i] = v;
        weight[i] = w + by->step_size * m / (sqrtf(v) / by->root2 + by->eps);
    }
}

/* Mark which weights of a block are active. */
static inline void mark(uint8_t *restrict active, const float *weight, const float *grad, int64_t size, int score,
                        float value, int with_equal) {
    if (with_equal)
        for (int64_t i = 0; i < size; i++) active[i] = score_of(weight[i], grad[i], score) >= value;
    else
        for (int64_t i = 0; i < size; i++) active[i] = score_of(weight[i], grad[i], score) > value;
}

static Moments moments_of(const Group *group, double steps) {
    const double correction1 = 1 - pow(group->beta1, steps), correction2 = 1 - pow(group->beta2, steps);
    const double share2 = 1 - group->beta2;
    return (Moments){
        .kept = (float)(1 - group->lr * group->decay),
        .extra = (float)(group->lr * group->extra_decay),
        .keep2 = (float)group->beta2,
        .share1 = (float)(1 - group->beta1),
        .share2 = (float)share2,
        .rest2 = (float)(share2 / group->beta2),
        .step_size = (float)-(group->lr / correction1),
        .root2 = (float)sqrt(correction2),
        .eps = (float)group->eps,
    };
}

static void update(Tensor *tensors, int64_t count, const Chunk *chunks, int64_t num_chunks, const Group *groups,
                   int score, const Threshold *end, int threads) {
    const unsigned mode = rounding();
    for (int64_t t = 0; t < count; t++)
        if (tensors[t].own_steps) *tensors[t].own_steps += 1;
#pragma omp parallel num_threads(threads)
    {
        const unsigned own = rounding();
        set_rounding(mode);
        uint8_t marks[MARKS];
#pragma omp for schedule(static)
        for (int64_t c = 0; c < num_chunks; c++) {
            const Tensor *one = tensors + chunks[c].tensor;
            const Group *group = groups + one->group;
            const Moments by = one->second ? moments_of(group, *one->own_steps) : (Moments){0};
            const int64_t body = one->size - one->size % TAIL;
            int64_t start = chunks[c].start;
            const int64_t stop = start + chunks[c].size;
            while (start < stop) {
                int64_t size = stop - start < MARKS ? stop - start : MARKS;
                float *weight = one->weight + start;
                const float *grad = one->grad + start;
                const uint8_t *active = marks;
                if (one->active == MASK) {
                    active = one->mask + start;
                } else if (one->active == ALL) {
                    memset(marks, 1, (size_t)size);
                } else {
                    const int64_t t = chunks[c].tensor;
                    if (t == end->tensor && start < end->position && end->position < start + size)
                        size = end->position - start;
                    const int with_equal = t < end->tensor || (t == end->tensor && start < end->position);
                    mark(marks, weight, grad, size, score, end->value, with_equal);
                }
                if (start < body && start + size > body) size = body - start;
                if (one->second)
                    adamw(weight, grad, one->first + start, one->second + start, size, &by, active, start >= body);
                else
                    sgd(weight, grad, one->first ? one->first + start : NULL, size, group, active, start >= body);
                start += size;
            }
        }
        set_rounding(own);
    }
}

/* Whether the gradients of what has a mask are finite. */
static int all_finite(const Tensor *tensors, const Chunk *chunks, int64_t count, int threads) {
    int bad = 0;
#pragma omp parallel for num_threads(threads) schedule(static) reduction(| : bad)
    for (int64_t c = 0; c < count; c++) {
        const Tensor *one = tensors + chunks[c].tensor;
        if (one->active != MASK) continue;
        const float *grad = one->grad + chunks[c].start;
        int wrong = 0;
        for (int64_t i = 0; i < chunks[c].size; i++) wrong |= !(fabsf(grad[i]) < INFINITY);
        bad |= wrong;
    }
    return !bad;
}

/* Take a step, or return why not; then nothing has changed.
 *
 * `total` is the size of all tensors whose scores count, `k` how many of them are active at most.
 */
int gsm_step(Tensor *tensors, int64_t count, Chunk *chunks, int64_t num_chunks, const Group *groups,
             int64_t total, int64_t k, int score, int threads) {
    Threshold end = {0, -1, -1};
    if (total) {
        const int state = find(tensors, count, chunks, num_chunks, total, k, score, threads, &end);
        if (state != DONE) return state;
    } else if (!all_finite(tensors, chunks, num_chunks, threads)) {
        return NOT_FINITE;
    }
    update(tensors, count, chunks, num_chunks, groups, score, &end, threads);
    return DONE;
}
