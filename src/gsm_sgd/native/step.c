/* A step of GSM and GSMAdamW on a CPU, in float32: choose the k weights with the largest scores, and update all.
 *
 * 1. A strided sample of the scores gives a bracket that very likely encloses the k-th largest.
 * 2. A pass over weights and gradients counts the scores above it and gathers those inside.
 * 3. The k-th largest is found among these; if it is not there, by counting the bits of all scores, digit by digit.
 * 4. A second pass computes the scores again, and updates.
 *
 * The updates round as torch's operations do, so that a step has the same bits with and without this file: build it
 * with -ffp-contract=off.
 */

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef _OPENMP
#include <omp.h>
#endif
#ifdef __SSE__
#include <xmmintrin.h>
#endif

enum { MAGNITUDE = 0, TAYLOR = 1 };              /* scores */
enum { ALL = 0, SCORES = 1, MASK = 2 };          /* which weights of a tensor are active */
enum { DONE = 0, NOT_FINITE = 1, TIES = 2, NO_MEMORY = 3 };

enum { CHUNK = 1 << 14, BLOCK = 64 };            /* weights that a thread takes at a time, and that it looks at */
enum { TAIL = 8 };                              /* torch rounds the last size % TAIL weights of a tensor otherwise */
enum { LEAST_SAMPLE = 1024, LEAST_ROOM = 1 << 16 };
static const int DIGITS = 11;                    /* bits that are counted at a time */

/* A parameter. What its score and its update need, in its memory order. */
typedef struct {
    float *weight;
    const float *grad;
    float *first, *second; /* momentum, or the moments; NULL if there is none */
    const uint8_t *mask;   /* 1 where a weight is active, for MASK */
    float *own_steps;      /* how many steps it has taken, for AdamW */
    int64_t size;
    int64_t active;        /* ALL, SCORES or MASK */
    int64_t ordered;       /* whether its memory order is the order of its index */
    int64_t group;
} Tensor;

/* The settings of a group. */
typedef struct {
    double lr, decay, extra_decay;     /* extra_decay: of passive weights, above that of active ones */
    double beta1, beta2, eps;          /* of SGD beta1 is the momentum */
    int64_t nesterov;
} Group;

typedef struct {
    int64_t tensor, start, size;
} Chunk;

/* Where the largest scores end; up to (tensor, position) scores equal to the value are active, after it they are not. */
typedef struct {
    float value;
    int64_t tensor, position;
} Threshold;

/* What AdamW needs of a step of one tensor. */
typedef struct {
    float kept, extra, keep2, share1, share2, rest2, step_size, root2, eps;
} Moments;

static inline float score_of(float weight, float grad, int score) { return fabsf(score == TAYLOR ? weight * grad : weight); }

/* Threads round denormal numbers as the one that calls. */
static inline unsigned rounding(void) {
#ifdef __SSE__
    return _mm_getcsr();
#else
    return 0;
#endif
}

static inline void set_rounding(unsigned mode) {
#ifdef __SSE__
    _mm_setcsr(mode);
#else
    (void)mode;
#endif
}

/* --- the threshold --- */

