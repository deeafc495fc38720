/* Causal attention of some rows, with the sums that are kept of each map, in one pass over tiles that fit the caches.
 *
 * A block is a few rows of all the heads that share their keys. Tile by tile of its columns, as many rows as fit the
 * registers are multiplied by the keys, their weights taken relative to the largest score so far (Milakov and
 * Gimelshein, arXiv:1805.02867), and multiplied by the values. The weights stay until the block is done: then each
 * row's denominator is known, and with it what every tile's weights are worth in the sums of the columns.
 *
 * Built once for each instruction set, with LANES (floats of a register), ROWS (rows whose sums fit the registers, two
 * registers each) and BUILT_FROM (a digest of this file and of how it is built). Knows numbers and sizes only;
 * attending.py fills them in. One file, however long, since the compiler must see all of it at once.
 */
#include <math.h>
#include <stdatomic.h>
#include <string.h>

/* SKEW: else all rows of a tile would lie on the same few lines of the cache */
enum { PANEL = 2 * LANES, TILE = 128, SKEW = 16, STRIDE = TILE + SKEW };
_Static_assert(TILE % PANEL == 0 && SKEW % LANES == 0, "a tile is some panels, and panels some registers");

/* For one row of the map: heads that are multiplied at once, and columns whose values are read, panel by panel, before
 * those of the next. Where a part of many columns' values is read at a time, the CPU fetches nothing ahead. */
enum { HEADS = 4, NEAR = 16 };
_Static_assert(HEADS <= ROWS, "their sums fit the registers, too");

typedef float lanes __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef int whole __attribute__((vector_size(4 * LANES), aligned(4), may_alias));
typedef unsigned short shorter __attribute__((vector_size(2 * LANES), aligned(2), may_alias));

const char built_from[] = BUILT_FROM;
const int sizes[] = {LANES, ROWS, TILE, STRIDE, HEADS};

#define EACH(count) _Pragma("GCC unroll 16") for (int i = 0; i < count; i++)
#define EACH_ROW EACH(ROWS)
#define ALWAYS_INLINE inline __attribute__((always_inline))

/* What a tensor's numbers are. A function that takes this is inlined, and compiled once for each. */
enum dtype { FLOAT32, BFLOAT16 };

/* Some rows of the map. What is read is float32. */
struct rows {
  const float *query;            /* [batch][heads][rows][width], by the three strides */
  const float *keys;             /* [batch * shared][panels][width][PANEL], the columns laid side by side */
  const float *values;           /* [batch * shared][value_panels][columns][PANEL] */
  const int *starts;             /* [batch][rows], by a stride; or none: 0 */
  const unsigned char *counted;  /* [batch][rows]; or none: all */
  float *output;                 /* [batch][rows][heads][value_width], by two strides */
  float *diagonal;               /* [batch][heads][rows], by two strides */
  float *received;               /* [shares][batch * shared * group][columns], added to */
  float *scratch;                /* [threads][scratch_each]; how much that is: library.py */
  long query_batch, query_head, query_row, starts_batch, output_batch, output_row, diagonal_batch, diagonal_head;
  long batch, shared, group, rows, first, columns, width, value_width, panels, value_panels;
  long shares, block_rows, threads, scratch_each;
  float scale;                   /* of the scores, log2(e) included */
  atomic_long joined, next;
};

/* The newest row alone: keys and values are read where they lie. */
struct row {
  const void *query;             /* [batch][heads][width], by two strides */
  const void *keys;              /* [batch][shared][columns][width], by three strides */
  const void *values;            /* [batch][shared][columns][value_width], by three strides */
  const int *starts;             /* [batch], by a stride; or none: 0 */
  const unsigned char *counted;  /* [batch]; or none: all */
  const int *read;               /* [reads] heads whose rows are wanted; or none: all */
  void *output;                  /* [batch][heads][value_width] */
  float *diagonal;               /* [batch][heads read], by two strides */
  float *received;               /* [batch][heads read][columns], by two strides; added to */
  float *scratch;                /* [threads][scratch_each] */
  long query_batch, query_head, key_batch, key_head, key_row, value_batch, value_head, value_row;
  long starts_batch, diagonal_batch, diagonal_head, received_batch, received_head;
  long batch, shared, group, columns, width, value_width, reads;
  long dtype;                    /* of query, keys, values and output */
  long threads, scratch_each;
  float scale;
  atomic_long joined, next;
};

/* What a block needs, one after another in a thread's scratch. */
struct block {
  float *query;    /* [groups of ROWS][width][ROWS] */
  float *output;   /* [rows][value_panels * PANEL], not yet divided by the denominators */
  float *highest;  /* [rows] largest score so far */
  float *total;    /* [rows] sum of the weights */
  float *worth;    /* [tiles][rows] first the highest score that a tile's weights are relative to */
  float *weights;  /* [tiles][rows][STRIDE] */
  long pair, begin, rows, padded, low, stop;
};

static long least(long a, long b) { return a < b ? a : b; }
static long most(long a, long b) { return a > b ? a : b; }
static long up(long size, long unit) { return (size + unit - 1) / unit * unit; }

/* A register of a tensor's numbers, from the one at that place on. */
static ALWAYS_INLINE lanes load(const void *numbers, long at, const enum dtype dtype) {
  if (dtype == FLOAT32) return *(const lanes *)((const float *)numbers + at);
  return (lanes)(__builtin_convertvector(*(const shorter *)((const unsigned short *)numbers + at), whole) << 16);
}

static ALWAYS_INLINE void copy_from(float *copy, const void *numbers, long at, long count, const enum dtype dtype) {
  if (dtype == FLOAT32) {
    memcpy(copy, (const float *)numbers + at, 4 * count);
    return;
  }
  for (long i = 0; i < count; i++) {
    unsigned bits = (unsigned)((const unsigned short *)numbers)[at + i] << 16;
    memcpy(copy + i, &bits, sizeof bits);
  }
}

/* Rounds to the nearest, to the even one of two. */
static ALWAYS_INLINE void copy_to(void *numbers, long at, const float *from, long count, const enum dtype dtype) {
  if (dtype == FLOAT32) {
    memcpy((float *)numbers + at, from, 4 * count);
    return;
  }
  for (long i = 0; i < count; i++) {
    unsigned bits;
    memcpy(&bits, from + i, sizeof bits);
    unsigned nearest = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
    ((unsigned short *)numbers)[at + i] = from[i] == from[i] ? nearest : 0x7fc0; /* or a NaN could become infinite */
  }
}

/* 2^x for x <= 0, to 8e-8 of it; below 2^-126 nothing. NaN stays NaN. The polynomial is the one of its degree that is
 * nowhere further from 2^x, for x from -1/2 to 1/2, than 2e-9 of it. */
static inline lanes power_of_two(lanes x) {
  whole normal = ~(x < -126.0f);
  lanes shifted = x + 12583039.0f; /* 1.5 * 2^23 + 127: no bits are left for fractions, and the last are an exponent */
  lanes rest = x - (shifted - 12583039.0f);
  lanes power = rest * 1.535336206e-4f + 1.339887456e-3f;
  power = power * rest + 9.618437358e-3f;
  power = power * rest + 5.550332471e-2f;
  power = power * rest + 2.402264791e-1f;
  power = power * rest + 6.931472029e-1f;
  power = power * rest + 1.0f;
  power *= (lanes)((whole)shifted << 23);
  return (lanes)((whole)power & normal);
}

static inline lanes higher(lanes a, lanes b) {
  whole more = a > b;
  return (lanes)((more & (whole)a) | (~more & (whole)b));
}

/* scores[ROWS][STRIDE] = scale times query[width][ROWS] times keys[width][PANEL] */
static inline void multiply_keys(const float *query, const float *keys, long width, float scale, float *scores) {
  lanes left[ROWS], right[ROWS];
  EACH_ROW left[i] = right[i] = (lanes){0};
  for (long d = 0; d < width; d++, query += ROWS, keys += PANEL) {
    lanes a = *(const lanes *)keys, b = *(const lanes *)(keys + LANES);
    EACH_ROW left[i] += query[i] * a, right[i] += query[i] * b;
  }
  EACH_ROW {
    *(lanes *)(scores + i * STRIDE) = left[i] * scale;
    *(lanes *)(scores + i * STRIDE + LANES) = right[i] * scale;
  }
}