/* Move the value of a rank, counted from 0 from the largest, to its place, with no smaller one before it. */
static float nth_largest(float *values, int64_t count, int64_t rank) {
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

/* Guess two values that enclose the k-th largest of `total` scores: it is above `low`, and at most `high`. */
static int guess(const Tensor *tensors, int64_t count, int64_t total, int64_t k, int score, float *low, float *high) {
    int64_t wanted = (int64_t)(pow((double)total, 2.0 / 3.0) / 2);
    if (wanted < LEAST_SAMPLE) wanted = LEAST_SAMPLE;
    const int64_t stride = total / wanted | 1; /* odd, to visit every column of a matrix with 2^n columns */
    float *sample = malloc(sizeof(float) * (size_t)(total / stride + 1));
    if (!sample) return NO_MEMORY;
    int64_t taken = 0, position = stride / 2;
    for (int64_t t = 0; t < count; t++) {
        const Tensor *one = tensors + t;
        if (one->active != SCORES) continue;
        for (; position < one->size; position += stride)
            sample[taken++] = score_of(one->weight[position], one->grad[position], score);
        position -= one->size;
    }
    int bad = 0;
    for (int64_t i = 0; i < taken; i++) bad |= !(sample[i] < INFINITY);
    if (bad || !taken) {
        free(sample);
        *low = 0, *high = INFINITY; /* if some are not finite the count will tell */
        return bad ? NOT_FINITE : DONE;
    }
    /* How many of the sample lie above the k-th largest is about binomial: two standard deviations, and one more. */
    const double share = (double)k / (double)total, rank = share * (double)taken;
    const double margin = 2 * sqrt(rank * (1 - share)) + 1;
    const int64_t first = (int64_t)floor(rank - margin), last = (int64_t)ceil(rank + margin);
    *high = first >= 0 ? nth_largest(sample, taken, first) : INFINITY;
    const int64_t after = first >= 0 ? first : 0;
    *low = last < taken ? nth_largest(sample + after, taken - after, last - after) : 0;
    free(sample);
    return DONE;
}

/* Count the scores above a bracket, and gather those inside as long as there is room. */
static int look(const Tensor *tensors, const Chunk *chunks, int64_t count, int score, float low, float high,
                float *inside, int64_t room, int64_t *above_, int64_t *inside_, int threads) {
    int64_t above = 0, gathered = 0;
    int bad = 0;
    const unsigned mode = rounding();
#pragma omp parallel num_threads(threads) reduction(+ : above) reduction(| : bad)
    {
        const unsigned own = rounding();
        set_rounding(mode);
        float near[CHUNK], scores[BLOCK];
#pragma omp for schedule(static)
        for (int64_t c = 0; c < count; c++) {
            const Tensor *one = tensors + chunks[c].tensor;
            if (one->active != SCORES) continue;
            const float *weight = one->weight + chunks[c].start, *grad = one->grad + chunks[c].start;
            int64_t found = 0;
            for (int64_t start = 0; start < chunks[c].size; start += BLOCK) {
                const int size = chunks[c].size - start < BLOCK ? (int)(chunks[c].size - start) : BLOCK;
                int larger = 0, between = 0, wrong = 0;
                for (int i = 0; i < size; i++) {
                    const float s = score_of(weight[start + i], grad[start + i], score);
                    scores[i] = s;
                    larger += s > high;
                    between += (s > low) & (s <= high);
                    wrong |= !(s < INFINITY) | !(fabsf(grad[start + i]) < INFINITY);
                }
                above += larger;
                bad |= wrong;
                if (between) {
                    for (int i = 0; i < size; i++) {
                        near[found] = scores[i];
                        found += (scores[i] > low) & (scores[i] <= high);
                    }
                }
            }
            if (found) {
                int64_t place;
#pragma omp atomic capture
                { place = gathered; gathered += found; }
                if (place + found <= room) memcpy(inside + place, near, sizeof(float) * (size_t)found);
            }
        }
        set_rounding(own);
    }
    *above_ = above;
    *inside_ = gathered;
    return bad ? NOT_FINITE : DONE;
}

static inline uint32_t bits_of(float score) {
    uint32_t bits;
    if (score == 0) return 0; /* a denormal one too, where these count as zero */
    memcpy(&bits, &score, sizeof bits);
    return bits;
}

/* Find the k-th largest score by the digits of its bits: exact however many are equal, and slow. */
static float by_digits(const Tensor *tensors, int64_t count, int64_t k, int score) {
    uint32_t prefix = 0;
    for (int shift = 32; shift > 0;) {
        const int before = shift;
        shift = shift > DIGITS ? shift - DIGITS : 0;
        const uint32_t bins = 1u << (before - shift);
        int64_t counts[1 << 11] = {0};
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
    float value;
    memcpy(&value, &prefix, sizeof value);
    return value;
}

/* Count the scores above a value and equal to it: these by tensor, too. */
static int64_t rank_of(const Tensor *tensors, int64_t count, int score, float value, int64_t *equal) {
    int64_t above = 0;
    for (int64_t t = 0; t < count; t++) {
        equal[t] = 0;
        if (tensors[t].active != SCORES) continue;
        const float *weight = tensors[t].weight, *grad = tensors[t].grad;
        int64_t larger = 0, same = 0;
        for (int64_t i = 0; i < tensors[t].size; i++) {
            const float s = score_of(weight[i], grad[i], score);
            larger += s > value;
            same += s == value;
        }
        above += larger;
        equal[t] = same;
    }
    return above;
}

/* Find where the k largest scores end; ties go to the lower index. */
static int find(const Tensor *tensors, int64_t count, const Chunk *chunks, int64_t num_chunks, int64_t total, int64_t k,
                int score, int threads, Threshold *found) {
    *found = (Threshold){0, -1, -1};
    const int64_t room = total / 16 > LEAST_ROOM ? total / 16 : (total < LEAST_ROOM ? total : LEAST_ROOM);
    float *inside = malloc(sizeof(float) * (size_t)room);
    if (!inside) return NO_MEMORY;
    float low, high;
    int64_t above = 0, gathered = 0;
    int state = guess(tensors, count, total, k, score, &low, &high);
    if (state == DONE)
        state = look(tensors, chunks, num_chunks, score, low, high, inside, room, &above, &gathered, threads);
    if (state != DONE) {
        free(inside);
        return state;
    }
    int64_t larger = -1, same = -1;
    if (above < k && k <= above + gathered && gathered <= room) {
        found->value = nth_largest(inside, gathered, k - above - 1);
        larger = above, same = 0;
        for (int64_t i = 0; i < gathered; i++) larger += inside[i] > found->value, same += inside[i] == found->value;
    } else if (low > 0 || k <= above + gathered) { /* the sample misled, or too many are equal */
        found->value = by_digits(tensors, count, k, score);
    } /* else fewer than k are above zero */
    free(inside);
    if (!(found->value > 0)) { /* only scores above zero are active */
        found->value = 0;
        return DONE;
    }
    found->tensor = count;
    if (larger + same == k) return DONE;
    int64_t *equal = malloc(sizeof(int64_t) * (size_t)count);
    if (!equal) return NO_MEMORY;
    int64_t left = k - rank_of(tensors, count, score, found->value, equal), t = 0;
    for (; t < count && left >= equal[t]; t++) left -= equal[t]; /* t: the first that has no room for all of its own */
    free(equal);
    found->tensor = t;
    if (t == count || left == 0) return DONE;
    if (!tensors[t].ordered) return TIES;
    for (found->position = 0; left > 0; found->position++)
        left -= score_of(tensors[t].weight[found->position], tensors[t].grad[found->position], score) == found->value;
    return DONE;
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
        uint8_t marks[BLOCK * 8];
#pragma omp for schedule(static)
        for (int64_t c = 0; c < num_chunks; c++) {
            const Tensor *one = tensors + chunks[c].tensor;
            const Group *group = groups + one->group;
            const Moments by = one->second ? moments_of(group, *one->own_steps) : (Moments){0};
            const int64_t body = one->size - one->size % TAIL;
            int64_t start = chunks[c].start;
            const int64_t stop = start + chunks[c].size;
            while (start < stop) {
                int64_t size = stop - start < (int64_t)sizeof marks ? stop - start : (int64_t)sizeof marks;
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
int gsm_step(Tensor *tensors, int64_t count, const Chunk *chunks, int64_t num_chunks, const Group *groups,
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