/* output[rows][by stride] += weights[rows][by stride] times values[columns][by stride], PANEL of these at a time */
static ALWAYS_INLINE void multiply_values(
    const int rows, const float *weights, long weight_stride, const void *values, const enum dtype dtype, long at,
    long value_stride, long columns, float *output, long stride) {
  lanes left[ROWS], right[ROWS];
  EACH(rows) left[i] = *(lanes *)(output + i * stride), right[i] = *(lanes *)(output + i * stride + LANES);
  for (long c = 0; c < columns; c++, weights++, at += value_stride) {
    lanes a = load(values, at, dtype), b = load(values, at + LANES, dtype);
    EACH(rows) left[i] += weights[i * weight_stride] * a, right[i] += weights[i * weight_stride] * b;
  }
  EACH(rows) *(lanes *)(output + i * stride) = left[i], *(lanes *)(output + i * stride + LANES) = right[i];
}

static inline float widest(lanes x) {
  float found = x[0];
  for (int i = 1; i < LANES; i++) found = x[i] > found ? x[i] : found;
  return found;
}

static inline float sum(lanes x) {
  float parts[LANES];
  memcpy(parts, &x, sizeof parts);
  _Pragma("GCC unroll 4") for (int half = LANES / 2; half > 0; half /= 2)
    _Pragma("GCC unroll 8") for (int i = 0; i < half; i++) parts[i] += parts[i + half];
  return parts[0];
}

/* One row's scores [begin, end) of a tile become weights, zero but in [low, stop); the row's output is kept in step. */
static void weigh(struct block *b, long row, long tile, float *scores, long begin, long end, long low, long stop,
                  long value_stride) {
  low = most(low, begin), stop = least(stop, end);
  if (low >= stop) {
    memset(scores + begin, 0, 4 * (end - begin));
    b->worth[tile * b->padded + row] = b->highest[row];
    return;
  }
  for (long c = begin; c < low; c++) scores[c] = -INFINITY;
  for (long c = stop; c < end; c++) scores[c] = -INFINITY;
  lanes high = *(lanes *)(scores + begin);
  for (long c = begin + LANES; c < end; c += LANES) high = higher(*(lanes *)(scores + c), high);
  float before = b->highest[row], now = widest(high);
  if (now > before) {
    float shrunk = exp2f(before - now), *output = b->output + row * value_stride;
    b->highest[row] = now, b->total[row] *= shrunk;
    for (long d = 0; d < value_stride; d += LANES) *(lanes *)(output + d) *= shrunk;
  } else {
    now = before;
  }
  lanes total = {0};
  for (long c = begin; c < end; c += LANES) {
    lanes weights = power_of_two(*(lanes *)(scores + c) - now);
    *(lanes *)(scores + c) = weights;
    total += weights;
  }
  b->total[row] += sum(total);
  b->worth[tile * b->padded + row] = now;
}

static long start_of(const struct rows *job, long batch, long row) {
  return job->starts ? most(job->starts[batch * job->starts_batch + row], 0) : 0;
}

static void pack_query(const struct rows *job, struct block *b, long batch, long heads) {
  for (long r = 0; r < b->padded; r++) {
    float *packed = b->query + r / ROWS * ROWS * job->width + r % ROWS;
    const float *row = job->query + batch * job->query_batch + (heads + r % job->group) * job->query_head +
                       (b->begin + r / job->group) * job->query_row;
    for (long d = 0; d < job->width; d++) packed[d * ROWS] = r < b->rows ? row[d] : 0;
  }
}

/* Weights and output of ROWS rows over one tile. */
static void attend_tile(const struct rows *job, struct block *b, long batch, long group, long tile) {
  const long from = tile * TILE, value_stride = job->value_panels * PANEL;
  float *weights = b->weights + (tile - b->low / TILE) * b->padded * STRIDE + group * STRIDE;
  long low = job->columns, stop = 0;
  for (long r = group; r < least(group + ROWS, b->rows); r++) {
    long row = b->begin + r / job->group;
    low = least(low, start_of(job, batch, row)), stop = job->first + row + 1;
  }
  /* Panels that none of the rows sees are not computed; the sums of the columns read zeros there. */
  long begin = least(most(low - from, 0) / PANEL * PANEL, TILE), end = most(least(up(stop - from, PANEL), TILE), 0);
  if (begin > end) begin = end;
  for (int i = 0; i < ROWS; i++) {
    memset(weights + i * STRIDE, 0, 4 * begin);
    memset(weights + i * STRIDE + end, 0, 4 * (TILE - end));
  }
  if (begin < end) {
    const float *keys = job->keys + (b->pair * job->panels + from / PANEL) * job->width * PANEL;
    for (long c = begin; c < end; c += PANEL)
      multiply_keys(b->query + group * job->width, keys + c * job->width, job->width, job->scale, weights + c);
  }
  for (long r = group; r < group + ROWS; r++) {
    long row = b->begin + r / job->group;
    int real = r < b->rows;
    weigh(b, r, tile - b->low / TILE, weights + (r - group) * STRIDE, begin, end,
          real ? start_of(job, batch, row) - from : end, real ? job->first + row + 1 - from : end, value_stride);
  }
  if (begin < end) {
    for (long p = 0; p < job->value_panels; p++)
      multiply_values(ROWS, weights + begin, STRIDE, job->values, FLOAT32,
                      ((b->pair * job->value_panels + p) * job->columns + from + begin) * PANEL, PANEL,
                      least(end, job->columns - from) - begin, b->output + group * value_stride + p * PANEL,
                      value_stride);
  }
}

/* Divides the output by the denominators, and finds what each tile's weights are worth. */
static void finish_rows(const struct rows *job, struct block *b, long batch, long heads) {
  const long tiles = up(b->stop, TILE) / TILE - b->low / TILE, value_stride = job->value_panels * PANEL;
  for (long r = 0; r < b->rows; r++) {
    long row = b->begin + r / job->group, head = heads + r % job->group, own = job->first + row;
    float share = b->total[r] == 0 ? 0 : 1 / b->total[r];
    float *output = job->output + batch * job->output_batch + row * job->output_row + head * job->value_width;
    for (long d = 0; d < job->value_width; d++) output[d] = b->output[r * value_stride + d] * share;
    for (long t = 0; t < tiles; t++) {
      float *worth = b->worth + t * b->padded + r;
      *worth = exp2f(*worth - b->highest[r]) * share;
    }
    long tile = own / TILE - b->low / TILE;
    job->diagonal[batch * job->diagonal_batch + head * job->diagonal_head + row] =
        share == 0 ? 0 : b->weights[(tile * b->padded + r) * STRIDE + own % TILE] * b->worth[tile * b->padded + r];
    if (share == 0 || (job->counted && !job->counted[batch * job->rows + row]))
      for (long t = 0; t < tiles; t++) b->worth[t * b->padded + r] = 0;
  }
}

static void sum_columns(const struct rows *job, struct block *b, float *received) {
  const long first = b->low / TILE, last = up(b->stop, TILE) / TILE;
  for (long tile = first; tile < last; tile++)
    for (long g = 0; g < job->group; g++) {
      const float *weights = b->weights + ((tile - first) * b->padded + g) * STRIDE;
      const float *worth = b->worth + (tile - first) * b->padded + g;
      float *sums = received + g * job->columns + tile * TILE;
      long count = least(b->stop - tile * TILE, TILE);
      for (long c = 0; c < count; c += 2 * LANES) {
        lanes left = {0}, right = {0};
        for (long r = 0; r < b->rows - g; r += job->group) {
          left += worth[r] * *(const lanes *)(weights + r * STRIDE + c);
          right += worth[r] * *(const lanes *)(weights + r * STRIDE + c + LANES);
        }
        if (c + 2 * LANES <= count) {
          *(lanes *)(sums + c) += left, *(lanes *)(sums + c + LANES) += right;
        } else {
          for (long i = 0; i < count - c; i++) sums[c + i] += i < LANES ? left[i] : right[i - LANES];
        }
      }
    }
}

static void attend_block(const struct rows *job, float *memory, long pair, long share, long block) {
  const long batch = pair / job->shared, heads = pair % job->shared * job->group;
  const long value_stride = job->value_panels * PANEL, begin = block * job->block_rows;
  struct block b = {.pair = pair, .begin = begin};
  long end = least(begin + job->block_rows, job->rows);
  b.rows = (end - begin) * job->group, b.padded = up(b.rows, ROWS);
  b.stop = job->first + end, b.low = b.stop - 1;
  for (long row = begin; row < end; row++) b.low = least(b.low, start_of(job, batch, row));
  long tiles = up(b.stop, TILE) / TILE - b.low / TILE;
  b.query = memory, b.output = b.query + b.padded * job->width;
  b.highest = b.output + b.padded * value_stride, b.total = b.highest + b.padded;
  b.worth = b.total + b.padded, b.weights = b.worth + up(tiles * b.padded, 16);
  memset(b.output, 0, 4 * b.padded * value_stride);
  memset(b.total, 0, 4 * b.padded);
  for (long r = 0; r < b.padded; r++) b.highest[r] = -INFINITY;
  pack_query(job, &b, batch, heads);
  for (long tile = b.low / TILE; tile < up(b.stop, TILE) / TILE; tile++)
    for (long group = 0; group < b.padded; group += ROWS) attend_tile(job, &b, batch, group, tile);
  finish_rows(job, &b, batch, heads);
  sum_columns(job, &b, job->received + (share * job->batch * job->shared + pair) * job->group * job->columns);
}

/* Every thread of a team calls this with the same job. */
void attend(struct rows *job) {
  long thread = atomic_fetch_add(&job->joined, 1);
  if (thread >= job->threads) return;
  float *memory = job->scratch + thread * job->scratch_each;
  const long blocks = (job->rows + job->block_rows - 1) / job->block_rows;
  /* A share of a head's blocks is one thread's, and the shares are added up in their order: with as many threads the
   * same sums each time. */
  for (long unit; (unit = atomic_fetch_add(&job->next, 1)) < job->batch * job->shared * job->shares;) {
    long pair = unit / job->shares, share = unit % job->shares;
    for (long block = blocks - 1 - share; block >= 0; block -= job->shares)
      attend_block(job, memory, pair, share, block);
  }
}

/* scores[HEADS][by stride] of two columns = scale times query[HEADS][padded] times keys[2][by stride]. The last numbers
 * of a key that are no whole register are read with some before them, for which the query holds zeros. */
static ALWAYS_INLINE void multiply_two_keys(const float *query, long padded, const void *keys, const enum dtype dtype,
                                            long at, long key_stride, long width, float scale, float *scores,
                                            long stride) {
  lanes left[HEADS] = {0}, right[HEADS] = {0};
  for (long d = 0; d < padded; d += LANES) {
    long part = at + least(d, width - LANES);
    lanes a = load(keys, part, dtype), b = load(keys, part + key_stride, dtype);
    _Pragma("GCC unroll 4") for (int h = 0; h < HEADS; h++) {
      lanes q = *(const lanes *)(query + h * padded + d);
      left[h] += q * a, right[h] += q * b;
    }
  }
  for (int h = 0; h < HEADS; h++, scores += stride) scores[0] = sum(left[h]) * scale, scores[1] = sum(right[h]) * scale;
}

/* The scores of one head become weights; the columns are filled up to a whole register. */
static void weigh_row(float *scores, long columns) {
  long end = up(columns, LANES);
  for (long c = columns; c < end; c++) scores[c] = -INFINITY;
  lanes high = *(lanes *)scores, total = {0};
  for (long c = LANES; c < end; c += LANES) high = higher(*(lanes *)(scores + c), high);
  float highest = widest(high);
  for (long c = 0; c < end; c += LANES) {
    lanes weights = power_of_two(*(lanes *)(scores + c) - highest);
    *(lanes *)(scores + c) = weights;
    total += weights;
  }
  float share = 1 / sum(total);
  for (long c = 0; c < end; c += LANES) *(lanes *)(scores + c) *= share;
}

/* The place of a head among those whose sums are wanted; -1 if it is not among them. */
static long place_of(const struct row *job, long head) {
  if (!job->read) return head;
  for (long i = 0; i < job->reads; i++)
    if (job->read[i] == head) return i;
  return -1;
}

/* One row of one key-value head's heads. */
static ALWAYS_INLINE void attend_newest(const struct row *job, float *memory, long batch, long shared,
                                        const enum dtype dtype) {
  const long low = job->starts ? least(most(job->starts[batch * job->starts_batch], 0), job->columns) : 0;
  const long columns = job->columns - low;
  const long stride = up(columns, TILE) + SKEW, heads = shared * job->group, rows = up(job->group, HEADS);
  const long width = job->width, padded = up(width, LANES), rest = width % LANES;
  const long value_width = job->value_width, value_stride = up(value_width, PANEL), value_rest = value_width % PANEL;
  const long keys = batch * job->key_batch + shared * job->key_head + low * job->key_row;
  const long values = batch * job->value_batch + shared * job->value_head + low * job->value_row;
  float *query = memory, *output = query + rows * padded, *scores = output + rows * value_stride;
  memset(query, 0, 4 * rows * (padded + value_stride));
  for (long g = 0; g < job->group; g++) {
    const long row = batch * job->query_batch + (heads + g) * job->query_head;
    copy_from(query + g * padded, job->query, row, width - rest, dtype);
    copy_from(query + (g + 1) * padded - rest, job->query, row + width - rest, rest, dtype);
  }
  for (long g = 0; g < job->group; g += HEADS)
    for (long c = 0; c < columns; c += 2) {
      long at = most(least(c, columns - 2), 0);
      multiply_two_keys(query + g * padded, padded, job->keys, dtype, keys + at * job->key_row,
                        columns > 1 ? job->key_row : 0, width, job->scale, scores + g * stride + at, stride);
    }
  for (long g = 0; g < job->group; g++)
    if (columns) weigh_row(scores + g * stride, columns);
  for (long g = 0; g < job->group; g += HEADS)
    for (long from = 0; from < columns; from += NEAR)
      for (long d = 0; d < value_width; d += PANEL) /* the last panel reads numbers of the one before again */
        multiply_values(HEADS, scores + g * stride + from, stride, job->values, dtype,
                        values + from * job->value_row + least(d, value_width - PANEL), job->value_row,
                        least(NEAR, columns - from), output + g * value_stride + d, value_stride);
  for (long g = 0; g < job->group; g++) {
    const float *row = output + g * value_stride;
    const long written = (batch * job->shared * job->group + heads + g) * value_width;
    copy_to(job->output, written, row, value_width - value_rest, dtype);
    copy_to(job->output, written + value_width - value_rest, row + value_stride - value_rest, value_rest, dtype);
  }
  for (long g = 0; g < job->group; g++) {
    const float *weights = scores + g * stride;
    const long place = place_of(job, heads + g);
    if (place < 0) continue;
    job->diagonal[batch * job->diagonal_batch + place * job->diagonal_head] = columns ? weights[columns - 1] : 0;
    if (job->counted && !job->counted[batch]) continue;
    float *received = job->received + batch * job->received_batch + place * job->received_head + low;
    long c = 0;
    for (; c + LANES <= columns; c += LANES) *(lanes *)(received + c) += *(const lanes *)(weights + c);
    for (; c < columns; c++) received[c] += weights[c];
  }
}

/* Every thread of a team calls this with the same job. */
void attend_row(struct row *job) {
  long thread = atomic_fetch_add(&job->joined, 1);
  if (thread >= job->threads) return;
  float *memory = job->scratch + thread * job->scratch_each;
  for (long pair; (pair = atomic_fetch_add(&job->next, 1)) < job->batch * job->shared;)
    if (job->dtype == FLOAT32)
      attend_newest(job, memory, pair / job->shared, pair % job->shared, FLOAT32);
    else
      attend_newest(job, memory, pair / job->shared, pair % job->shared, BFLOAT16);
}
